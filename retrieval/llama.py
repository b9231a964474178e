"""LLaMA trunks: new ones at a stated size, checkpoints by path, field tokens added, LoRA put on and merged away.

Both models of the project start here, the dual encoder (`LlamaModel`) and the ranker (`LlamaForCausalLM`). Rows are padded on the
right and no attention mask is passed: under causal attention a real token never sees what stands after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.utils import logging as hf_logging

from index.errors import BrewlineError
from retrieval.features import MISSING, Quantizer, bucket_token
from retrieval.tokens import Tokens

MAX_POSITIONS = 20_480


CODES = (torch.int8, torch.float8_e4m3fn)
"""What weights that only serve are held in (`ranking.prefill`)."""


class CheckpointError(BrewlineError):
    """A base checkpoint cannot be used."""


@dataclass(frozen=True)
class Size:
    """The shape of a LLaMA made from scratch; `vocabulary` counts all tokens, special ones included."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    vocabulary: int = 6_000

    @property
    def multiplied(self) -> float:
        """Weights that every token is multiplied with: the projections of all layers."""
        return self.layers * (2 * self.hidden**2 * (1 + self.kv_heads / self.heads) + 3 * self.hidden * self.mlp)


def new_config(size: Size, vocabulary: int) -> LlamaConfig:
    """The configuration of a new LLaMA with tied embeddings. Raises CheckpointError for heads that do not fit."""
    if size.hidden % (2 * size.heads) or size.heads % size.kv_heads:
        raise CheckpointError(
            f"hidden {size.hidden}, heads {size.heads}, kv_heads {size.kv_heads}: expected a hidden that twice the heads divides "
            "(rotary positions turn pairs of dims) and heads that kv_heads divides"
        )
    return LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.mlp,
        vocab_size=vocabulary,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def new_llama(size: Size, vocabulary: int, *, causal_lm: bool) -> LlamaModel | LlamaForCausalLM:
    """A LLaMA with random weights from torch's current seed, float32."""
    config = new_config(size, vocabulary)
    return LlamaForCausalLM(config) if causal_lm else LlamaModel(config)


def load_llama(path: str | Path, *, causal_lm: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint of a local folder (or, where the machine may, a hub name). Raises CheckpointError."""
    hf_logging.disable_progress_bar()  # a bar per loaded file would stand between our own
    auto = AutoModelForCausalLM if causal_lm else AutoModel
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
            raise CheckpointError(f"{path}: model type {config.model_type!r}; expected the LLaMA family")
        return auto.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no usable LLaMA checkpoint ({str(error).splitlines()[0]})") from error


def save_llama(model: PreTrainedModel, folder: Path) -> None:
    """Writes config.json and model.safetensors, without a progress bar of the library's own.

    Raises CheckpointError for a model that only serves: codes without their scales would be read as weights."""
    if coded := next((name for name, weight in model.named_parameters() if weight.dtype in CODES), ""):
        raise CheckpointError(f"{coded} is held in codes, for serving; save the model that it was loaded from")
    hf_logging.disable_progress_bar()
    model.save_pretrained(folder)


def fit_vocabulary(model: PreTrainedModel, tokens: Tokens) -> None:
    """Makes room in the embedding for every token; new rows start at the mean of the old ones."""
    if len(tokens) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokens), mean_resizing=False)
        model.config.vocab_size = len(tokens)


def smooth_buckets(model: PreTrainedModel, tokens: Tokens, quantizer: Quantizer) -> None:
    """Bucket tokens of one field start on a line between two random points, so that neighbours mean nearly the same.

    Independent random rows would have to be learned one by one, and most buckets of a small data set are seen rarely.
    """
    if quantizer.kind not in ("percentile", "log"):
        return
    weight = model.get_input_embeddings().weight
    scale = float(weight.detach().std())
    with torch.no_grad():
        for name in quantizer.names:
            ends = torch.randn(2, weight.shape[1]) * scale
            for bucket in range(MISSING + 1, quantizer.n_buckets + 1):
                share = (bucket - 1) / (quantizer.n_buckets - 1)
                weight[tokens.id(bucket_token(name, bucket))] = (1 - share) * ends[0] + share * ends[1]


def pad_rows(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [B, T] padded on the right, and lengths int64 [B]."""
    lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    padded = np.full((len(rows), int(lengths.max(initial=1))), pad, np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded), torch.from_numpy(lengths)


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update (Hu et al. 2021, arXiv 2106.09685), scaled by alpha / rank."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features, dtype=base.weight.dtype) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, dtype=base.weight.dtype))
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (x @ self.down.T) @ self.up.T * self.scale

    def merged(self) -> nn.Linear:
        """The base layer with the update added to its weight."""
        with torch.no_grad():
            self.base.weight += self.scale * self.up @ self.down
        return self.base


def add_lora(model: PreTrainedModel, rank: int, alpha: float | None = None) -> None:
    """Freezes the trunk's linear layers and gives each a LoRA; embeddings and norms stay trainable (field tokens are new)."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name.endswith("_proj"):
                child.requires_grad_(False)
                setattr(module, name, LoraLinear(child, rank, alpha or 2 * rank))


def merge_lora(model: PreTrainedModel) -> None:
    """Replaces every LoRA by one plain linear layer with the same output."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLinear):
                setattr(module, name, child.merged())
    model.requires_grad_(True)
