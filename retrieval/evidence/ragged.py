"""Lists of different lengths kept in one array, so that work over all of them is one numpy call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Ragged:
    """B lists: list b is `values[start[b]:start[b + 1]]`. `start` int64 [B+1], `values` int64 [T]."""

    start: npt.NDArray[np.int64]
    values: npt.NDArray[np.int64]

    @classmethod
    def from_pairs(cls, rows: Ints, values: Ints, size: int) -> Ragged:
        """Returns `size` lists made of (list, value) pairs; the pairs keep their order inside a list."""
        order = np.argsort(rows, kind="stable")
        lengths = np.bincount(rows, minlength=size)
        return cls(_starts(lengths), np.asarray(values, np.int64)[order])

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        return self.values[self.start[row] : self.start[row + 1]]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Int64 [B]: how many values each list holds."""
        return np.diff(self.start)

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Int64 [T]: the list that each value belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @cached_property
    def from_end(self) -> npt.NDArray[np.int64]:
        """Int64 [T]: how far each value lies from the end of its list; the last one is 0."""
        return self.start[1:][self.rows] - 1 - np.arange(len(self.values))

    def take(self, which: Ints) -> Ragged:
        """The lists at the given rows, in the given order."""
        lengths = self.lengths[which]
        start = _starts(lengths)
        offset = np.repeat(self.start[:-1][which] - start[:-1], lengths)
        return Ragged(start, self.values[np.arange(start[-1]) + offset])

    def distinct(self) -> Ragged:
        """The same lists as sets: each value once per list, ascending."""
        if not len(self.values):
            return self
        width = int(self.values.max()) + 1
        keys = np.unique(self.rows * width + self.values)
        return Ragged.from_pairs(keys // width, keys % width, len(self))


def _starts(lengths: Ints) -> npt.NDArray[np.int64]:
    start = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=start[1:])
    return start
