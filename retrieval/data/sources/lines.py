"""Original files, line by line or record by record, gzip or not, with the rows that cannot be read refused.

Memory stays at one line: the review files of the wild are larger than the machine that reads them.
"""

from __future__ import annotations

import csv
import gzip
import html
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar, cast

from retrieval.data.refusals import Refusals
from retrieval.data.schema import DataError

LONGEST_LINE = 1 << 24
"""Bytes in one line. Behind a longer one is a broken file, and reading it would fill the memory."""
PROGRESS_EVERY = 1 << 20

Progress = Callable[[int, int], None]
Parsed = TypeVar("Parsed")
_TAG = re.compile(r"<[^<>]{0,500}>")
_SPACE = re.compile(r"\s+")
_YEAR = re.compile(r"^(?P<title>.*\S)\s*\((?P<year>\d{4})\)\s*$", re.DOTALL | re.ASCII)


def find(source: Path, *patterns: str) -> Path:
    """The one file of the folder that fits the first pattern that fits any. Raises DataError if none or several do."""
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; expected the unpacked original with {' or '.join(patterns)}")
    for pattern in patterns:
        found = sorted(path for path in source.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(f"{source}: {names} all fit {pattern!r}; leave one of them there")
        if found:
            return found[0]
    raise DataError(f"{source}: {' or '.join(patterns)} is missing; expected the unpacked original")


def find_optional(source: Path, *patterns: str) -> Path | None:
    """Like `find`, and None if there is no such file."""
    return find(source, *patterns) if any(True for pattern in patterns for _ in source.glob(pattern)) else None


def lines(path: Path, refusals: Refusals, encoding: str = "utf-8", progress: Progress | None = None) -> Iterator[tuple[int, str]]:
    """(line number from 0, text without the line end) of each readable, not empty line. `progress` counts file bytes."""
    total, told = path.stat().st_size, 0
    try:
        with path.open("rb") as raw, _unpacked(path, raw) as stream:
            for row, line in enumerate(_bounded(path, stream)):
                try:
                    text = line.decode(encoding).rstrip("\r\n")
                except UnicodeDecodeError:
                    _refuse(refusals, path, row, f"line is not valid {encoding.upper()}", line)
                    continue
                if text.strip():
                    yield row, text
                if progress is not None and raw.tell() >= told + PROGRESS_EVERY:
                    told = raw.tell()
                    progress(told, total)
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); download it again") from error
    if progress is not None:
        progress(total, total)


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", gzip.GzipFile(fileobj=raw, mode="rb")) if path.suffix == ".gz" else raw


def _bounded(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    while line := stream.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise DataError(f"{path}: a line is longer than {LONGEST_LINE >> 20} MiB; this is not the original file")
        yield line


def parsed(
    path: Path, parse: Callable[[str], Parsed], what: str, refusals: Refusals, progress: Progress | None = None
) -> Iterator[tuple[int, Parsed]]:
    """(line number, parsed value) of each line that `parse` takes; the others are refused as "not `what`"."""
    for row, line in lines(path, refusals, progress=progress):
        try:
            value = parse(line)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            _refuse(refusals, path, row, f"line is not {what}", line)
            continue
        yield row, value


def split_lines(
    path: Path, delimiter: str, fields: int, refusals: Refusals, encoding: str = "utf-8", at_least: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line with that many fields (or more, `at_least`); the others are refused."""
    for row, line in lines(path, refusals, encoding):
        parts = line.split(delimiter)
        if len(parts) == fields or (at_least and len(parts) > fields):
            yield row, parts
        else:
            _refuse(refusals, path, row, f"expected {fields} fields between {delimiter!r}", f"{len(parts)} fields")


def records(
    path: Path, needed: Sequence[str], refusals: Refusals, progress: Progress | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """(data row from 0, column -> text) of a comma separated UTF-8 file with a header that has the needed columns."""
    text = (line + "\n" for _, line in lines(path, refusals, "utf-8-sig", progress))
    reader = csv.reader(text)
    try:
        header = next(reader, [])
        missing = [name for name in needed if name not in header]
        if missing:
            raise DataError(f"{path}: column {missing[0]!r} is missing (columns seen: {', '.join(header) or 'none'})")
        for row, fields in enumerate(reader):
            if len(fields) == len(header):
                yield row, dict(zip(header, fields, strict=True))
            else:
                _refuse(refusals, path, row, f"expected {len(header)} fields", f"{len(fields)} fields")
    except csv.Error as error:
        raise DataError(f"{path}: not comma separated text ({error})") from error


def _refuse(refusals: Refusals, path: Path, row: int, reason: str, seen: object) -> None:
    refusals.one(path.name, row, reason, seen)


def clean(value: object) -> str:
    """The value as one line of text that UTF-8 can carry: None is "", markup and entities are resolved."""
    if value is None:
        return ""
    text = html.unescape(_TAG.sub(" ", str(value)))
    text = text.replace("\x00", " ").encode("utf-8", "replace").decode("utf-8")
    return _SPACE.sub(" ", text).strip()


def clean_list(value: object) -> list[str]:
    """The clean, distinct, not empty words of a list in order; a single text counts as a list of one."""
    found = value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(word for word in map(clean, found) if word))


def title_and_year(title: str) -> tuple[str, float | None]:
    """ "Heat (1995)" -> ("Heat", 1995.0); without a year in brackets at the end the title stays as it is."""
    match = _YEAR.match(title)
    return (match["title"], float(match["year"])) if match else (title, None)
