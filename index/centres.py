"""Centres of a set of vectors, by k-means over a sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from index.hits import Rows, Vectors

ROUNDS = 8
TRAINING_ROWS = 40
"""Rows of the sample per centre."""
_ROWS = 2_048


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


def assign(vectors: Vectors, centres: Vectors) -> Rows:
    """The nearest centre of every vector [N] is returned."""
    half = np.einsum("ld,ld->l", centres, centres) / 2
    nearest = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), _ROWS):
        numbers = np.asarray(vectors[start : start + _ROWS], dtype=np.float32)
        nearest[start : start + _ROWS] = (numbers @ centres.T - half).argmax(axis=1)
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
