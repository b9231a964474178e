"""Projections in fewer bits; embeddings, norms and the rows that answers are read from stay float32.

A quantized folder holds every projection as the nearest value that the small format can express, so each loader (ours, stock
transformers, the ONNX export) scores exactly what those values score. What arithmetic runs over them is the server's choice:

    bfloat16   stored in two bytes
    int8       per output row, symmetric: w = scale * q, q in -127..127. The products in int8 are the engine's
               (`arithmetic="int8"`, on a CPU), or onnxruntime's from the export (`ranking.export`), which has a gate of its own
    fp8        e4m3 per output row (448 is its largest value); the products are the engine's: `load_engine(arithmetic="fp8")`

Why the answers' rows are left alone: `head_study` shows what else would happen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from index.errors import BrewlineError
from ranking.calibrate import fit
from ranking.metrics import auc, debiased_calibration_error
from ranking.prefill.float8 import check_capability, scaled

Format = Literal["bfloat16", "int8", "fp8"]
LARGEST_INT8 = 127.0

Floats = npt.NDArray[np.float32]


class QuantizeError(BrewlineError):
    """A format cannot be had on this machine."""


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the trunk by name: all but the output embedding."""
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and name.endswith("_proj")}


def quantized(model: LlamaForCausalLM, to: Format) -> LlamaForCausalLM:
    """A float32 copy whose projections hold only values of the format."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for part in projections(found).values():
            part.weight.copy_(rounded(part.weight, to))
    return found


def stored(model: LlamaForCausalLM, to: Format) -> LlamaForCausalLM:
    """The model as it is written: bfloat16 projections take two bytes, the others' values need float32."""
    if to == "bfloat16":
        model = copy.deepcopy(model)
        for part in projections(model).values():
            part.to(torch.bfloat16)
    return model


def rounded(weight: Tensor, to: Format) -> Tensor:
    """The values of a format that stand for a matrix [outputs, inputs], float32; int8 and fp8 have one scale for each output.

    The engine makes fp8 of a bfloat16 body, so a row's largest value is rounded first: only then is this scale found again.
    """
    if to == "bfloat16":
        return weight.bfloat16().float()
    if to == "fp8":
        return scaled(weight.bfloat16().float()).wide()
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / LARGEST_INT8
    return (weight.float() / scale).round() * scale


def check_fp8() -> None:
    """Raises QuantizeError without a CUDA device, and Float8Missing if it has no FP8 products."""
    if not torch.cuda.is_available():
        raise QuantizeError(
            "fp8 needs a CUDA GPU of capability 8.9 or more (H100, L40S), and torch sees none; take int8 on a CPU"
        )
    check_capability(torch.cuda.get_device_capability())


@dataclass(frozen=True)
class HeadRow:
    """What one precision of the head makes of the same states: `distinct` scores of n, `tied` share of the pairs inside lists
    that can no longer be told apart, `ece` with the calibrator of the float32 head, `refitted` with its own, and AUC."""

    head: str
    distinct: int
    tied: float
    auc: float
    ece: float
    refitted: float

    def facts(self) -> dict[str, object]:
        """The row ready for JSON."""
        return asdict(self)


def head_study(state: Floats, rows: Floats, label: npt.NDArray[np.integer], group: npt.NDArray[np.integer]) -> list[HeadRow]:
    """One row for each precision of the head over states [n, D], with the rows [2, D] of the positive and the negative answer.

    `group` [n] says which candidates stand in one list; the calibrators are fitted on half of the lists and judged on the rest.
    """
    x, w = torch.from_numpy(np.asarray(state)), torch.from_numpy(np.asarray(rows))
    heads: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: x @ w.T,
        "bfloat16 rows, float32 product": lambda: x @ w.bfloat16().float().T,
        "bfloat16": lambda: (x.bfloat16() @ w.bfloat16().T).float(),
        "float16": lambda: (x.half() @ w.half().T).float(),
        "fp8 rows and states, bfloat16 out": lambda: (rounded(x, "fp8") @ rounded(w, "fp8").T).bfloat16().float(),
    }
    told = {name: (both[:, 0] - both[:, 1]).numpy().astype(np.float64) for name, both in ((n, h()) for n, h in heads.items())}
    _, code = np.unique(group, return_inverse=True)
    fitted = code % 2 == 0
    first = fit(told["float32"][fitted], label[fitted])
    found = []
    for name, score in told.items():
        own = fit(score[fitted], label[fitted])
        said = [one.probabilities(score[~fitted]).astype(np.float64) for one in (first, own)]
        errors = [debiased_calibration_error(label[~fitted].astype(np.float64), each) for each in said]
        row = HeadRow(name, len(np.unique(score)), _tied(score, code), auc(label.astype(np.float64), score), *errors)
        found.append(row)
    return found


def _tied(score: npt.NDArray[np.float64], code: npt.NDArray[np.integer]) -> float:
    """The share of pairs inside groups [n] that have one score."""
    sizes = np.bincount(code)
    _, counts = np.unique(np.stack([code, score]), axis=1, return_counts=True)
    pairs = (sizes * (sizes - 1) / 2).sum()
    return float((counts * (counts - 1) / 2).sum() / pairs) if pairs else 0.0
