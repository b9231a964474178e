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
from ranking.prefill.float8 import check_device as check_float8
from ranking.prefill.int8 import check_device as check_int8
from ranking.prefill.joint import fuse, in_float8, in_int8
from ranking.prefill.request import Request
from retrieval.device import checked_device
from retrieval.llama import load_llama

log = logging.getLogger(__name__)

Arithmetic = Literal["auto", "float32", "bfloat16", "fp8", "int8"]
"""fp8: a bfloat16 body whose projections are held and multiplied in FP8 (`ranking.prefill.float8`); int8: a float32 body whose
projections are held and multiplied in int8 on a CPU (`ranking.prefill.int8`). Auto takes neither: they change what is said."""
BODIES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16, "int8": torch.float32}
"""What everything but the projections is held in."""


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

    `graph_bytes` as in Engine. Raises LabelError, BackendMissing, and what `load_model` does.
    """
    wanted = "float32" if arithmetic == "auto" and deterministic else arithmetic
    model = load_model(folder, wanted, device)
    return Engine(model, label_ids, backend=backend, deterministic=deterministic, graph_bytes=graph_bytes)


def load_model(folder: Path, arithmetic: Arithmetic, device: str = "cpu") -> PreTrainedModel:
    """The checkpoint of a folder, `ready` in an arithmetic.

    Raises CheckpointError, UnsupportedModel; DeviceMissing, Float8Missing and Int8Missing before the weights are read if the
    device is why.
    """
    where = checked_device(device)
    if arithmetic in ("fp8", "int8"):
        (check_float8 if arithmetic == "fp8" else check_int8)(where)
    body = fastest(device) if arithmetic == "auto" else BODIES[arithmetic]
    model = load_llama(folder, causal_lm=True, dtype=body).to(where)
    return ready(model, float8=arithmetic == "fp8", int8=arithmetic == "int8")


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


def ready(model: PreTrainedModel, *, float8: bool = False, int8: bool = False) -> PreTrainedModel:
    """The model serves only from now on: no gradients, the weights that read the same rows side by side, with `float8` in FP8,
    with `int8` in int8.

    Raises UnsupportedModel, with `float8` Float8Missing, with `int8` Int8Missing.
    """
    served = model.eval().requires_grad_(False)
    (in_float8 if float8 else in_int8 if int8 else fuse)(served)
    return model
