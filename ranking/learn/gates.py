"""Whether a smaller model may take its parent's place: what it loses on held-out groups, how sure that is, and what is allowed.

Order (AUC, within-member AUC, NDCG, Kendall's tau, overlap of the first k) is judged on raw scores. Normalized entropy and
calibration error are judged on probabilities of calibrators that were fitted on the other half of the members, for parent and
child alike, so that neither is judged on what it was fitted on. Intervals are bootstraps over members, the same members for both.

Legend: n candidates, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict
from scipy.stats import kendalltau

from ranking.calibrate import Method, fit
from ranking.metrics import auc, debiased_calibration_error, member_aucs, ndcg_within, normalized_entropy
from retrieval.evidence.intervals import estimate, interval, resample_weights

RESAMPLES = 300
SHORT_LIST = 10

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]
Metric = Callable[[Floats, Floats, Floats, Ints], float]
"""(labels, raw scores, probabilities, members), [n] each, to one number."""


@dataclass(frozen=True)
class Gates:
    """What a step may cost; None: measured, nothing demanded.

    `auc`, `gauc`, `ndcg`: the most that may be lost, as a share of the parent's; `ne`: the most that may be added, as a share;
    `ece`: the most that may be added; `overlap` of the first ten of a member and `kendall`: the least. With `judged_by` "bound"
    the worse end of the 95 % interval must hold, with "value" the measured value, with "better_bound" the better end: such a
    gate stops only what surely broke, for answers too few to tell a loss from noise.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    auc: float | None = 0.005
    gauc: float | None = 0.01
    ndcg: float | None = 0.01
    ne: float | None = 0.01
    ece: float | None = 0.01
    overlap: float | None = None
    kendall: float | None = None
    judged_by: Literal["bound", "value", "better_bound"] = "bound"


@dataclass(frozen=True)
class Measure:
    """One metric of parent and child, and what was lost (of "overlap" and "kendall": what is kept) with its 95 % interval."""

    parent: float
    child: float
    lost: float
    low: float
    high: float


@dataclass(frozen=True)
class Check:
    """One line of a gate's table. `limit` None: nothing was demanded."""

    metric: str
    measure: Measure
    limit: float | None
    passed: bool

    def facts(self) -> dict[str, object]:
        """The line ready for JSON."""
        return {"metric": self.metric, **asdict(self.measure), "limit": self.limit, "passed": self.passed}


def _ndcgs(label: Floats, raw: Floats, code: Ints) -> Floats:
    """NDCG of each member [M] who has both labels, NaN for the others."""
    parts = _parts(code)
    both = [0 < label[part].sum() < len(part) for part in parts]
    zeros = np.zeros(len(label), np.int64)
    found = [ndcg_within(zeros[part], label[part], raw[part], SHORT_LIST) if ok else np.nan for part, ok in zip(parts, both)]
    return np.array(found)


def _gauc(label: Floats, raw: Floats, _probability: Floats, code: Ints) -> float:
    within, weight = member_aucs(label, raw, code)
    return float(np.average(within, weights=weight)) if len(within) else float("nan")


def _ndcg(label: Floats, raw: Floats, _probability: Floats, code: Ints) -> float:
    found = _ndcgs(label, raw, code)
    known = found[np.isfinite(found)]
    return float(known.mean()) if len(known) else float("nan")


METRICS: Mapping[str, Metric] = {
    "auc": lambda label, raw, _probability, _code: auc(label, raw),
    "gauc": _gauc,
    "ndcg": _ndcg,
    "ne": lambda label, _raw, probability, _code: normalized_entropy(label, probability),
    "ece": lambda label, _raw, probability, _code: debiased_calibration_error(label, probability),
}
HIGHER_IS_BETTER = frozenset(("auc", "gauc", "ndcg"))
BY_ROWS = ("auc", "ece")
"""Metrics that have to be computed again on the rows of each resample; the others are ratios of sums over members."""
KEPT = frozenset(("overlap", "kendall"))


def measure(
    label: Ints,
    member: Ints,
    parent: npt.NDArray[np.floating],
    child: npt.NDArray[np.floating],
    method: Method = "platt",
    resamples: int = RESAMPLES,
) -> dict[str, Measure]:
    """What a child loses against its parent, by metric; raw scores, labels (1 or 0) and members of the same candidates [n]."""
    truth = np.asarray(label, np.float64)
    _, code = np.unique(member, return_inverse=True)
    raw = [np.asarray(score, np.float64) for score in (parent, child)]
    said = [crossed(score, label, code, method) for score in raw]
    values = [{name: metric(truth, one, p, code) for name, metric in METRICS.items()} for one, p in zip(raw, said)]
    drawn: dict[str, list[float]] = {name: [] for name in BY_ROWS}
    for rows in resamples_of(code, truth, resamples):
        for name in BY_ROWS:
            again = [METRICS[name](truth[rows], one[rows], p[rows], code[rows]) for one, p in zip(raw, said)]
            drawn[name].append(_lost(name, again[0], again[1]))
    samples = {name: np.array(each) for name, each in drawn.items()} | _by_members(truth, raw, said, code, resamples)
    found = {}
    for name in METRICS:
        seen = samples[name][np.isfinite(samples[name])]
        low, high = interval(seen) if len(seen) else (np.nan, np.nan)
        found[name] = Measure(values[0][name], values[1][name], _lost(name, values[0][name], values[1][name]), low, high)
    return {**found, **_agreement(raw[0], raw[1], code)}


def _by_members(truth: Floats, raw: list[Floats], said: list[Floats], code: Ints, resamples: int) -> dict[str, Floats]:
    """Losses [R] of the metrics that are ratios of sums over members. The base rate's entropy cancels in that of two NEs."""
    good, total = np.bincount(code, truth), np.bincount(code).astype(np.float64)
    both = (good > 0) & (good < total)
    sums: dict[str, list[Floats]] = {"gauc": [], "ndcg": [], "ne": []}
    for score, probability in zip(raw, said):
        within = np.zeros(len(total))
        aucs, weight = member_aucs(truth, score, code)
        within[both] = aucs * weight
        sums["gauc"].append(within)
        sums["ndcg"].append(np.nan_to_num(_ndcgs(truth, score, code)))
        sure = np.clip(probability, 1e-7, 1 - 1e-7)
        sums["ne"].append(np.bincount(code, -(truth * np.log(sure) + (1 - truth) * np.log1p(-sure))).astype(np.float64))
    weights = resample_weights(np.random.default_rng(0), len(total), resamples)
    found = {}
    for name, (parent, child) in sums.items():
        whole, smaller = weights @ parent, weights @ child
        gap = whole - smaller if name in HIGHER_IS_BETTER else smaller - whole
        found[name] = np.divide(gap, whole, out=np.full(resamples, np.nan), where=whole > 0)
    return found


def _lost(name: str, parent: float, child: float) -> float:
    """What is lost or added: a share of the parent's value (NaN of 0), of the calibration error the difference."""
    if name == "ece":
        return child - parent
    return (parent - child if name in HIGHER_IS_BETTER else child - parent) / parent if parent else float("nan")


def crossed(raw: Floats, label: Ints, member: Ints, method: Method) -> Floats:
    """Probabilities [n], each from a calibrator fitted on the other half of the members."""
    half = member % 2 == 0
    found = np.empty(len(raw))
    for part in (half, ~half):
        if part.any():
            found[part] = fit(raw[~part], label[~part], method).probabilities(raw[part])
    return found


def resamples_of(code: Ints, label: Floats, resamples: int) -> Iterator[Ints]:
    """The rows of members drawn with replacement, the same draws for everybody; draws with one label only are left out."""
    rng, members = np.random.default_rng(0), int(code.max()) + 1
    for _ in range(resamples):
        rows = np.repeat(np.arange(len(code)), np.bincount(rng.integers(0, members, members), minlength=members)[code])
        if 0 < label[rows].sum() < len(rows):
            yield rows


def _parts(code: Ints) -> list[npt.NDArray[np.int64]]:
    """The rows of each member."""
    return np.split(np.argsort(code, kind="stable"), np.cumsum(np.bincount(code))[:-1])


def _agreement(parent: Floats, child: Floats, code: Ints) -> dict[str, Measure]:
    """Kendall's tau-b, and the share of the parent's first ones that the child has too, as means over members.

    A member counts with two candidates or more that the parent tells apart; the first are ten, or half of a shorter list.
    """
    rows = [part for part in _parts(code) if len(np.unique(parent[part])) > 1]
    tau = [float(kendalltau(parent[part], child[part]).statistic) for part in rows]
    kept = []
    for part in rows:
        first = min(SHORT_LIST, len(part) // 2)
        tops = [set(np.argsort(-score[part], kind="stable")[:first].tolist()) for score in (parent, child)]
        kept.append(len(tops[0] & tops[1]) / first)
    found = {}
    for name, values in (("overlap", np.array(kept)), ("kendall", np.nan_to_num(np.array(tau)))):
        seen = estimate(values)
        value, low, high = (round(number, 9) for number in (seen.value, seen.low, seen.high))  # a mean of ones is 1
        found[name] = Measure(1.0, value, value, low, high)
    return found


def judge(measured: Mapping[str, Measure], gates: Gates) -> list[Check]:
    """One check for each metric; a metric that could not be measured fails if anything is demanded of it."""
    limits = asdict(gates)
    return [_check(name, one, limits[name], gates.judged_by) for name, one in measured.items()]


def _check(name: str, one: Measure, limit: float | None, judged_by: str) -> Check:
    if limit is None:
        return Check(name, one, None, True)
    if name in KEPT:
        least = {"bound": one.low, "value": one.lost, "better_bound": one.high}[judged_by]
        return Check(name, one, limit, least >= limit)
    most = {"bound": one.high, "value": one.lost, "better_bound": one.low}[judged_by]
    return Check(name, one, limit, most <= limit)
