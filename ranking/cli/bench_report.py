"""How measurements of the prefill look: tables for people, and a picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.errors import BrewlineError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

Row = Mapping[str, Any]
WAYS = ("one_by_one", "prefix_cache", "prefix_packed")
SHARES = {
    "matmul_share": "the linear layers as bare matrix products take this part of our time",
    "attention_matmul_share": "those and attention's products take this part",
    "lower_bound_share": "the fewest operations, at the linear layers' rate, take this part",
    "warm_share": "1 where the cached prefix saves as much time as operations",
    "operation_ratio_one_by_one": "operations of full prompts over the fewest: the speedup at an equal rate",
    "operation_ratio_prefix_cached": "the same for a prefix that is computed once",
}


class PictureError(BrewlineError):
    """The picture cannot be drawn."""


def shape_table(facts: Row) -> Group:
    """One shape: the contenders with seconds, batch and ratio, then shares, then notes."""
    from rich.console import Group
    from rich.table import Table

    from ranking.cli.train_report import facts_table

    title = f"P={facts['prefix']} N={facts['items']} L={facts['length']} ({facts['lengths']})"
    ways = Table("way", "dtype", "ms", "items/s", "batch", "x ours", "note", title=title, title_justify="left")
    for name, key in (("brewline, from nothing", "seconds"), ("brewline, prefix cached", "seconds_warm")):
        ways.add_row(name, facts["arithmetic"], *_pace(facts, facts[key]), "", f"{facts[key] / facts['seconds']:.2f}", "")
    for one in facts["contenders"]:
        ratio = "" if one["seconds"] is None else f"{one['seconds'] / facts['seconds']:.2f}"
        part = one.get("items_timed") or facts["items"]
        note = one["reason"] or (f"on {part} items" if part < facts["items"] else "")
        ways.add_row(one["name"], one["dtype"], *_pace(facts, one["seconds"]), str(one.get("batch") or ""), ratio, note)
    shares = Table("share", "", "meaning", box=None)
    for name, meaning in SHARES.items():
        shares.add_row(name, f"{facts[name]:.2f}", meaning)
    notes = {name: value for name, value in facts.items() if name not in SHARES and not name.startswith("speedup_")}
    del notes["contenders"]
    return Group(ways, "", shares, "", facts_table({name: _rounded(value) for name, value in notes.items() if value is not None}))


def grid_table(rows: Sequence[Row]) -> Table:
    """The rows of a grid, skipped ones with their reason, ways that were not timed named."""
    from rich.table import Table

    ratios = (*WAYS, "best_contender")
    table = Table(*("P", "N", "L", "ms", "items/s", *(f"x {name}" for name in ratios), "matmul", "bound", "MiB", "note"))
    for row in rows:
        shape = (str(row[name]) for name in ("prefix", "items", "length"))
        if "skipped" in row:
            table.add_row(*shape, *[""] * 9, row["skipped"])
            continue
        speed = f"{row['seconds'] * 1e3:.1f}", f"{row['items_per_second']:.0f}"
        found = (_short(row[f"speedup_{name}"], 1) for name in ratios)
        shares = (_short(row[name], 2) for name in ("matmul_share", "lower_bound_share"))
        missing = [one["name"] for one in row["contenders"] if one["seconds"] is None]
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        table.add_row(*shape, *speed, *found, *shares, memory, f"not timed: {', '.join(missing)}" if missing else "")
    return table


def draw(rows: Sequence[Row], path: Path) -> None:
    """A picture of items per second against N, one field for each P and L, ours and the plain ways. Raises PictureError."""
    check_drawing()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    measured = [row for row in rows if "skipped" not in row]
    prefixes, lengths, counts = (sorted({row[name] for row in measured}) or [0] for name in ("prefix", "length", "items"))
    known: dict[str, Line2D] = {}
    figure = Figure(figsize=(4 * len(lengths), 3 * len(prefixes)), layout="constrained")
    fields = figure.subplots(len(prefixes), len(lengths), squeeze=False)
    for (down, prefix), (across, length) in itertools.product(enumerate(prefixes), enumerate(lengths)):
        field = fields[down][across]
        there = [row for row in measured if (row["prefix"], row["length"]) == (prefix, length)]
        there.sort(key=lambda row: row["items"])
        field.set(title=f"P={prefix} L={length}", xlabel="items N", ylabel="items/s", xscale="log", yscale="log")
        for number, name in enumerate(("ours", "ours, warm", *WAYS, "packed_dense")):
            points = [(row["items"], speed) for row in there if (speed := _speed(row, name))]
            if points:
                (known[name],) = field.plot(*zip(*points), marker="o", color=f"C{number}")
        field.set_xticks(counts, [f"{count:,}" for count in counts])
        field.set_xticks([], minor=True)
    figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=len(known))
    figure.savefig(path, dpi=120)


def check_drawing() -> None:
    """Raises PictureError where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PictureError('a picture needs matplotlib: pip install "brewline[evaluate]", or leave out --out') from error


def _pace(facts: Row, seconds: float | None) -> tuple[str, str]:
    return ("", "") if seconds is None else (f"{seconds * 1e3:.1f}", f"{facts['items'] / seconds:.0f}")


def _speed(row: Row, name: str) -> float | None:
    """Items per second of one way in a row, None where it was not measured."""
    if name in ("ours", "ours, warm"):
        seconds: float | None = row["seconds" if name == "ours" else "seconds_warm"]
    else:
        seconds = next((one["seconds"] for one in row["contenders"] if one["name"] == name), None)
    return None if seconds is None else row["items"] / seconds


def _short(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def _rounded(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
