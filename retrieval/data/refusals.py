"""The rows that do not fit the schema: where they are, why they were left out, and what was seen there."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import numpy.typing as npt

SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Refusal:
    """One row that was left out. `row` counts from 0 inside the file; `seen` shows the offending value, shortened."""

    file: str
    row: int
    reason: str
    seen: str = ""

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.reason}" + (f" (seen: {self.seen})" if self.seen else "")


@dataclass(frozen=True)
class _Block:
    """Rows of one file refused for one reason, kept as an array: a folder in the wrong unit refuses millions of them."""

    file: str
    reason: str
    rows: npt.NDArray[np.int64] | array[int]
    seen: Sequence[object] | npt.NDArray[np.generic] | None

    def one(self, at: int) -> Refusal:
        return Refusal(self.file, int(self.rows[at]), self.reason, "" if self.seen is None else shown(self.seen[at]))


@dataclass
class Refusals(Sequence[Refusal]):
    """Every refused row as a read-only sequence of `Refusal`, grouped by file and reason, rows ascending in a group."""

    _blocks: list[_Block] = field(default_factory=list)
    _open: dict[tuple[str, str], tuple[array[int], list[str]]] = field(default_factory=dict)

    def add(
        self,
        file: str,
        reason: str,
        rows: npt.NDArray[np.int64],
        seen: Sequence[object] | npt.NDArray[np.generic] | None = None,
    ) -> None:
        """The rows are recorded; `seen` holds one value for each of them, or None where a value says nothing."""
        if len(rows):
            self._blocks.append(_Block(file, reason, rows, seen))

    def one(self, file: str, row: int, reason: str, seen: object = None) -> None:
        """One row is recorded, by those who read row by row."""
        rows, values = self._open.get((file, reason), (None, None))
        if rows is None or values is None:
            rows, values = array("q"), list[str]()
            self._open[file, reason] = rows, values
            self._blocks.append(_Block(file, reason, rows, values))
        rows.append(row)
        values.append("" if seen is None else shown(seen))

    def counts(self) -> dict[str, int]:
        """ "file: reason" -> number of rows, the most frequent first."""
        total: dict[str, int] = {}
        for block in self._blocks:
            key = f"{block.file}: {block.reason}"
            total[key] = total.get(key, 0) + len(block.rows)
        return dict(sorted(total.items(), key=lambda pair: -pair[1]))

    def mostly(self, file: str) -> str:
        """Why most refused rows of `file` were, for the message that none is left: "most were refused because: ..."."""
        reason = next((one for one in self.counts() if one.startswith(f"{file}: ")), "")
        return f"most were refused because: {reason}" if reason else "no row was refused, it holds none"

    def __len__(self) -> int:
        return sum(len(block.rows) for block in self._blocks)

    def __iter__(self) -> Iterator[Refusal]:
        for block in self._blocks:
            for at in range(len(block.rows)):
                yield block.one(at)

    @overload
    def __getitem__(self, index: int) -> Refusal: ...
    @overload
    def __getitem__(self, index: slice) -> list[Refusal]: ...
    def __getitem__(self, index: int | slice) -> Refusal | list[Refusal]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        for block in self._blocks if at >= 0 else ():
            if at < len(block.rows):
                return block.one(at)
            at -= len(block.rows)
        raise IndexError(f"refusal {index} of {len(self)}")


def shown(value: object) -> str:
    """The value as one short printable line: hostile text must not reach a terminal as control characters."""
    enough = value[: 4 * SHOWN_CHARACTERS] if isinstance(value, str | bytes) else value
    text = enough.decode("utf-8", "backslashreplace") if isinstance(enough, bytes) else str(enough)
    text = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
    return text if text.isprintable() else ascii(text)[1:-1]
