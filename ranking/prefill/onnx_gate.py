"""A quantized engine serves only after it has been held against its original on real requests, and the numbers are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from index.durable import write_durably
from ranking.prefill.errors import LabelError
from ranking.prefill.onnx_engine import FACTS, NotAdmitted, OnnxEngine
from ranking.prefill.plan import Request

Floats = npt.NDArray[np.floating]


class Scores(Protocol):
    """What the gate asks of the original."""

    @property
    def label_ids(self) -> tuple[int, ...]:
        """The token ids of the logits' columns."""

    def score(self, requests: Sequence[Request]) -> list[npt.NDArray[np.float32]]:
        """Logits float32 [N, labels] for each request."""


@dataclass(frozen=True)
class GateReport:
    """`kendall` and `overlap` are means over requests and pairs of labels, `apart` is the largest difference of a probability;
    the `max_` and `min_` fields are what was demanded."""

    passed: bool
    requests: int
    items: int
    kendall: float
    overlap: float
    apart: float
    top: int
    max_kendall_drop: float
    min_overlap: float
    max_apart: float


def quality_gate(
    reference: Scores,
    candidate: OnnxEngine,
    requests: Sequence[Request],
    *,
    pairs: Sequence[tuple[int, int]] = ((0, 1),),
    max_kendall_drop: float = 0.02,
    top: int = 10,
    min_overlap: float = 0.9,
    max_apart: float = 0.05,
) -> GateReport:
    """The candidate ranks as the reference does; the report, passed or not, is in the candidate's engine.json after the call.

    `pairs` are the columns of (positive, negative) labels; items are ranked by the difference of their logits, and its sigmoid is
    the probability. `kendall` is Kendall's tau over the pairs of items that the reference tells apart (1 = the same order),
    `overlap` the share of the reference's first `top` that the candidate also has there. Requests of fewer than two items do not
    count. Raises NotAdmitted if a bound is broken or nothing is left to compare, LabelError if the labels do not fit.
    """
    if tuple(reference.label_ids) != candidate.label_ids:
        raise LabelError(f"the reference reads the labels {reference.label_ids}, the candidate {candidate.label_ids}")
    if not pairs or not all(0 <= column < len(candidate.label_ids) for pair in pairs for column in pair):
        raise LabelError(f"the pairs {list(pairs)} do not name columns of {len(candidate.label_ids)} labels")
    asked = [request for request in requests if len(request.items) > 1]
    if not asked:
        raise NotAdmitted("the gate needs a request with at least two items to compare two rankings")
    found = [
        _compare(left[:, yes] - left[:, no], right[:, yes] - right[:, no], top)
        for left, right in zip(reference.score(asked), candidate.score(asked))
        for yes, no in pairs
    ]
    kendall, overlap = np.mean([one[:2] for one in found], 0).tolist()
    apart = float(np.max([one[2] for one in found]))
    passed = kendall >= 1 - max_kendall_drop and overlap >= min_overlap and apart <= max_apart  # NaN passes none of them
    items = sum(len(request.items) for request in asked)
    report = GateReport(passed, len(asked), items, kendall, overlap, apart, top, max_kendall_drop, min_overlap, max_apart)
    facts = replace(candidate.facts, gate=asdict(report))
    write_durably(candidate.folder / FACTS, (json.dumps(asdict(facts), indent=1) + "\n").encode())
    if not passed:
        raise NotAdmitted(
            f"{candidate.folder} is not admitted: Kendall's tau is {kendall:.4f} (at least {1 - max_kendall_drop:.4f}), "
            f"the overlap of the first {top} is {overlap:.4f} (at least {min_overlap:.4f}), "
            f"a probability is {apart:.4f} off (at most {max_apart:.4f})"
        )
    return report


def _compare(reference: Floats, candidate: Floats, top: int) -> tuple[float, float, float]:
    """Kendall's tau, overlap of the first `top`, largest difference of a probability; scores [N] each."""
    order, other = (np.sign(scores[:, None] - scores) for scores in (reference, candidate))
    told = np.count_nonzero(order)
    kendall = float((order * other).sum() / told) if told else 1.0
    first, also = (set(np.argsort(-scores, kind="stable")[:top].tolist()) for scores in (reference, candidate))
    left, right = (np.exp(-np.logaddexp(0, -scores.astype(np.float64))) for scores in (reference, candidate))
    return kendall, len(first & also) / len(first), float(np.abs(left - right).max())
