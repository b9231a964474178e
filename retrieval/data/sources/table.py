"""One delimited table (CSV, TSV, semicolons), as spreadsheets and shops export it: any encoding, any of four delimiters.

The delimiter is the one that cuts the first rows into the same number of fields as the header. Encoding: a byte order
mark decides, else valid UTF-8 is UTF-8, else Windows-1252, which is reported in `notes`.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from retrieval.data.columns import LONGEST_TEXT
from retrieval.data.refusals import Refusals
from retrieval.data.schema import DataError
from retrieval.data.sources.lines import PROGRESS_EVERY, Progress

DELIMITERS = (",", ";", "\t", "|")
SAMPLED_ROWS = 50
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Table:
    """A delimited file whose encoding, delimiter and header are known; `rows` reads it."""

    path: Path
    encoding: str
    delimiter: str
    columns: list[str]
    notes: list[str] = field(default_factory=list)

    def rows(self, refusals: Refusals, progress: Progress | None = None) -> Iterator[tuple[int, dict[str, str]]]:
        """(row from 0, without the header; column -> text). Ragged rows and fields over LONGEST_TEXT are refused."""
        total, told = self.path.stat().st_size, 0
        with self.path.open("rb") as raw, _text(raw, self.encoding) as text:
            reader = _reader(text, self.delimiter)
            next(reader)
            for row, fields in enumerate(self._parsed(reader)):
                if not fields:
                    continue
                if len(fields) != len(self.columns):
                    reason = f"expected {len(self.columns)} fields as in the header"
                    refusals.one(self.path.name, row, reason, f"{len(fields)} fields")
                elif any(len(word) > LONGEST_TEXT for word in fields):
                    refusals.one(self.path.name, row, f"a field is longer than {LONGEST_TEXT:,} characters")
                else:
                    yield row, dict(zip(self.columns, fields, strict=True))
                if progress is not None and raw.tell() >= told + PROGRESS_EVERY:
                    told = raw.tell()
                    progress(told, total)
        if progress is not None:
            progress(total, total)

    def _parsed(self, reader: Iterator[list[str]]) -> Iterator[list[str]]:
        try:
            yield from reader
        except (csv.Error, UnicodeError) as error:
            raise DataError(f"{self.path}: cannot be read as delimited text ({error}); save it as UTF-8 CSV") from error


def open_table(path: Path) -> Table:
    """The table with its encoding, delimiter and columns found. Raises DataError if it is none."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; name a CSV file with a header line")
    encoding = _encoding(path)
    notes = [f"{path.name} is not UTF-8, read as Windows-1252: check the accents"] if encoding == "cp1252" else []
    delimiter, columns = _layout(path, encoding)
    if len(set(columns)) < len(columns):
        repeated = next(name for name in columns if columns.count(name) > 1)
        raise DataError(f"{path}: column {repeated!r} is in the header more than once; rename one of them")
    return Table(path, encoding, delimiter, columns, notes)


def _encoding(path: Path) -> str:
    with path.open("rb") as raw:
        head = raw.read(4)
        for mark, encoding in MARKS:
            if head.startswith(mark):
                return encoding
        raw.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while block := raw.read(PROGRESS_EVERY):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8"


def _layout(path: Path, encoding: str) -> tuple[str, list[str]]:
    """(delimiter, columns): the delimiter with the most rows like the header, then with the most columns."""
    best: tuple[tuple[int, int], str, list[str]] | None = None
    for delimiter in DELIMITERS:
        rows = _sample(path, encoding, delimiter)
        if not rows:
            raise DataError(f"{path} is empty; expected a header line and rows")
        alike = sum(len(fields) == len(rows[0]) for fields in rows)
        # One column is what every wrong delimiter finds, so it counts as no agreement at all.
        rank = (alike if len(rows[0]) > 1 else 0, len(rows[0]))
        if best is None or rank > best[0]:
            best = rank, delimiter, [name.strip() for name in rows[0]]
    if best is None or not all(best[2]):
        raise DataError(f"{path}: the header line has an empty column name; expected one name for each column")
    return best[1], best[2]


def _sample(path: Path, encoding: str, delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    with path.open("rb") as raw, _text(raw, encoding) as text:
        try:
            for fields in _reader(text, delimiter):
                if fields:
                    rows.append(fields)
                if len(rows) > SAMPLED_ROWS:
                    break
        except (csv.Error, UnicodeError):
            return rows[:1] or [[""]]
    return rows


def _text(raw: BinaryIO, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="")


def _reader(text: io.TextIOWrapper, delimiter: str) -> Iterator[list[str]]:
    # A quote that is never closed swallows the rest of the file into one field; the limit makes that an error.
    csv.field_size_limit(8 * LONGEST_TEXT)
    return csv.reader(text, delimiter=delimiter)
