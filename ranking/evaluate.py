"""How good probabilities of a label are on the rows of an evaluation, by slice, and how sure each number is.

Rows are the labelled events of the test split. Legend: E rows, R bootstrap samples.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from ranking.metrics import (
    auc,
    calibration_error,
    debiased_calibration_error,
    log_loss,
    member_aucs,
    ndcg_within,
    normalized_entropy,
)
from retrieval.data.schema import TEST, Dataset
from retrieval.evidence.intervals import Estimate, interval, resample_weights

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

RESAMPLES = 500
SHORT_LIST = 10
OF_PROBABILITIES = {
    "log_loss",
    "normalized_entropy",
    "calibration_error",
    "calibration_error_debiased",
    "predicted_over_actual",
    "mean_prediction",
}
"""Metrics that depend on more than the order of the rows."""
HISTORIES = (0, 1, 5, 20)
"""Engagements before the one judged at which a slice of members begins."""
WEEK = 7 * 86_400
LAST_WEEK = 4
"""Weeks since the cut from which on all later ones are one slice."""
_WEIGHTS_AT_ONCE = 1 << 23

told = logging.getLogger(__name__)


class RankingEvidenceError(BrewlineError):
    """A ranking evaluation cannot be done, or the scores handed to it cannot be judged."""


@dataclass(frozen=True)
class Rows:
    """E labelled events to judge: `event` positions in the log, `label` float64 0 or 1, member, item, request (-1 none),
    `event_id`, whether the member or the item had no event before the cut, how many engagements the member had strictly before
    this one (`history`), and the whole weeks since the cut."""

    event: npt.NDArray[np.int64]
    event_id: npt.NDArray[np.int64]
    label: Floats
    member: npt.NDArray[np.int32]
    item: npt.NDArray[np.int32]
    request: npt.NDArray[np.int32]
    cold_member: Bools
    cold_item: Bools
    history: npt.NDArray[np.int64]
    week: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.event)

    def take(self, which: Bools) -> Rows:
        """The rows where the mask is true, in order."""
        return Rows(**{name: column[which] for name, column in vars(self).items()})


@dataclass(frozen=True)
class Judged:
    """What one run achieved. `samples` float64 [R]: AUC in each bootstrap sample of members, comparable across runs."""

    metrics: dict[str, float]
    auc: Estimate
    slices: dict[str, dict[str, float]]
    samples: Floats

    def as_dict(self) -> dict[str, object]:
        """Everything but the samples, ready for JSON."""
        return {"metrics": self.metrics, "auc": self.auc.as_dict(), "slices": self.slices}


def labelled_test_rows(dataset: Dataset) -> Rows:
    """Returns the labelled events of the test split, with a warning if some are before the test cut.

    Raises RankingEvidenceError if there are none or of one kind only.
    """
    log = dataset.events
    event = np.flatnonzero((log.split == TEST) & (log.label >= 0))
    label = log.label[event].astype(np.float64)
    if not len(event) or label.min() == label.max():
        missing = f"label {1 - int(label[0])}" if len(event) else "labels"
        raise RankingEvidenceError(
            f"{dataset.meta.name} has {len(event)} labelled test events, {int(label.sum())} of them positive; ranking can only "
            f"be judged where both labels occur. Give events from the test cut on {missing} too, or move the cut."
        )
    if early := int((log.timestamp[event] < dataset.meta.cut_test).sum()):
        told.warning(
            "%s: %s of %s labelled events of the test split are before cut_test, and models learn from everything before it: "
            "they have seen what they are judged on. Make the split column and the cuts agree",
            *(dataset.meta.name, f"{early:,}", f"{len(event):,}"),
        )
    return rows_of(dataset, event)


def rows_of(dataset: Dataset, event: Ints) -> Rows:
    """Returns the events at the given positions as rows to judge."""
    log, cut = dataset.events, dataset.meta.cut_test
    known = log.timestamp < cut
    cold_member = np.bincount(log.member[known], minlength=len(dataset.members)) == 0
    cold_item = np.bincount(log.item[known], minlength=len(dataset.items)) == 0
    return Rows(
        event=np.asarray(event, np.int64),
        event_id=log.event_id[event],
        label=log.label[event].astype(np.float64),
        member=log.member[event],
        item=log.item[event],
        request=log.request[event],
        cold_member=cold_member[log.member[event]],
        cold_item=cold_item[log.item[event]],
        history=engaged_before(dataset, log.member[event], log.timestamp[event]),
        week=(log.timestamp[event] - cut) // WEEK,
    )


def engaged_before(dataset: Dataset, member: Ints, moment: Ints) -> npt.NDArray[np.int64]:
    """Int64 [E]: how many engagements each member had strictly before a moment (seconds), as a history counts them."""
    log = dataset.engagements
    times, back = np.unique(np.concatenate([log.timestamp, moment]), return_inverse=True)
    key = np.concatenate([log.member, member]).astype(np.int64) * len(times)
    done = np.sort((key + back)[: len(log)])
    return np.asarray(np.searchsorted(done, (key + back)[len(log) :]) - np.searchsorted(done, key[len(log) :]), np.int64)


def request_ndcg(rows: Rows, score: Floats, depth: int = SHORT_LIST) -> float:
    """Returns mean NDCG over the requests that hold a positive; NaN where no row names a request."""
    return ndcg_within(rows.request, rows.label, score, depth)


def member_ndcg(rows: Rows, score: Floats, depth: int = SHORT_LIST) -> float:
    """Returns mean NDCG over members who have both labels, all rows of a member as one list; NaN if there is no such member."""
    good = np.bincount(rows.member, rows.label)[rows.member]
    total = np.bincount(rows.member)[rows.member]
    return ndcg_within(np.where((good > 0) & (good < total), rows.member, -1), rows.label, score, depth)


def judge_scores(rows: Rows, probability: Floats, seed: int = 0, resamples: int = RESAMPLES) -> Judged:
    """Returns every metric of one run's probabilities [E]. Raises RankingEvidenceError if they are not probabilities."""
    score = np.asarray(probability, np.float64)
    if score.shape != (len(rows),) or not ((score >= 0) & (score <= 1)).all():
        raise RankingEvidenceError(f"Expected {len(rows)} probabilities, got {score.shape} values or some outside 0..1 or NaN.")
    within, weight = member_aucs(rows.label, score, rows.member)
    samples = auc_samples(rows, score, seed, resamples)
    seen = samples[np.isfinite(samples)]
    low, high = interval(seen) if len(seen) else (np.nan, np.nan)
    value = auc(rows.label, score)
    metrics = {
        "auc": value,
        "member_auc": float(within.mean()) if len(within) else float("nan"),
        "gauc": float(np.average(within, weights=weight)) if len(within) else float("nan"),
        "members_with_both_labels": float(len(within)),
        "log_loss": log_loss(rows.label, score),
        "normalized_entropy": normalized_entropy(rows.label, score),
        "calibration_error": calibration_error(rows.label, score),
        "calibration_error_debiased": debiased_calibration_error(rows.label, score),
        "predicted_over_actual": float(score.sum() / rows.label.sum()),
        f"member_ndcg@{SHORT_LIST}": member_ndcg(rows, score),
        f"request_ndcg@{SHORT_LIST}": request_ndcg(rows, score),
    }
    error = float(seen.std(ddof=1)) if len(seen) > 1 else float("nan")
    return Judged(metrics, Estimate(value, error, low, high), slices_of(rows, score), samples)


def order_alone(judged: Judged) -> Judged:
    """Returns what remains of a run whose numbers are no probabilities: NaN wherever their size would count."""
    metrics = {name: float("nan") if name in OF_PROBABILITIES else value for name, value in judged.metrics.items()}
    slices = {
        name: {metric: float("nan") if metric in OF_PROBABILITIES else value for metric, value in found.items()}
        for name, found in judged.slices.items()
    }
    return replace(judged, metrics=metrics, slices=slices)


def slices_of(rows: Rows, score: Floats) -> dict[str, dict[str, float]]:
    """Returns AUC, log loss and calibration of the rows of each slice (`masks_of`); each says its size "n"."""
    found: dict[str, dict[str, float]] = {}
    for name, mask in masks_of(rows).items():
        found[name] = {"n": int(mask.sum())}
        if mask.any():
            label, said = rows.label[mask], score[mask]
            found[name] |= {"auc": auc(label, said), "log_loss": log_loss(label, said)}
            found[name] |= {"mean_label": float(label.mean()), "mean_prediction": float(said.mean())}
    return found


def masks_of(rows: Rows) -> dict[str, Bools]:
    """Returns the slices bool [E] by name: cold and known members and items, history length, and weeks since the cut (drift)."""
    masks: dict[str, Bools] = {
        "cold members": rows.cold_member,
        "cold items": rows.cold_item,
        "both known": ~rows.cold_member & ~rows.cold_item,
    }
    for low, high in zip(HISTORIES, [*HISTORIES[1:], None]):
        name = f"history {low}+" if high is None else f"history {low}" if high == low + 1 else f"history {low}-{high - 1}"
        masks[name] = (rows.history >= low) & (rows.history < (np.inf if high is None else high))
    for week in np.unique(np.minimum(rows.week, LAST_WEEK)).tolist():
        name = f"week {week + 1}+" if week == LAST_WEEK else f"week {week + 1}"
        masks[name] = np.minimum(rows.week, LAST_WEEK) == week
    return masks


def auc_samples(rows: Rows, score: Floats, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """Returns float64 [R]: AUC in R samples of members with replacement (NaN where a sample has one label only).

    The same seed draws the same members for every run, so differences of two runs' samples are paired.
    """
    _, code = np.unique(rows.member, return_inverse=True)
    order = np.argsort(score, kind="stable")
    label, code = rows.label[order], code[order]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(score[order]) > 0]))
    rng = np.random.default_rng(seed)
    step = max(1, _WEIGHTS_AT_ONCE // len(order))
    parts = [min(step, resamples - begin) for begin in range(0, resamples, step)]
    size = int(code.max()) + 1
    return np.concatenate([_weighted_auc(resample_weights(rng, size, part)[:, code], label, starts) for part in parts])


def _weighted_auc(weights: Floats, label: Floats, starts: Ints) -> Floats:
    """AUC [R] of rows in score order; `starts` where a new score begins."""
    good = np.add.reduceat(weights * label, starts, axis=1)
    bad = np.add.reduceat(weights * (1 - label), starts, axis=1)
    won = (good * (np.cumsum(bad, axis=1) - bad / 2)).sum(axis=1)
    pairs = good.sum(axis=1) * bad.sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)


def auc_difference(ours: Judged, theirs: Judged) -> Estimate:
    """Returns our AUC minus theirs with its paired interval over members; both must come from the same rows and seed."""
    return _lead(ours.auc.value - theirs.auc.value, ours.samples - theirs.samples)


def slice_leads(rows: Rows, ours: Floats, theirs: Floats, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Estimate]:
    """Returns AUC of our scores [E] minus that of theirs in each slice (`masks_of`) with its paired interval over the slice's
    members; slices without both labels are left out."""
    found = {}
    for name, mask in masks_of(rows).items():
        part, one, other = rows.take(mask), ours[mask], theirs[mask]
        if len(part) and 0 < part.label.mean() < 1:
            samples = auc_samples(part, one, seed, resamples) - auc_samples(part, other, seed, resamples)
            found[name] = _lead(auc(part.label, one) - auc(part.label, other), samples)
    return found


def _lead(value: float, samples: Floats) -> Estimate:
    """A difference with the uncertainty of its paired samples [R]; NaN samples had one label only."""
    seen = samples[np.isfinite(samples)]
    low, high = interval(seen) if len(seen) else (np.nan, np.nan)
    error = float(seen.std(ddof=1)) if len(seen) > 1 else float("nan")
    return Estimate(value, error, low, high)
