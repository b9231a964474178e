"""Centres of a set of vectors, and a guess from them where a query's best k lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.hits import Rows, Vectors

ROUNDS = 8
TRAINING_ROWS = 40
"""Rows of the sample per centre."""
SECANTS = 4
"""Steps towards the k-th best score: its error is then far below that of the normal law."""
_ROWS = 2_048
_LEAST = np.float32(1e-30)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Centres:
    """L lists of vectors: centres float32 [L, D], sizes float32 [L], spreads float32 [L] (deviation along one direction)."""

    centres: Vectors
    sizes: Vectors
    spreads: Vectors

    def expected(self, queries: Vectors, k: int) -> Vectors:
        """How many of the best k of each query every list is expected to hold is returned: [Q, L], about k in all.

        Products of a query with a list's vectors are taken as normal around the product with the centre. The k-th best score
        follows from the sum over all lists; the part of a list above it from that.
        """
        products = queries @ self.centres.T
        scale = np.maximum(self.spreads * np.linalg.norm(queries, axis=1)[:, None], np.float32(1e-12))
        wanted = np.float32(np.log(min(k, 0.999 * float(self.sizes.sum()))))

        def above(bars: Vectors) -> Vectors:
            shares: Vectors = self.sizes * upper_tail((bars[:, None] - products) / scale)
            return shares

        step = scale.mean(axis=1)
        low = products.mean(axis=1) + 2 * products.std(axis=1)
        high: Vectors = low + step
        before = np.log(above(low).sum(axis=1) + _LEAST) - wanted
        for _ in range(SECANTS):
            missing = np.log(above(high).sum(axis=1) + _LEAST) - wanted
            slope = np.minimum((missing - before) / np.where(high == low, step, high - low), -0.1 / step)
            low, before = high, missing
            high = (high - np.clip(missing / slope, -4 * step, 4 * step)).astype(np.float32)
        return above(high)


def upper_tail(deviations: Vectors) -> Vectors:
    """The part of a normal distribution above each of them is returned, to a few parts in ten thousand (logistic of a cubic)."""
    z = deviations.clip(-6, 8)
    odds = np.exp(z * (np.float32(1.5976) + np.float32(0.07056) * z * z))
    tail: Vectors = np.reciprocal(1 + odds)
    return tail


def find_centres(vectors: Vectors, lists: int, seed: int, progress: Progress | None = None) -> tuple[Centres, Rows]:
    """Lists by k-means over a sample, and the list of every vector [N], are returned; the same for the same seed."""
    centres = trained(vectors, lists, seed)
    nearest = assign(vectors, centres, progress)
    sizes = np.bincount(nearest, minlength=lists)
    squares = np.zeros(lists)
    for start in range(0, len(vectors), _ROWS):
        here = nearest[start : start + _ROWS]
        apart = np.asarray(vectors[start : start + _ROWS], dtype=np.float32) - centres[here]
        squares += np.bincount(here, np.einsum("nd,nd->n", apart, apart), minlength=lists)
    spreads = np.sqrt(squares / np.maximum(sizes, 1) / vectors.shape[1])
    return Centres(centres, sizes.astype(np.float32), spreads.astype(np.float32)), nearest


def trained(vectors: Vectors, lists: int, seed: int) -> Vectors:
    """Centres float32 [L, D] of k-means over a sample are returned; the same for the same seed."""
    rng = np.random.default_rng(seed)
    count = len(vectors)
    chosen = np.sort(rng.choice(count, min(count, TRAINING_ROWS * lists), replace=False))
    sample = np.asarray(vectors[chosen], dtype=np.float32)
    centres = sample[rng.choice(len(sample), lists, replace=False)]
    for _ in range(ROUNDS):
        centres = _moved(sample, assign(sample, centres), centres, rng)
    return centres


def assign(vectors: Vectors, centres: Vectors, progress: Progress | None = None) -> Rows:
    """The nearest centre of every vector [N] is returned."""
    half = np.einsum("ld,ld->l", centres, centres) / 2
    nearest = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), _ROWS):
        numbers = np.asarray(vectors[start : start + _ROWS], dtype=np.float32)
        nearest[start : start + _ROWS] = (numbers @ centres.T - half).argmax(axis=1)
        if progress is not None:
            progress(min(start + _ROWS, len(vectors)), len(vectors))
    return nearest


def _moved(sample: Vectors, nearest: Rows, centres: Vectors, rng: np.random.Generator) -> Vectors:
    """Each centre in the middle of its vectors; one that has none starts again at a random vector."""
    order = np.argsort(nearest, kind="stable")
    sizes: npt.NDArray[np.int64] = np.bincount(nearest, minlength=len(centres))
    full = sizes > 0
    starts = (np.cumsum(sizes) - sizes)[full]
    moved = sample[rng.integers(0, len(sample), len(centres))]
    moved[full] = np.add.reduceat(sample[order], starts, axis=0) / sizes[full, None]
    return moved
