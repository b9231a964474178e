"""Vectors as int8 in blocks of one step each, with bounds on what the rounding can have changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.hits import SearchError, Vectors
from index.int8 import MAX_DIMS, Bytes, code_dims, encode, scale_of

BLOCK = 2_048
"""Rows of one step: 256 queries' int32 products with a block fill 2 MiB, the second-level cache of one core."""
Doubles = npt.NDArray[np.float64]
_ROUNDING = 2.0**-23
"""Twice the unit roundoff of float32, for sums whose order nobody promises."""


@dataclass(frozen=True, slots=True)
class Coded:
    """N vectors in B blocks of BLOCK rows, like largest numbers together.

    codes int8 [B * BLOCK, code_dims(D)] (zeros at the end), rows int64 [B * BLOCK] (the row of each code, -1 at the end);
    of each block float64 [B]: scales (its step), lengths (longest vector), losses (longest difference of vector and codes).
    """

    codes: Bytes
    rows: npt.NDArray[np.int64]
    scales: Doubles
    lengths: Doubles
    losses: Doubles

    @property
    def bytes(self) -> int:
        """Memory of the codes and of what belongs to them."""
        return sum(part.nbytes for part in (self.codes, self.rows, self.scales, self.lengths, self.losses))


def coded_bytes(count: int, dims: int) -> int:
    """The memory of the codes of `count` vectors is returned before they are made."""
    blocks = -(-count // BLOCK)
    return blocks * (BLOCK * (code_dims(dims) + 8) + 3 * 8)


def code(vectors: Vectors) -> Coded:
    """The vectors [N, D] are returned coded. Raises SearchError for NaN, infinity, or more than MAX_DIMS dims."""
    count, dims = vectors.shape
    if dims > MAX_DIMS:
        raise SearchError(f"vectors have {dims} dims, the certified search handles up to {MAX_DIMS}: use exact_search")
    order = np.argsort(_largest(vectors), kind="stable")
    blocks = -(-count // BLOCK)
    codes = np.zeros((blocks * BLOCK, code_dims(dims)), np.int8)
    rows = np.full(blocks * BLOCK, -1, np.int64)
    rows[:count] = order
    scales, lengths, losses = np.zeros((3, blocks))
    for block in range(blocks):
        here = order[block * BLOCK : (block + 1) * BLOCK]
        numbers = np.asarray(vectors[here], dtype=np.float32)
        scales[block] = scale_of(numbers)
        part = encode(numbers, scales[block])
        codes[block * BLOCK : block * BLOCK + len(here)] = part
        exact = numbers.astype(np.float64)
        lengths[block] = np.linalg.norm(exact, axis=1).max()
        losses[block] = np.linalg.norm(exact - part[:, :dims] * scales[block], axis=1).max()
    return Coded(codes, rows, scales, lengths, losses)


def _largest(vectors: Vectors) -> Vectors:
    """The largest absolute number of each vector."""
    largest = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), BLOCK):
        largest[start : start + BLOCK] = np.abs(np.asarray(vectors[start : start + BLOCK], dtype=np.float32)).max(axis=1)
    bad = np.flatnonzero(~np.isfinite(largest))
    if bad.size:
        raise SearchError(f"vector {bad[0]} holds NaN or infinity: the vectors are damaged, build them again")
    return largest


@dataclass(frozen=True, slots=True)
class Asked:
    """Q queries as codes int8 [Q, D] with their steps float64 [Q], and how far a product can lie from the truth: [Q, B]."""

    codes: Bytes
    scales: Doubles
    errors: Doubles

    @classmethod
    def of(cls, queries: Vectors, coded: Coded) -> Asked:
        """Queries [Q, D] are returned coded for these blocks.

        With q' and x' decoded, |q.x - q'.x'| = |(q - q').x + q'.(x - x')| <= |q - q'| |x| + |q'| |x - x'|; to that comes what
        float32 may lose in the sum of D products, by which scores are defined.
        """
        scales = np.array([scale_of(query) for query in queries])
        codes = np.concatenate([encode(query[None], scale) for query, scale in zip(queries, scales.tolist())])
        decoded = codes[:, : queries.shape[1]] * scales[:, None]
        lost = np.linalg.norm(queries - decoded, axis=1)
        errors = np.outer(lost, coded.lengths) + np.outer(np.linalg.norm(decoded, axis=1), coded.losses)
        rounding = (
            (queries.shape[1] + 2) * _ROUNDING * np.outer(np.linalg.norm(queries.astype(np.float64), axis=1), coded.lengths)
        )
        return cls(codes, scales, errors * (1 + 1e-9) + rounding + queries.shape[1] * 1e-44)

    def bars(self, wanted: Doubles, coded: Coded) -> npt.NDArray[np.int32]:
        """The int32 product [Q, B] that a vector must exceed if its score can be `wanted` [Q] or more is returned."""
        steps = np.outer(self.scales, coded.scales)
        # One less than the last product that is surely too small, and one more for the rounding of this very line.
        bars = np.ceil((wanted[:, None] - self.errors) / steps) - 2
        return np.clip(bars, -(2**31), 2**31 - 1).astype(np.int32)
