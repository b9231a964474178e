"""Rows are read in units: runs of consecutive rows, the same for the same rows wherever they are read.

A unit's vectors depend on its rows, on the encoder and on what computes: the kind of machine, and the number of threads. Where
these are equal they are, bit for bit, whoever reads the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

UNIT = 4_096
"""Rows of a unit."""

Vectors = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]


class UnitReader(Protocol):
    """Who reads rows unit by unit."""

    @property
    def where(self) -> str:
        """Where they are read: "ray" or "this process"."""

    def embed(self, rows: Sequence[Sequence[int]], progress: Progress | None = None) -> Vectors:
        """Unit vectors [n, D] of id rows in input order."""


@dataclass(frozen=True)
class Here:
    """Reads units of `size` rows in this process, one after the other."""

    encoder: Encoder
    size: int = UNIT
    where: str = "this process"

    def embed(self, rows: Sequence[Sequence[int]], progress: Progress | None = None) -> Vectors:
        """Unit vectors [n, D] of id rows in input order. Raises EncoderError for a row without tokens."""
        found = np.empty((len(rows), self.encoder.dims), np.float32)
        for part in units(len(rows), self.size):
            found[part] = self.encoder.embed(rows[part], None if progress is None else _later(progress, part.start, len(rows)))
        return found


def units(count: int, size: int = UNIT) -> list[slice]:
    """0..count-1 in runs of `size`, the last one shorter: the same units for the same rows, wherever they are read."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _later(progress: Progress, before: int, count: int) -> Progress:
    return lambda done, _: progress(before + done, count)
