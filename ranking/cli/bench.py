"""`brewline bench`: ratios against peers in the same run, because the seconds of one machine say little about another."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from index.errors import BrewlineError

if TYPE_CHECKING:
    from rich.table import Table

    from ranking.prefill.bench import Wishes
    from ranking.prefill.operations import PrefillShape
    from retrieval.llama import Size

GRID = ((512, 1024, 2048), (50, 500, 2000), (16, 32, 128))
"""Prefix tokens, items and tokens of an item in `--grid`."""
WAYS = ("one_by_one", "prefix_cache")
SAMPLE, LONG_PREFIX = 128, 1500
"""Full prompts timed in a cell; the prefix after which a token's attention costs as much as its linear layers, roughly."""
ALLOCATORS = (
    "Fresh memory costs time, and how much depends on the allocator: measure under two and say which. This run used {allocator}; "
    "for another: LD_PRELOAD=libtcmalloc_minimal.so.4 brewline bench prefill ... (Debian package libtcmalloc-minimal4)."
)
BAD_REQUEST = 2
"""Exit status of a cell that the model cannot have, as `ranking.cli.main` says it."""

Row = Mapping[str, object]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure: every figure is a ratio against a peer in the same run.",
)


class GridError(BrewlineError):
    """A cell of the grid failed, or its picture cannot be drawn."""


class Precision(StrEnum):
    """Of the weights that the plain ways run with."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class OurPrecision(StrEnum):
    """Of the engine's weights; "auto" is the fastest on this machine."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.callback()
def _group() -> None:
    """Keeps `prefill` a subcommand while it is the only one."""


@app.command()
def prefill(
    prefix: Annotated[int, typer.Option(help="Tokens of the shared prefix.", min=1)] = 512,
    items: Annotated[int, typer.Option(help="Items in one request.", min=1)] = 500,
    length: Annotated[int, typer.Option(help="Tokens of each item.", min=1)] = 24,
    layers: Annotated[int, typer.Option(help="Depth of the model.", min=1)] = 6,
    hidden: Annotated[int, typer.Option(help="Width of the model.", min=8)] = 256,
    mlp: Annotated[int, typer.Option(help="Width of its MLP.", min=8)] = 768,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.", min=1)] = 2,
    vocab: Annotated[int, typer.Option(help="Vocabulary.", min=8)] = 8192,
    base: Annotated[
        Path | None, typer.Option(help="A checkpoint folder instead of random weights.", exists=True, file_okay=False)
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Weights of the model and arithmetic of the plain ways.")] = Precision.float32,
    arithmetic: Annotated[
        OurPrecision, typer.Option(help="Arithmetic of the engine; other than the dtype, it converts a copy of the weights.")
    ] = OurPrecision.auto,
    repeats: Annotated[int, typer.Option(help="Rounds; the engine runs once before each contender of a round.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Decides random weights and tokens.")] = 0,
    grid: Annotated[bool, typer.Option("--grid", help="Every P of 512-2048, N of 50-2000, L of 16-128, smallest first.")] = False,
    cell_seconds: Annotated[float, typer.Option(help="Leave out cells of the grid predicted to take longer.", min=1)] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Folder for prefill.json and prefill.png (extra `evaluate`).")] = None,
    allocator_note: Annotated[bool, typer.Option("--allocator-note", help="Say on stderr how to use another allocator.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Score N items after one prefix in one prefill, and in turn the plain Hugging Face ways at their best batch size.

    `seconds` is the median of the engine from nothing, `seconds_warm` with its prefix cached. `speedup_*` divides the plain ways'
    seconds by it (one_by_one: full prompts; prefix_cache: prefix once, items over its keys and values), `*_same_arithmetic`
    when they compute in the engine's precision. `matmul_share` is the time of the linear layers as bare matrix products over
    `seconds`, `lower_bound_share` the time that the fewest possible operations would take at that rate. `peak_bytes` is what two
    first requests added to the process, weights not included. Run it alone: a second busy process slows both several times.

    Example: `brewline bench prefill --prefix 1024 --items 500 --length 32 --json`
    """
    from ranking.prefill.operations import PrefillShape

    if out is not None:
        _check_drawing()
    if grid:
        shared: dict[str, object] = {
            "layers": layers,
            "hidden": hidden,
            "mlp": mlp,
            "heads": heads,
            "kv-heads": kv_heads,
            "vocab": vocab,
        }
        shared |= {"dtype": dtype.value, "arithmetic": arithmetic.value, "repeats": repeats, "seed": seed}
        words = [f"--{name}={value}" for name, value in shared.items()] + ([f"--base={base}"] if base else [])
        cells = [PrefillShape(*cell) for cell in itertools.product(*GRID)]
        _hand_over({"cells": measure_grid(cells, words, cell_seconds)}, out, allocator_note, as_json)
        return
    from ranking.prefill.bench import Wishes
    from retrieval.llama import Size

    size = Size(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, mlp=mlp, vocabulary=vocab)
    wishes = Wishes(dtype.value, arithmetic.value, repeats, seed)
    _hand_over(_measure(PrefillShape(prefix, items, length), base or size, wishes), out, allocator_note, as_json)


def _measure(shape: PrefillShape, source: Size | Path, wishes: Wishes) -> dict[str, object]:
    """The facts of one shape, measured in this process."""
    from ranking.cli.output import progress_bar
    from ranking.prefill.bench import bench_prefill, body_of, model_of

    model = model_of(source, wishes)
    with progress_bar("rounds") as report:
        measured = bench_prefill(model, shape, wishes, report)
    base = str(source) if isinstance(source, Path) else None
    told = {**asdict(shape), **asdict(body_of(model)), "vocab": model.config.vocab_size, "base": base}
    return {**told, "dtype": wishes.dtype, "seed": wishes.seed, **measured}


def measure_grid(cells: Sequence[PrefillShape], words: Sequence[str], cell_seconds: float) -> list[Row]:
    """One row per cell, the smallest first; a cell that would take too long has only its shape and a reason `skipped`.

    Each cell is a process of its own, so that no cell's memory hides in an earlier one's. Its time is foretold from the cell
    before it; at twice the limit it is ended. `words` are the options that all cells share. Raises GridError.
    """
    from ranking.cli.output import progress_bar

    rows: list[Row] = []
    pace = 0.0
    with progress_bar("cells") as report:
        for done, cell in enumerate(sorted(cells, key=_work)):
            report(done, len(cells))
            began, foretold = time.perf_counter(), pace * _work(cell)
            if foretold > cell_seconds:
                found: Row = {"skipped": f"foretold {foretold:.0f} s from the cell before it, the limit is {cell_seconds:.0f} s"}
            else:
                found = _cell(cell, words, 2 * cell_seconds)
                pace = (time.perf_counter() - began) / _work(cell)
            rows.append({**asdict(cell), **found})
        report(len(cells), len(cells))
    return rows


def _work(cell: PrefillShape) -> float:
    """What a cell costs: full prompts of a sample, everything else over the whole request; a long prefix makes tokens dearer."""
    rows = 5 * min(cell.items, SAMPLE) * (cell.prefix + cell.length) + 20 * (cell.prefix + cell.item_rows)
    return rows * (1 + cell.prefix / LONG_PREFIX)


def _cell(cell: PrefillShape, words: Sequence[str], limit: float) -> Row:
    """What a process of its own prints about a cell, or why it was ended."""
    shape = [f"--{name}={value}" for name, value in asdict(cell).items()]
    command = [sys.executable, "-m", "ranking.cli.main", "bench", "prefill", "--json", *shape, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"skipped": f"ended after {limit:.0f} s"}
    if done.returncode < 0:
        return {"skipped": f"ended by signal {-done.returncode}, most likely for want of memory"}
    if done.returncode == BAD_REQUEST:
        return {"skipped": done.stderr.strip().splitlines()[-1]}
    if done.returncode:
        raise GridError(f"the cell {' '.join(shape)} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return dict(json.loads(done.stdout))


def _hand_over(facts: dict[str, object], out: Path | None, allocator_note: bool, as_json: bool) -> None:
    """The facts are on stdout, and in a folder as JSON and as a picture if there is one."""
    from ranking.cli.output import console_err, emit, plain
    from ranking.cli.train_report import facts_table

    cells = facts.get("cells")
    rows: list[Row] = cells if isinstance(cells, list) else [facts]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "prefill.json").write_text(json.dumps(plain(facts), indent=1) + "\n", encoding="utf-8")
        draw(rows, out / "prefill.png")
    if allocator_note:
        console_err().print(
            ALLOCATORS.format(allocator=next((row["allocator"] for row in rows if "allocator" in row), "none yet"))
        )
    emit(facts, as_json=as_json, table=lambda: facts_table(_by_name(facts)) if cells is None else grid_table(rows))


def _by_name(facts: Row) -> Row:
    """The facts with one entry for each contender."""
    named = {f"{one['name']} {one['dtype']}": one for one in _contenders(facts)}
    return {name: value for name, value in facts.items() if name != "contenders"} | named


def _contenders(row: Row) -> Sequence[Row]:
    held = row["contenders"]
    assert isinstance(held, list)
    return held


def grid_table(rows: Sequence[Row]) -> Table:
    """The rows of a grid, skipped ones with their reason."""
    from rich.table import Table

    table = Table(*("P", "N", "L", "ms", "items/s", *(f"x {name}" for name in WAYS), "matmul", "bound", "MiB", "note"))
    for row in rows:
        shape = (str(row[name]) for name in ("prefix", "items", "length"))
        if "skipped" in row:
            table.add_row(*shape, *[""] * 7, str(row["skipped"]))
            continue
        ratios = (f"{_number(row, f'speedup_{name}'):.1f}" for name in WAYS)
        shares = (f"{_number(row, name):.2f}" for name in ("matmul_share", "lower_bound_share"))
        speed = f"{_number(row, 'seconds') * 1e3:.1f}", f"{_number(row, 'items_per_second'):.0f}"
        table.add_row(*shape, *speed, *ratios, *shares, f"{_number(row, 'peak_bytes') / 2**20:.0f}", "")
    return table


def draw(rows: Sequence[Row], path: Path) -> None:
    """A picture of items per second against N, one field for each P and L, ours and the plain ways. Raises GridError."""
    _check_drawing()
    from matplotlib.figure import Figure

    measured = [row for row in rows if "skipped" not in row]
    prefixes, lengths = (sorted({_number(row, name) for row in measured}) or [0] for name in ("prefix", "length"))
    figure = Figure(figsize=(4 * len(lengths), 3 * len(prefixes)), layout="constrained")
    fields = figure.subplots(len(prefixes), len(lengths), squeeze=False)
    for (down, prefix), (across, length) in itertools.product(enumerate(prefixes), enumerate(lengths)):
        field = fields[down][across]
        there = sorted(
            (row for row in measured if (row["prefix"], row["length"]) == (prefix, length)), key=lambda row: _number(row, "items")
        )
        for name in ("ours", "ours, warm", *WAYS, "packed_dense"):
            points = [(_number(row, "items"), speed) for row in there if (speed := _speed(row, name))]
            if points:
                field.loglog(*zip(*points), marker="o", label=name)
        field.set(title=f"P={prefix:.0f} L={length:.0f}", xlabel="items N", ylabel="items/s")
        if there:
            field.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _speed(row: Row, name: str) -> float | None:
    """Items per second of one way in a row, None where it was not measured."""
    if name in ("ours", "ours, warm"):
        seconds: object = row["seconds" if name == "ours" else "seconds_warm"]
    else:
        seconds = next((one["seconds"] for one in _contenders(row) if one["name"] == name), None)
    return _number(row, "items") / seconds if isinstance(seconds, float) else None


def _number(row: Row, name: str) -> float:
    """A row's figure, NaN where the machine could not say."""
    value = row[name]
    return float(value) if isinstance(value, int | float) else float("nan")


def _check_drawing() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise GridError('a picture needs matplotlib: pip install "brewline[evaluate]", or leave out --out') from error
