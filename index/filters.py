"""Which rows an answer may hold: sets of rows as packed bits, the columns that make them, and the filter of one query.

A set composes with `&`, `|`, `-` and `~`, so "Norwegian, and not of a blocked creator" is
`language.equals("no") & ~creator.is_in(blocked)`. What a filter means never depends on how a search applies it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from index.hits import ExclusionError, Rows, check_exclusions, check_rows

Bits = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


class FilterError(ExclusionError):
    """A set of allowed rows does not fit the index, or an attribute column is not one. No answer is given."""


@dataclass(frozen=True, eq=False)
class RowSet:
    """A set of rows of an index of `count` rows. Never changed once made: threads and queries may share it.

    `bits` uint8 [ceil(count / 8)], row r in bit r % 8 of byte r // 8; the bits beyond the last row are 0.
    """

    bits: Bits
    count: int

    @classmethod
    def of(cls, rows: npt.NDArray[Any], count: int) -> Self:
        """The set of these rows is returned; -1 (an id that is not here) adds none. Raises ExclusionError outside -1..count-1."""
        return cls(np.zeros((count + 7) // 8, np.uint8), count).plus(rows)

    @classmethod
    def where(cls, mask: Mask) -> Self:
        """The set of the rows at which a mask bool [N] is true is returned."""
        if mask.ndim != 1 or mask.dtype != np.bool_:
            raise FilterError(f"a mask is {mask.dtype}{list(mask.shape)}, expected bool [N]")
        return cls(np.packbits(mask, bitorder="little"), len(mask))

    @classmethod
    def every(cls, count: int) -> Self:
        """The set of all rows is returned."""
        return cls.where(np.ones(count, np.bool_))

    def plus(self, rows: npt.NDArray[Any]) -> Self:
        """A set with these rows besides is returned; this one stays as it is. Raises ExclusionError."""
        added = check_rows(rows, "a set of rows", self.count)
        bits = self.bits.copy()
        np.bitwise_or.at(bits, added >> 3, np.left_shift(1, added & 7).astype(np.uint8))
        return type(self)(bits, self.count)

    def __and__(self, other: RowSet) -> Self:
        return type(self)(self.bits & self._same(other), self.count)

    def __or__(self, other: RowSet) -> Self:
        return type(self)(self.bits | self._same(other), self.count)

    def __sub__(self, other: RowSet) -> Self:
        return type(self)(self.bits & ~self._same(other), self.count)

    def __invert__(self) -> Self:
        bits = ~self.bits
        if self.count % 8:
            bits[-1] &= (1 << self.count % 8) - 1
        return type(self)(bits, self.count)

    @cached_property
    def size(self) -> int:
        """How many rows the set holds."""
        return int(np.bitwise_count(self.bits).sum(dtype=np.int64))

    def rows(self) -> Rows:
        """The rows of the set are returned, int64 [size], rising."""
        return np.flatnonzero(np.unpackbits(self.bits, count=self.count, bitorder="little"))

    def has(self, rows: Rows) -> Mask:
        """Whether each of these rows (all of 0..count-1) is in the set is returned, bool [n]."""
        held: Mask = (self.bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 != 0
        return held

    def _same(self, other: RowSet) -> Bits:
        if other.count != self.count:
            raise FilterError(f"sets over {self.count} and {other.count} rows do not compose: they are of different snapshots")
        return other.bits


class Column:
    """One attribute of N rows, dictionary-encoded: `codes` int32 [N] point into `names`, -1 where a row has none.

    A row without a value matches no condition, and a value that no row has matches no row: what is not known is not allowed.
    """

    def __init__(self, codes: npt.NDArray[np.int32], names: Sequence[str]) -> None:
        if codes.ndim != 1 or codes.dtype != np.int32:
            raise FilterError(f"codes are {codes.dtype}{list(codes.shape)}, expected int32 [N]")
        if len(codes) and (codes.min() < -1 or codes.max() >= len(names)):
            raise FilterError(
                f"codes span {codes.min()}..{codes.max()}, there are {len(names)} names: expected -1..{len(names) - 1}"
            )
        self._codes = codes
        self._code = {name: code for code, name in enumerate(names)}
        if len(self._code) != len(names):
            raise FilterError(f"{len(names) - len(self._code)} names of a column stand twice: expected each once")

    @classmethod
    def of(cls, values: Iterable[str | None]) -> Self:
        """The column of these values, row by row, is returned; None for a row that has none."""
        code: dict[str, int] = {}
        codes = [-1 if value is None else code.setdefault(value, len(code)) for value in values]
        return cls(np.array(codes, np.int32), list(code))

    def equals(self, value: str) -> RowSet:
        """The rows with this value are returned."""
        return self.is_in((value,))

    def is_in(self, values: Collection[str]) -> RowSet:
        """The rows whose value is one of these are returned; costs the matching rows and N / 8 bytes, not N comparisons."""
        count, (order, starts) = len(self._codes), self._postings
        codes = [self._code[value] for value in set(values) if value in self._code]
        found = [order[starts[code] : starts[code + 1]] for code in codes]
        if sum(map(len, found)) > count // 8:
            return RowSet.where(np.isin(self._codes, codes))
        return RowSet.of(np.concatenate([np.zeros(0, np.int32), *found]), count)

    def known(self) -> RowSet:
        """The rows that have a value are returned."""
        return RowSet.where(self._codes >= 0)

    @cached_property
    def _postings(self) -> tuple[npt.NDArray[np.int32], Rows]:
        """Rows int32 [N] sorted by code, and where each code's begin; built at the first question, 4 bytes a row."""
        order = np.argsort(self._codes, kind="stable").astype(np.int32)
        return order, np.searchsorted(self._codes[order], np.arange(len(self._code) + 1))


Allow = RowSet | Sequence[RowSet | None] | None
"""The rows that may be answered: one set for all queries, one for each (None: every row), or every row for all."""


@dataclass(frozen=True, eq=False)
class Filter:
    """What one query may be answered with: the rows of `allowed` (None: all `count`) without `excluded` (distinct, rising)."""

    count: int
    excluded: Rows
    allowed: RowSet | None

    @cached_property
    def permitted(self) -> int:
        """How many rows may be answered."""
        if self.allowed is None:
            return self.count - len(self.excluded)
        return self.allowed.size - int(np.count_nonzero(self.allowed.has(self.excluded)))

    def permits(self, rows: Rows) -> Mask:
        """Whether each of these rows may be answered is returned, bool [n]; padding (-1) may not."""
        good = rows >= 0
        if self.allowed is not None:
            good &= self.allowed.has(np.maximum(rows, 0))
        if self.excluded.size:
            place = np.minimum(np.searchsorted(self.excluded, rows), self.excluded.size - 1)
            good &= self.excluded[place] != rows
        return good

    def set(self) -> RowSet:
        """The permitted rows are returned as a set."""
        allowed = RowSet.every(self.count) if self.allowed is None else self.allowed
        return allowed - RowSet.of(self.excluded, self.count) if self.excluded.size else allowed


def check_filters(exclude: Sequence[Rows] | None, allow: Allow, queries: int, count: int) -> list[Filter]:
    """One filter per query is returned. `allow` is for all queries or one for each (None: every row).

    Raises ExclusionError, and FilterError for a set over another number of rows: it was made for another snapshot.
    """
    excluded = check_exclusions(exclude, queries, count)
    allowed = [allow] * queries if allow is None or isinstance(allow, RowSet) else list(allow)
    if len(allowed) != queries:
        raise FilterError(f"{len(allowed)} sets of allowed rows for {queries} queries: expected one for all, or one each")
    for one in allowed:
        if one is not None and (one.count != count or one.bits.shape != ((count + 7) // 8,)):
            raise FilterError(
                f"allowed rows are of an index of {one.count} rows, this one has {count}: they were made for another snapshot"
            )
    return [Filter(count, rows, one) for rows, one in zip(excluded, allowed)]
