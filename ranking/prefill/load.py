"""From a Hugging Face checkpoint folder to probabilities of label tokens, in input order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from ranking.prefill.engine import Engine
from ranking.prefill.float8 import check_device
from ranking.prefill.joint import fuse, in_float8
from ranking.prefill.request import Request
from retrieval.llama import load_llama

log = logging.getLogger(__name__)

Arithmetic = Literal["auto", "float32", "bfloat16", "fp8"]
"""fp8: a bfloat16 body whose projections are held and multiplied in FP8 (`ranking.prefill.float8`)."""


def load_engine(
    folder: Path,
    label_ids: Sequence[int],
    *,
    arithmetic: Arithmetic = "auto",
    device: str = "cpu",
    backend: str | None = None,
    deterministic: bool = False,
    graph_bytes: int = 0,
) -> Engine:
    """A ready engine over the checkpoint of a folder, in the precision that is fastest here (`fastest`), weights fused.

    `graph_bytes` as in Engine. Raises CheckpointError, UnsupportedModel, LabelError, BackendMissing and Float8Missing.
    """
    if arithmetic == "fp8":
        check_device(torch.device(device))
    if arithmetic == "auto":
        chosen = torch.float32 if deterministic else fastest(device)
    else:
        chosen = torch.float32 if arithmetic == "float32" else torch.bfloat16
    model = load_llama(folder, causal_lm=True, dtype=chosen).to(device)
    ready(model, float8=arithmetic == "fp8")
    return Engine(model, label_ids, backend=backend, deterministic=deterministic, graph_bytes=graph_bytes)


def probabilities(engine: Engine, prefix: Sequence[int], items: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """float32 [N, labels]: the softmax over the labels at the end of `prefix + item`, for N items in input order."""
    logits = engine.score([Request(prefix, items)])[0]
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def fastest(device: str) -> torch.dtype:
    """bfloat16 where matrix units for it exist (a GPU, or a CPU with AMX), else float32.

    On a CPU that has bfloat16 instructions but no matrix units, products take twice the time of float32 (docs/log.md).
    """
    units = device != "cpu" or torch.cpu._is_amx_tile_supported()
    log.info("arithmetic on %s: %s", device, "bfloat16" if units else "float32")
    return torch.bfloat16 if units else torch.float32


def ready(model: PreTrainedModel, *, float8: bool = False) -> PreTrainedModel:
    """The model serves only from now on: no gradients, the weights that read the same rows side by side, with `float8` in FP8.

    Raises UnsupportedModel, and with `float8` Float8Missing.
    """
    served = model.eval().requires_grad_(False)
    (in_float8 if float8 else fuse)(served)
    return model
