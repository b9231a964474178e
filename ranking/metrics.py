"""Metrics of probabilities against labels 0 and 1: order (AUC, NDCG) and calibration (log loss, entropy, ECE). Legend: E rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]

BINS = 15
_LEAST = 1e-7


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
    said, happened, size = reliability(label, probability, bins)
    return float((np.abs(said - happened) * size).sum() / size.sum())


def debiased_calibration_error(label: Floats, probability: Floats, bins: int = BINS) -> float:
    """Returns the calibration error less what chance adds to it: a finite bin differs from its mean even if all is well.

    The expected absolute value of a gap with normal noise has a closed form (folded normal); its excess over the gap is taken
    off (Kumar et al., arXiv 1909.10155, who draw the noise instead). At least 0.
    """
    said, happened, size = reliability(label, probability, bins)
    gap, noise = np.abs(said - happened), np.sqrt(np.maximum(happened * (1 - happened), 1e-12) / size)
    folded = noise * np.sqrt(2 / np.pi) * np.exp(-((gap / noise) ** 2) / 2) + gap * (1 - 2 * norm.cdf(-gap / noise))
    return max(0.0, float(((2 * gap - folded) * size).sum() / size.sum()))


def reliability(label: Floats, probability: Floats, bins: int = BINS) -> tuple[Floats, Floats, Floats]:
    """Returns mean prediction, share of positives and number of rows of each bin of equal mass, rising."""
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return (
        np.array([probability[part].mean() for part in parts]),
        np.array([label[part].mean() for part in parts]),
        np.array([len(part) for part in parts], np.float64),
    )


def ndcg_within(group: Ints, label: Floats, score: Floats, depth: int) -> float:
    """Returns mean NDCG over the groups [E] (-1: none) that hold a positive; NaN if there is none.

    Equal scores inside a group stand in one fixed random order: the order shown must not leak into the score.
    """
    known = np.flatnonzero(group >= 0)
    if not len(known):
        return float("nan")
    chance = np.random.default_rng(0).permutation(len(group))
    order = known[np.lexsort((chance[known], -score[known], group[known]))]
    _, first, code = np.unique(group[order], return_index=True, return_inverse=True)
    place = np.arange(len(order)) - first[code]
    discount = np.where(place < depth, 1 / np.log2(place + 2.0), 0)
    gained = np.bincount(code, label[order] * discount)
    positives = np.bincount(code, label[order]).astype(int)
    ideal = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(depth) + 2.0))])[np.minimum(positives, depth)]
    return float((gained[positives > 0] / ideal[positives > 0]).mean()) if (positives > 0).any() else float("nan")
