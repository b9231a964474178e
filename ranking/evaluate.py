"""How good probabilities of a label are: order (AUC, NDCG), calibration (log loss, ECE), and how sure each number is.

Rows are the labelled events of the test split. Legend: E rows, R bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from index.errors import BrewlineError
from retrieval.data.schema import TEST, Dataset, Events
from retrieval.evidence.intervals import Estimate, interval, resample_weights

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

RESAMPLES = 500
BINS = 15
SHORT_LIST = 10
_LEAST = 1e-7
_WEIGHTS_AT_ONCE = 1 << 23


class RankingEvidenceError(BrewlineError):
    """A ranking evaluation cannot be done, or the scores handed to it cannot be judged."""


@dataclass(frozen=True)
class Rows:
    """E labelled events to judge: `event` positions in the log, `label` float64 0 or 1, member, item, request (-1 none),
    `event_id`, and whether the member or the item had no event before the cut."""

    event: npt.NDArray[np.int64]
    event_id: npt.NDArray[np.int64]
    label: Floats
    member: npt.NDArray[np.int32]
    item: npt.NDArray[np.int32]
    request: npt.NDArray[np.int32]
    cold_member: Bools
    cold_item: Bools

    def __len__(self) -> int:
        return len(self.event)


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
    """Returns the labelled events of the test split. Raises RankingEvidenceError if there are none or of one kind only."""
    log = dataset.events
    event = np.flatnonzero((log.split == TEST) & (log.label >= 0))
    label = log.label[event].astype(np.float64)
    if not len(event) or label.min() == label.max():
        raise RankingEvidenceError(
            f"{dataset.meta.name} has {len(event)} labelled test events, {int(label.sum())} of them positive; ranking can only "
            "be judged where both labels occur. Give the events labels, or move the test cut."
        )
    return rows_of(log, event, dataset.meta.cut_test, len(dataset.members), len(dataset.items))


def rows_of(log: Events, event: Ints, cut: int, members: int, items: int) -> Rows:
    """Returns the events at the given positions as rows to judge."""
    known = log.timestamp < cut
    cold_member = np.bincount(log.member[known], minlength=members) == 0
    cold_item = np.bincount(log.item[known], minlength=items) == 0
    return Rows(
        event=np.asarray(event, np.int64),
        event_id=log.event_id[event],
        label=log.label[event].astype(np.float64),
        member=log.member[event],
        item=log.item[event],
        request=log.request[event],
        cold_member=cold_member[log.member[event]],
        cold_item=cold_item[log.item[event]],
    )


def auc(label: Floats, score: Floats) -> float:
    """Returns the exact area under the ROC curve, ties counted half; NaN if only one label occurs."""
    positive = label > 0.5
    good, bad = int(positive.sum()), int((~positive).sum())
    if not good or not bad:
        return float("nan")
    return float((rankdata(score)[positive].sum() - good * (good + 1) / 2) / (good * bad))


def member_aucs(label: Floats, score: Floats, member: Ints) -> tuple[Floats, Floats]:
    """Returns the AUC within each member who has both labels, and how many rows each of them has."""
    _, code = np.unique(member, return_inverse=True)
    rank = _ranks_within(code, score)
    good = np.bincount(code, label)
    total = np.bincount(code).astype(np.float64)
    both = (good > 0) & (good < total)
    ranks = np.bincount(code, rank * label)[both]
    good, total = good[both], total[both]
    return (ranks - good * (good + 1) / 2) / (good * (total - good)), total


def _ranks_within(code: Ints, score: Floats) -> Floats:
    """1-based average rank of each score inside its group."""
    distinct = rankdata(score, method="dense") - 1
    overall = rankdata(code * (int(distinct.max()) + 1) + distinct)
    before = np.concatenate([[0], np.cumsum(np.bincount(code))])[code]
    return np.asarray(overall - before, np.float64)


def log_loss(label: Floats, probability: Floats) -> float:
    """Returns the mean negative log-likelihood in nats, probabilities kept 1e-7 away from 0 and 1."""
    sure = np.clip(probability, _LEAST, 1 - _LEAST)
    return float(-(label * np.log(sure) + (1 - label) * np.log1p(-sure)).mean())


def normalized_entropy(label: Floats, probability: Floats) -> float:
    """Returns the log loss divided by that of always saying the base rate of these rows (He et al. 2014)."""
    return log_loss(label, probability) / log_loss(label, np.full(len(label), label.mean()))


def calibration_error(label: Floats, probability: Floats, bins: int = BINS) -> float:
    """Returns the expected calibration error over bins of equal mass."""
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    gaps = [abs(probability[part].mean() - label[part].mean()) * len(part) for part in parts]
    return float(sum(gaps) / len(order))


def request_ndcg(rows: Rows, score: Floats, depth: int = SHORT_LIST) -> float:
    """Returns mean NDCG over the requests that hold a positive; NaN where no row names a request.

    Equal scores inside a request stand in one fixed random order: the order shown must not leak into the score.
    """
    known = np.flatnonzero(rows.request >= 0)
    if not len(known):
        return float("nan")
    chance = np.random.default_rng(0).permutation(len(rows))
    order = known[np.lexsort((chance[known], -score[known], rows.request[known]))]
    _, first, code = np.unique(rows.request[order], return_index=True, return_inverse=True)
    place = np.arange(len(order)) - first[code]
    discount = np.where(place < depth, 1 / np.log2(place + 2.0), 0)
    gained = np.bincount(code, rows.label[order] * discount)
    positives = np.bincount(code, rows.label[order]).astype(int)
    ideal = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(depth) + 2.0))])[np.minimum(positives, depth)]
    return float((gained[positives > 0] / ideal[positives > 0]).mean()) if (positives > 0).any() else float("nan")


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
        f"request_ndcg@{SHORT_LIST}": request_ndcg(rows, score),
    }
    error = float(seen.std(ddof=1)) if len(seen) > 1 else float("nan")
    return Judged(metrics, Estimate(value, error, low, high), slices_of(rows, score), samples)


def slices_of(rows: Rows, score: Floats) -> dict[str, dict[str, float]]:
    """Returns AUC and log loss for rows of cold and of known members and items; each slice says its size "n"."""
    masks: Mapping[str, Bools] = {
        "cold members": rows.cold_member,
        "cold items": rows.cold_item,
        "both known": ~rows.cold_member & ~rows.cold_item,
    }
    found: dict[str, dict[str, float]] = {}
    for name, mask in masks.items():
        found[name] = {"n": int(mask.sum())}
        if mask.any():
            found[name] |= {"auc": auc(rows.label[mask], score[mask]), "log_loss": log_loss(rows.label[mask], score[mask])}
    return found


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
    samples = ours.samples - theirs.samples
    samples = samples[np.isfinite(samples)]
    low, high = interval(samples) if len(samples) else (np.nan, np.nan)
    error = float(samples.std(ddof=1)) if len(samples) > 1 else float("nan")
    return Estimate(ours.auc.value - theirs.auc.value, error, low, high)
