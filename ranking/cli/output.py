"""What commands show: one JSON object or a table on stdout; progress and errors on stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

Report = Callable[[int, int], None]
"""Called with (done, total) while work goes on."""

SECONDS_BETWEEN_LINES = 10.0
PIPED = 140
"""Columns of a table that no terminal shows: the 80 that are assumed otherwise cut names of metrics to their first letters."""


def console_err() -> Console:
    """A console on the stderr of this moment: a redirected stream is seen, and nothing is held open."""
    return Console(stderr=True, highlight=False)


def emit(content: Mapping[str, object], *, as_json: bool, table: Callable[[], RenderableType | None]) -> None:
    """Writes `content` as one line of JSON, or what `table()` returns, to stdout.

    JSON knows no NaN or infinity: they become null. Raises TypeError for a value that has no JSON form (a bug, not a wish).
    """
    if as_json:
        sys.stdout.write(json.dumps(plain(content), ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()
        return
    shown = table()
    if shown is not None:
        asked = sys.stdout.isatty() or "COLUMNS" in os.environ
        Console(highlight=False, width=None if asked else PIPED).print(shown)


def plain(value: object) -> object:
    """The value in terms of JSON: numpy arrays as lists, dataclasses as objects, paths as text, NaN as null."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(held) for held in value]
    return value


def words(text: str, width: int | None = None, style: str = "") -> Text:
    """Text of strangers, safe to print: no markup is read, control characters show as a dot, cut to `width` characters."""
    seen = "".join(letter if letter.isprintable() else "·" for letter in text)
    if width is not None and len(seen) > width:
        seen = seen[: width - 1] + "…"
    return Text(seen, style=style)


@contextmanager
def progress_bar(label: str) -> Iterator[Report]:
    """A bar on stderr for work that reports (done, total); without a terminal a plain line at most every ten seconds.

    The total may be 0 while it is unknown, and may change. The bar stays, finished, when the work is done.
    """
    console = console_err()
    if not console.is_terminal:
        yield _plain_lines(label)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def _plain_lines(label: str) -> Report:
    started = time.monotonic()
    last = started - SECONDS_BETWEEN_LINES

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES and done < total:
            return
        last = now
        sys.stderr.write(f"{label}: {done}/{total} after {now - started:.0f} s\n")
        sys.stderr.flush()

    return report


def one_line(error: Exception) -> str:
    """The error's message on one line, with nothing in it that a terminal would obey."""
    return words(" ".join(str(error).split())).plain
