"""Meters as text, and text as meters: the Prometheus exposition format, version 0.0.4.

# HELP name what it counts        \\ and line feeds escaped
# TYPE name counter               before the first sample of the name, once
name{label="value"} 3             \\, " and line feeds escaped in a value
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from index.errors import BrewlineError
from ranking.serving.meters import Family, Labels, Sample, number

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
KINDS = ("counter", "gauge", "histogram")
PARTS = ("_bucket", "_sum", "_count")
LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([^ ]+)")
PAIR = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')
ESCAPE = re.compile(r"\\(.)")
NUMBER = re.compile(r"[+-]?(?:Inf|[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)|NaN")


class ExpositionError(BrewlineError):
    """A text is not in the format that it should be in."""


def render(families: Iterable[Family]) -> str:
    """The text of a scrape."""
    lines: list[str] = []
    for family in families:
        told = family.told.replace("\\", "\\\\").replace("\n", "\\n")
        lines += [f"# HELP {family.name} {told}", f"# TYPE {family.name} {family.kind}"]
        lines += [f"{one.name}{_braces(one.labels)} {number(one.value)}" for one in family.samples]
    return "\n".join([*lines, ""])


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def parse(text: str) -> dict[str, Family]:
    """The families of a text by name, strictly: HELP, TYPE, then all samples of it, nothing twice, a line feed at the end.

    Raises ExpositionError with the line.
    """
    if text and not text.endswith("\n"):
        raise ExpositionError("the text does not end with a line feed: it was cut short; ask again")
    reader = _Reader()
    for place, line in enumerate(text.split("\n")[:-1], 1):
        try:
            reader.take(line)
        except ValueError as error:
            raise ExpositionError(f"line {place}: {error}; expected a scrape in the Prometheus text format") from error
    return reader.families


class _Reader:
    """What was read so far. `take` raises ValueError with what is wrong with a line."""

    def __init__(self) -> None:
        self.families: dict[str, Family] = {}
        self._told: tuple[str, str] | None = None
        self._open: Family | None = None
        self._seen: set[tuple[str, Labels]] = set()

    def take(self, line: str) -> None:
        if not line.startswith("#"):
            self._sample(line)
            return
        mark, word, name, *rest = [*line.split(" ", 3), "", ""]
        if mark == "#" and word == "HELP":
            self._told, self._open = (name, _plain(rest[0])), None
        elif mark == "#" and word == "TYPE":
            self._type(name, rest[0])
        else:
            raise ValueError(f"{line[:80]!r} is a comment")

    def _type(self, name: str, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"{kind[:80]!r} is none of {KINDS}")
        if name in self.families or self._told is None or self._told[0] != name:
            raise ValueError(f"{name[:80]!r} comes twice or without its HELP")
        self._open = self.families[name] = Family(name, kind, self._told[1])
        self._told = None

    def _sample(self, line: str) -> None:
        found = LINE.fullmatch(line)
        if found is None or not NUMBER.fullmatch(found[3]):
            raise ValueError(f"{line[:80]!r} is no sample")
        sample = Sample(found[1], _labels(found[2] or ""), float(found[3]))
        family = self._open
        names = () if family is None else [family.name + part for part in PARTS] if family.kind == "histogram" else [family.name]
        if family is None or sample.name not in names:
            raise ValueError(f"{sample.name[:80]!r} has no TYPE right before it")
        if (sample.name, sample.labels) in self._seen:
            raise ValueError(f"{line[:80]!r} comes twice")
        self._seen.add((sample.name, sample.labels))
        family.samples.append(sample)


def _labels(text: str) -> Labels:
    found, place = [], 0
    while place < len(text):
        pair = PAIR.match(text, place)
        if pair is None:
            raise ValueError(f"{text[place : place + 80]!r} is no label")
        found.append((pair[1], _plain(pair[2])))
        place = pair.end()
    if len({name for name, _ in found}) < len(found):
        raise ValueError(f"{text[:80]!r} names a label twice")
    return tuple(found)


def _plain(text: str) -> str:
    return ESCAPE.sub(lambda found: "\n" if found[1] == "n" else found[1], text)
