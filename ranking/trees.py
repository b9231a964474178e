"""Small gradient boosting whose model is four arrays: every tree asks the same question of all rows at one depth.

Such symmetric trees (as in CatBoost, arXiv 1706.09516) need no pointers: a row's leaf is the number that its D answers
spell, so scoring is a few numpy calls without any library, and a prediction splits exactly into one share per feature.
Unknown (NaN) answers "no" everywhere, so it counts as less than every number. Legend: n rows, F features, T trees, D depth,
B bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError

Floats = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32]

_ROWS_AT_ONCE = 4096


class TreesError(BrewlineError):
    """Stored trees cannot be read."""


@dataclass(frozen=True)
class Boosting:
    """How trees are grown. `rows` and `columns` are the shares that each tree sees; `prior` is the L2 penalty of a leaf."""

    trees: int = 300
    depth: int = 4
    rate: float = 0.08
    bins: int = 48
    rows: float = 0.5
    columns: float = 0.6
    prior: float = 20.0
    most: int = 80_000


@dataclass(frozen=True)
class Trees:
    """logit = base + sum of one leaf per tree. `feature` int64 [T, D], `threshold` float32 [T, D] (answer: value > threshold),
    `leaf` and `weight` float64 [T, 2^D]: its logit and the share of training rows that fell there."""

    base: float
    feature: npt.NDArray[np.int64]
    threshold: Features
    leaf: Floats
    weight: Floats

    def logits(self, rows: Features) -> Floats:
        """Returns float64 [n] for rows float32 [n, F]."""
        parts = [self.leaf[np.arange(len(self.leaf)), self._places(part)].sum(1) for part in _chunks(rows)]
        return self.base + np.concatenate([np.zeros(0), *parts])

    def shares(self, rows: Features) -> Floats:
        """Returns float64 [n, F]: what each feature adds to the logit; a row's shares sum to its logit minus the expectation.

        On the way down a tree, each answer moves the expected leaf; the move belongs to the feature that was asked.
        """
        found = np.zeros(rows.shape)
        depth = self.feature.shape[1]
        tree = np.arange(len(self.leaf))
        expected = [_expected(self.leaf, self.weight, level) for level in range(depth + 1)]
        places = np.concatenate([np.zeros((0, len(tree)), np.int64), *[self._places(part) for part in _chunks(rows)]])
        for level in range(depth):
            below = expected[level + 1][tree, places >> (depth - level - 1)]
            moved = below - expected[level][tree, places >> (depth - level)]
            for column in np.unique(self.feature[:, level]):
                found[:, column] += moved[:, self.feature[:, level] == column].sum(1)
        return found

    @classmethod
    def nothing(cls, share: float) -> Trees:
        """No trees: every row gets the logit of one share."""
        none = np.zeros((0, 1))
        return cls(
            float(np.log(share / (1 - share))), none.astype(int), none.astype(np.float32), np.zeros((0, 2)), np.zeros((0, 2))
        )

    @property
    def expectation(self) -> float:
        """The mean logit over the training rows."""
        return self.base + float(_expected(self.leaf, self.weight, 0).sum())

    def _places(self, rows: Features) -> npt.NDArray[np.int64]:
        place = np.zeros((len(rows), len(self.leaf)), np.int64)
        for level in range(self.feature.shape[1]):
            place = 2 * place + (rows[:, self.feature[:, level]] > self.threshold[:, level])
        return place

    def facts(self) -> dict[str, object]:
        """The trees as JSON can hold them, every number exactly."""
        arrays = {name: getattr(self, name).tolist() for name in ("feature", "threshold", "leaf", "weight")}
        return {"base": self.base, **arrays}

    @classmethod
    def from_facts(cls, facts: Mapping[str, object], features: int) -> Trees:
        """The trees that `facts` described, over so many features. Raises TreesError."""
        try:
            found = cls(
                float(str(facts["base"])),
                np.asarray(facts["feature"], np.int64),
                np.asarray(facts["threshold"], np.float32),
                np.asarray(facts["leaf"], np.float64),
                np.asarray(facts["weight"], np.float64),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TreesError(f"trees need base, feature, threshold, leaf and weight as numbers ({error})") from error
        shape = found.feature.shape
        leaves = (shape[0], 2 ** shape[1]) if len(shape) == 2 and shape[1] < 12 else None
        if leaves is None or found.threshold.shape != shape or found.leaf.shape != leaves or found.weight.shape != leaves:
            raise TreesError(f"trees of shape {shape} do not fit their thresholds, leaves or weights; train the head again")
        known = ((found.feature >= 0) & (found.feature < features)).all()
        finite = np.isfinite(found.leaf).all() and np.isfinite(found.weight).all() and np.isfinite(found.base)
        if not (known and finite and (found.weight >= 0).all() and not np.isnan(found.threshold).any()):
            raise TreesError(f"trees ask for features outside 0..{features - 1} or hold numbers that are not finite")
        return found


def _chunks(rows: Features) -> list[Features]:
    return [rows[begin : begin + _ROWS_AT_ONCE] for begin in range(0, len(rows), _ROWS_AT_ONCE)]


def _expected(leaf: Floats, weight: Floats, level: int) -> Floats:
    """Float64 [T, 2^level]: the mean leaf below each node of a level; 0 where no training row came."""
    shape = (len(leaf), 2**level, -1)
    mass = weight.reshape(shape).sum(2)
    return np.divide((leaf * weight).reshape(shape).sum(2), mass, out=np.zeros_like(mass), where=mass > 0)


def grow(rows: Features, label: Floats, settings: Boosting, seed: int = 0, weight: Floats | None = None) -> Trees:
    """Returns trees fitted to labels (1 or 0) [n] of rows [n, F] by log loss; the same input and seed give the same trees."""
    rng = np.random.default_rng([seed, 11])
    heavy = np.ones(len(label)) if weight is None else weight
    edges = [_edges(column, settings.bins) for column in rows.T]
    questions = [len(edge) for edge in edges]
    codes = np.stack([_code(column, edge) for column, edge in zip(rows.T, edges)], 1)
    share = float(np.clip((heavy * label).sum() / heavy.sum(), 1e-3, 1 - 1e-3))
    base = float(np.log(share / (1 - share)))
    usable = np.flatnonzero(questions)
    logit, grown = np.full(len(label), base), []
    for _ in range(settings.trees if len(usable) else 0):
        p = 1 / (1 + np.exp(-logit))
        gradient, curvature = heavy * (label - p), heavy * p * (1 - p)
        seen = np.sort(rng.choice(len(label), max(1, round(settings.rows * len(label))), replace=False))
        drawn = rng.choice(usable, max(1, round(settings.columns * len(usable))), replace=False)
        columns = {int(column): questions[column] for column in np.sort(drawn)}
        asked = _ask(codes[seen], gradient[seen], curvature[seen], columns, settings)
        place = np.zeros(len(label), np.int64)
        for column, code in asked:
            place = 2 * place + (codes[:, column] > code)
        size = 2**settings.depth
        up, down = np.bincount(place, gradient, size), np.bincount(place, curvature, size)
        leaf = settings.rate * up / (down + settings.prior)
        logit += leaf[place]
        grown.append((asked, leaf, np.bincount(place, heavy, size) / heavy.sum()))
    shape, leaves = (len(grown), settings.depth), (len(grown), 2**settings.depth)
    return Trees(
        base,
        np.array([[column for column, _ in asked] for asked, _, _ in grown], np.int64).reshape(shape),
        np.array([[edges[column][code] for column, code in asked] for asked, _, _ in grown], np.float32).reshape(shape),
        np.array([leaf for _, leaf, _ in grown], np.float64).reshape(leaves),
        np.array([mass for _, _, mass in grown], np.float64).reshape(leaves),
    )


def _edges(column: Features, bins: int) -> Features:
    """Rising thresholds of one feature: between its values if these are few, else at its quantiles; -inf parts unknown off."""
    known = np.unique(column[~np.isnan(column)])
    if len(known) > bins:
        known = np.unique(np.quantile(column[~np.isnan(column)], np.linspace(0, 1, bins + 1), method="lower"))
    between = ((known[:-1].astype(np.float64) + known[1:]) / 2).astype(np.float32)
    lowest = [np.float32(-np.inf)] if len(known) and np.isnan(column).any() else []
    return np.concatenate([np.array(lowest, np.float32), between])


def _code(column: Features, edges: Features) -> npt.NDArray[np.uint8]:
    """Number of thresholds below each value (so `code > k` is `value > edges[k]`); 0 for NaN."""
    found = np.searchsorted(edges, column, side="left")
    return np.where(np.isnan(column), 0, found).astype(np.uint8)


def _ask(
    codes: npt.NDArray[np.uint8], gradient: Floats, curvature: Floats, questions: Mapping[int, int], settings: Boosting
) -> list[tuple[int, int]]:
    """The (feature, threshold) pairs [D] that gain most, each chosen for all nodes of its level together.

    `questions` feature -> how many thresholds it has.
    """
    bins = int(codes.max()) + 1
    place = np.zeros(len(codes), np.int64)
    asked = []
    for level in range(settings.depth):
        best = (-np.inf, 0, 0)
        size = 2**level * bins
        for column, count in questions.items():
            cell = place * bins + codes[:, column]
            up = np.cumsum(np.bincount(cell, gradient, size).reshape(-1, bins), 1)
            down = np.cumsum(np.bincount(cell, curvature, size).reshape(-1, bins), 1)
            low = up**2 / (down + settings.prior)
            high = (up[:, -1:] - up) ** 2 / (down[:, -1:] - down + settings.prior)
            gain = (low + high).sum(0)[:count]
            if gain.max() > best[0]:
                best = (float(gain.max()), column, int(gain.argmax()))
        asked.append(best[1:])
        place = 2 * place + (codes[:, best[1]] > best[2])
    return asked
