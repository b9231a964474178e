"""One Parquet file on its way into memory: typed columns, and a mask of the rows that fit.

A `Sheet` knows nothing of items or events. It gives a column in the type that was asked for, marks the rows whose value
cannot be taken, and says in one line what is wrong when the file itself is not usable.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval.data.refusals import Refusals
from retrieval.data.schema import DataError

LONGEST_TEXT = 1 << 20
"""Bytes of UTF-8 in one text field. A longer one is a broken export, not a text: the row is refused."""
LONGEST_ID = 4096
"""Bytes of UTF-8 in an id, an action, a surface or a request id."""

log = logging.getLogger(__name__)
Mask = npt.NDArray[np.bool_]


class Sheet:
    """A Parquet file with the rows that still fit: `ok` bool [n]. Every refused row is in `refusals` with its reason."""

    def __init__(self, path: Path, refusals: Refusals, required: Sequence[str], optional: Sequence[str] | None) -> None:
        """Reads the required and the optional columns (None: every column). Raises DataError if the file is not usable."""
        self.file = path.name
        self.refusals = refusals
        schema = _schema(path)
        self._require(schema, required)
        wanted = schema.names if optional is None else [n for n in schema.names if n in {*required, *optional}]
        coded = [name for name in wanted if is_text(schema.field(name).type) and optional is not None]
        try:
            self.table: pa.Table = pq.read_table(path, columns=wanted, read_dictionary=coded, partitioning=None)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        self.ok: Mask = np.ones(self.table.num_rows, bool)

    def _require(self, schema: pa.Schema, required: Sequence[str]) -> None:
        repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if repeated:
            raise DataError(f"{self.file}: column {repeated[0]!r} is there more than once; keep one of them")
        missing = [name for name in required if name not in schema.names]
        if missing:
            raise DataError(
                f"{self.file}: required column {missing[0]!r} is missing (columns seen: {', '.join(schema.names) or 'none'});"
                " add it, the schema is in docs/data.md"
            )

    def __len__(self) -> int:
        return self.table.num_rows

    def __contains__(self, name: str) -> bool:
        return name in self.table.column_names

    def type_of(self, name: str) -> pa.DataType:
        """The Arrow type of a column, dictionary encoding taken away."""
        kind = self.table.schema.field(name).type
        return kind.value_type if pa.types.is_dictionary(kind) else kind

    def refuse(self, bad: Mask, reason: str, seen: Sequence[object] | npt.NDArray[np.generic] | pa.Array | None = None) -> None:
        """The marked rows that were still good are out, with this reason. `seen` is row-aligned with the file."""
        rows = np.flatnonzero(bad & self.ok)
        if not len(rows):
            return
        values: Sequence[object] | npt.NDArray[np.generic] | None
        if isinstance(seen, pa.Array | pa.ChunkedArray):
            values = seen.take(pa.array(rows)).to_pylist()
        else:
            values = seen if seen is None else np.asarray(seen)[rows]
        self.refusals.add(self.file, reason, rows, values)
        self.ok[rows] = False

    def codes(self, name: str, needed: bool) -> tuple[npt.NDArray[np.int32], pa.Array]:
        """The column as int32 [n] positions in an array of distinct strings; -1 where it is empty or null.

        Rows with broken UTF-8 or more than LONGEST_ID bytes are refused, and empty ones if the value is `needed`.
        """
        if name not in self:
            return np.full(len(self), -1, np.int32), pa.array([], pa.large_string())
        column = self._text_column(name)
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        whole = column.unify_dictionaries().combine_chunks()
        codes = np.asarray(whole.indices.fill_null(-1)).astype(np.int32)
        distinct = whole.dictionary.cast(pa.large_binary())
        merged = distinct.dictionary_encode()
        if len(merged.dictionary) < len(distinct):
            # A Parquet dictionary page may repeat a value; two codes for one id would make two members of one.
            codes = _through(np.asarray(merged.indices.fill_null(-1)).astype(np.int32), codes)
            distinct = merged.dictionary
        words, broken, long, blank = _judge(distinct, LONGEST_ID)
        self.refuse(_mark(broken, codes), f"{name} is not valid UTF-8")
        self.refuse(_mark(long, codes), f"{name} is longer than {LONGEST_ID:,} bytes")
        codes[_mark(blank, codes)] = -1
        if needed:
            self.refuse(codes < 0, f"{name} is missing or empty")
        return codes, words

    def texts(self, name: str) -> list[str]:
        """The column as strings, null as ""; rows with broken UTF-8 or more than LONGEST_TEXT bytes are refused ("")."""
        if name not in self:
            return [""] * len(self)
        column = self._text_column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        words, broken, long, _ = _judge(column.cast(pa.large_binary()).combine_chunks(), LONGEST_TEXT)
        self.refuse(broken, f"{name} is not valid UTF-8")
        self.refuse(long, f"{name} is longer than {LONGEST_TEXT:,} bytes")
        return list(words.fill_null("").to_pylist())

    def whole(self, name: str, needed: bool) -> tuple[npt.NDArray[np.int64], Mask]:
        """The column as int64 [n] and a mask of the missing ones (0 there). Floats are taken where they are whole."""
        if name not in self:
            return np.zeros(len(self), np.int64), np.ones(len(self), bool)
        column = self.table.column(name).combine_chunks()
        if not is_number(column.type):
            raise self.wrong_type(name, "int64")
        if pa.types.is_floating(column.type):
            values, missing = self._whole_floats(name, column)
        else:
            missing = np.asarray(column.is_null())
            try:
                values = np.asarray(column.cast(pa.int64()).fill_null(0))
            except pa.ArrowInvalid as error:
                raise DataError(f"{self.file}: column {name!r} holds numbers outside int64; write it as int64") from error
        if needed:
            self.refuse(missing, f"{name} is missing")
        return values, missing

    def _whole_floats(self, name: str, column: pa.Array) -> tuple[npt.NDArray[np.int64], Mask]:
        floats = np.asarray(column.cast(pa.float64()).fill_null(np.nan))
        missing = np.isnan(floats)
        fits = ~missing & (np.abs(floats) < 2.0**53)
        fits[fits] = floats[fits] == np.floor(floats[fits])
        self.refuse(~missing & ~fits, f"{name} is not a whole number", floats)
        return np.where(fits, floats, 0.0).astype(np.int64), missing

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """The column as float64 [n]; null, NaN and infinite are NaN: they all mean "unknown"."""
        if name not in self:
            return np.full(len(self), np.nan)
        column = self.table.column(name).combine_chunks()
        if not is_number(column.type):
            raise self.wrong_type(name, "a number")
        values = np.array(column.cast(pa.float64(), safe=False).fill_null(np.nan))
        values[~np.isfinite(values)] = np.nan
        return values

    def wrong_type(self, name: str, expected: str) -> DataError:
        """The error for a column of another type than the schema has."""
        return DataError(
            f"{self.file}: column {name!r} is {self.type_of(name)}, expected {expected}; write it again in that type"
        )

    def _text_column(self, name: str) -> pa.ChunkedArray:
        if pa.types.is_null(self.type_of(name)):
            return self.table.column(name).cast(pa.large_string())
        if not is_text(self.type_of(name)):
            raise self.wrong_type(name, "string")
        return self.table.column(name)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds words (string or binary, plain or dictionary encoded)."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    )  # fmt: skip


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type holds numbers (integers, floats, booleans, or nothing but nulls)."""
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind))


def _schema(path: Path) -> pa.Schema:
    if not path.is_file():
        raise DataError(f"{path.name} is missing in {path.parent}: it is required, the schema is in docs/data.md")
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(f"{path}: not a readable Parquet file, truncated or of another format ({why}); write it again")


def _judge(raw: pa.Array, longest: int) -> tuple[pa.Array, Mask, Mask, Mask]:
    """Bytes [n] -> (strings [n], not UTF-8, too long, blank); a bad value becomes ""."""
    long = np.asarray(pc.greater(pc.binary_length(raw), longest).fill_null(False))
    broken = np.zeros(len(raw), bool)
    try:
        words = raw.cast(pa.large_string())
    except pa.ArrowInvalid:
        for at, value in enumerate(raw.to_pylist()):
            broken[at] = value is not None and not _is_utf8(value)
        words = pc.if_else(pa.array(broken), pa.scalar(b"", pa.large_binary()), raw).cast(pa.large_string())
    if long.any():
        words = pc.if_else(pa.array(long), pa.scalar("", pa.large_string()), words)
    blank = np.asarray(pc.equal(pc.utf8_trim_whitespace(words), "").fill_null(True)) & ~broken & ~long
    return words, broken, long, blank


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _mark(distinct: Mask, codes: npt.NDArray[np.int32]) -> Mask:
    """Bool over distinct values -> bool [n] over rows; a missing value (-1) is not marked."""
    return np.append(distinct, False)[codes]


def _through(first: npt.NDArray[np.int32], codes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return np.append(first, np.int32(-1))[codes]
