"""A quantized engine serves only after it has been held against its original on real requests, and the numbers are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt

from index.durable import write_durably
from ranking.prefill.engine import Engine
from ranking.prefill.errors import LabelError
from ranking.prefill.onnx_engine import OnnxEngine
from ranking.prefill.onnx_folder import FACTS, LEAST_ITEMS, GateRecord, NotAdmitted, refusal
from ranking.prefill.onnx_graphs import weights_revision
from ranking.prefill.request import Request

Floats = npt.NDArray[np.floating]


def quality_gate(
    reference: Engine,
    candidate: OnnxEngine,
    requests: Sequence[Request],
    *,
    pairs: Sequence[tuple[int, int]] = ((0, 1),),
    top: int = 10,
    min_kendall: float = 0.98,
    min_overlap: float = 0.9,
    max_apart: float = 0.05,
) -> GateRecord:
    """The candidate ranks as the reference does; the record, passed or not, is in the candidate's engine.json after the call.

    `reference` is the torch engine of the weights that were exported. `pairs` are the columns of (positive, negative) labels;
    items are ranked by the difference of their logits, and its sigmoid is the probability. Kendall's tau is over the pairs of
    items that the reference tells apart (1 = the same order), the overlap is the share of its first `top` that the candidate
    also has there. A request counts if the reference gives its items at least 2 * `top` different scores; where that leaves
    fewer than LEAST_ITEMS items, a smaller top is taken and recorded. The floors of `ranking.prefill.onnx_folder` hold whatever
    the bounds.
    Raises NotAdmitted if a bound is broken or too little is left to compare, LabelError if the labels do not fit.
    """
    revision = _check(reference, candidate, pairs)
    asked = list({(tuple(one.prefix), *map(tuple, one.items)): one for one in requests}.values())  # said twice, it counts once
    scores = list(zip(reference.score(asked), candidate.score(asked)))
    ranked = [[(left[:, yes] - left[:, no], right[:, yes] - right[:, no]) for left, right in scores] for yes, no in pairs]
    told = [[len(np.unique(left)) for left, _ in one] for one in ranked]
    used = min(_largest_top(sizes, top) for sizes in told)
    if used < 1:
        raise NotAdmitted(
            f"the gate needs {LEAST_ITEMS} items to which the reference gives different scores, in different requests of two or "
            f"more, and a top of at least 1; seen for each pair of labels: {[sum(sizes) for sizes in told]}, top {top}"
        )
    worst = np.array([_measured(one, sizes, used) for one, sizes in zip(ranked, told)])
    requests_used, items, kendall, overlap = worst[:, :4].min(0).tolist()
    record = GateRecord(
        files=candidate.facts.files,
        revision=revision,
        requests=int(requests_used),
        items=int(items),
        top=used,
        kendall=kendall,
        overlap=overlap,
        apart=float(worst[:, 4].max()),
        min_kendall=float(min_kendall),
        min_overlap=float(min_overlap),
        max_apart=float(max_apart),
    )
    facts = replace(candidate.facts, gate=record)
    write_durably(candidate.folder / FACTS, (json.dumps(asdict(facts), indent=1) + "\n").encode())
    if why := refusal(facts):
        raise NotAdmitted(f"{candidate.folder} is not admitted: {why}")
    return record


def _check(reference: Engine, candidate: OnnxEngine, pairs: Sequence[tuple[int, int]]) -> str:
    """The revision of the weights that reference and candidate share. Raises NotAdmitted and LabelError."""
    if not isinstance(reference, Engine):
        raise NotAdmitted(f"the reference is a {type(reference).__name__}; give the torch engine of the exported weights")
    revision, exported = weights_revision(reference.model), candidate.facts.revision
    if revision != exported:
        raise NotAdmitted(f"the reference holds the weights {revision}, {candidate.folder} was exported from {exported}")
    if reference.label_ids != candidate.label_ids:
        raise LabelError(f"the reference reads the labels {reference.label_ids}, the candidate {candidate.label_ids}")
    if not pairs or not all(0 <= column < len(candidate.label_ids) for pair in pairs for column in pair):
        raise LabelError(f"the pairs {list(pairs)} do not name columns of {len(candidate.label_ids)} labels")
    return revision


def _largest_top(told: Sequence[int], most: int) -> int:
    """The largest top whose requests hold enough items that are told apart; 0 if there is none."""
    tops = range(most, 0, -1)
    return next((top for top in tops if sum(count for count in told if count >= 2 * top) >= LEAST_ITEMS), 0)


def _measured(ranked: Sequence[tuple[Floats, Floats]], told: Sequence[int], top: int) -> tuple[float, ...]:
    """Requests, items told apart, mean tau, mean overlap and largest difference of a probability for one pair of labels."""
    counted = [(pair, count) for pair, count in zip(ranked, told) if count >= 2 * top]
    found = np.array([_compare(*pair, top) for pair, _ in counted])
    kendall, overlap = found[:, :2].mean(0).tolist()
    return len(counted), sum(count for _, count in counted), kendall, overlap, float(found[:, 2].max())


def _compare(reference: Floats, candidate: Floats, top: int) -> tuple[float, float, float]:
    """Kendall's tau, overlap of the first `top`, largest difference of a probability; scores [N] each, not all tied."""
    order, other = (np.sign(scores[:, None] - scores) for scores in (reference, candidate))
    kendall = float((order * other).sum(dtype=np.float64) / np.count_nonzero(order))
    first, also = (set(np.argsort(-scores, kind="stable")[:top].tolist()) for scores in (reference, candidate))
    left, right = (np.exp(-np.logaddexp(0, -scores.astype(np.float64))) for scores in (reference, candidate))
    return kendall, len(first & also) / top, float(np.abs(left - right).max())
