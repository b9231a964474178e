"""Large files of nothing but numbers (member, item, rating, time), read in blocks at the speed of Arrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from retrieval.data.refusals import Refusals
from retrieval.data.schema import DataError
from retrieval.data.sources.assemble import Log
from retrieval.data.sources.lines import Progress

BLOCK = 1 << 24
_NUMBER = r"^\s*-?\d{1,15}(\.\d{1,9})?\s*$"


@dataclass(frozen=True)
class Numbers:
    """The good rows of a file: `row` int64 [n] (from 0, without the header) and each column as float64 [n]."""

    file: str
    row: npt.NDArray[np.int64]
    columns: dict[str, npt.NDArray[np.float64]]


def read_numbers(
    path: Path,
    columns: Sequence[str],
    refusals: Refusals,
    layout: str = "csv",
    progress: Progress | None = None,
) -> Numbers:
    """The named columns as numbers; rows with another number of fields or with something else in them are refused.

    `layout` "csv" has a header; "::" has none, and its fields are the named columns in order.
    """
    dotted = layout == "::"
    ragged: list[int] = []
    options = _options(columns, dotted, ragged)
    parts: list[dict[str, npt.NDArray[np.float64]]] = []
    good: list[npt.NDArray[np.bool_]] = []
    total = path.stat().st_size
    try:
        with pacsv.open_csv(path, *options) as reader:
            for block, batch in enumerate(reader):
                taken = [_numbers(batch.column(name)) for name in columns]
                good.append(np.logical_and.reduce([fits for _, fits in taken]))
                parts.append({name: values for name, (values, _) in zip(columns, taken, strict=True)})
                if progress is not None:
                    progress(min((block + 1) * BLOCK, total), total)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: not in the original layout ({error}); expected {', '.join(columns)}") from error
    return _joined(path, columns, parts, good, ragged, refusals)


def _options(
    columns: Sequence[str], dotted: bool, ragged: list[int]
) -> tuple[pacsv.ReadOptions, pacsv.ParseOptions, pacsv.ConvertOptions]:
    """How Arrow reads the layout; the numbers of the rows that it skips are appended to `ragged`."""
    # "1::2::3" cut at single colons has an empty field between each two.
    names = [part for name in columns for part in (name, f"_{name}")][:-1] if dotted else None

    def skip(row: pacsv.InvalidRow) -> str:
        ragged.append(row.number - (1 if dotted else 2))
        return "skip"

    kinds = {name: pa.binary() for name in (names or columns)}
    return (
        # Threads would hide the row numbers.
        pacsv.ReadOptions(use_threads=False, block_size=BLOCK, column_names=names),
        pacsv.ParseOptions(delimiter=":" if dotted else ",", invalid_row_handler=skip, ignore_empty_lines=False),
        pacsv.ConvertOptions(column_types=kinds, include_columns=names or list(columns)),
    )


def _joined(
    path: Path,
    columns: Sequence[str],
    parts: list[dict[str, npt.NDArray[np.float64]]],
    good: list[npt.NDArray[np.bool_]],
    ragged: list[int],
    refusals: Refusals,
) -> Numbers:
    fits = np.concatenate(good) if good else np.zeros(0, bool)
    skipped = np.array(sorted(ragged), np.int64)
    taken = np.arange(len(fits))
    # The k-th skipped row stands before every taken row whose number it pushes up.
    row = taken + np.searchsorted(skipped - np.arange(len(skipped)), taken, side="right")
    refusals.add(path.name, "row has another number of fields", skipped)
    refusals.add(path.name, f"{', '.join(columns)} are not all numbers", row[~fits])
    whole = {name: np.concatenate([part[name] for part in parts] or [np.zeros(0)])[fits] for name in columns}
    return Numbers(path.name, row[fits], whole)


def _numbers(column: pa.Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Bytes [n] -> (float64 [n], whether each is a plain number)."""
    fits = pc.match_substring_regex(column, _NUMBER).fill_null(False)
    words = pc.if_else(fits, column, pa.scalar(b"0", pa.binary())).cast(pa.string())
    return np.asarray(pc.utf8_trim_whitespace(words).cast(pa.float64())), np.asarray(fits)


def rating_log(
    numbers: Numbers, member_column: str, item_column: str, scale: tuple[float, float], liked: float, refusals: Refusals,
    prefixes: tuple[str, str],
) -> Log:  # fmt: skip
    """The ratings as a log: action "rating:4.5", label 1 from `liked` up, value the rating; others than `scale` refused.

    Ids are the numbers of the source after a prefix ("u1", "m1"); with a width in the prefix ("tt:07") they are padded.
    """
    rating = numbers.columns["rating"]
    fits = (rating >= scale[0]) & (rating <= scale[1])
    refusals.add(numbers.file, f"rating is outside {scale[0]:g} .. {scale[1]:g}", numbers.row[~fits], rating[~fits])
    member, member_names = _named(numbers.columns[member_column][fits], prefixes[0])
    item, item_names = _named(numbers.columns[item_column][fits], prefixes[1])
    levels, action = np.unique(rating[fits], return_inverse=True)
    time = numbers.columns.get("timestamp")
    return Log(
        numbers.file, numbers.row[fits], member, item,
        np.zeros(int(fits.sum()), np.int64) if time is None else time[fits].astype(np.int64),
        action.astype(np.int32), (rating[fits] >= liked).astype(np.int8), rating[fits].astype(np.float32),
        member_names, item_names, [f"rating:{level:g}" for level in levels],
    )  # fmt: skip


def _named(numbers: npt.NDArray[np.float64], prefix: str) -> tuple[npt.NDArray[np.int32], list[str]]:
    distinct, codes = np.unique(numbers.astype(np.int64), return_inverse=True)
    word, _, width = prefix.partition(":")
    return codes.astype(np.int32), [f"{word}{number:{width}d}" for number in distinct.tolist()]
