"""What the tests of nights share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrieval.encoder import save_encoder
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer


@pytest.fixture(scope="session")
def encoder_folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_quantizer: Quantizer, tiny_tokens: Tokens
) -> tuple[Path, Path]:
    """Two untrained encoders that differ in their weights. Shared: do not write into them."""
    size = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48)
    writer = Writer(tiny_tokens, tiny_quantizer, Budgets(item=32, member=96), ("like",))
    root = tmp_path_factory.mktemp("encoders")
    for seed in (3, 4):
        torch.manual_seed(seed)
        save_encoder(root / str(seed), new_llama(size, len(tiny_tokens), causal_lm=False), writer, {"seed": seed})
    return root / "3", root / "4"
