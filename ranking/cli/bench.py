"""`brewline bench`: ratios against peers in the same run, because the seconds of one machine say little about another."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from index.errors import BrewlineError
from ranking.cli.arithmetic import RankerArithmetic
from ranking.cli.bench_capacity import capacity
from ranking.cli.bench_embed import embed
from ranking.cli.bench_night import night
from ranking.cli.bench_report import Row, check_drawing, draw, grid_table, shape_table
from ranking.cli.bench_search import search
from ranking.cli.bench_serve import bench_serve

if TYPE_CHECKING:
    from ranking.prefill.bench import Wishes
    from ranking.prefill.operations import Body, PrefillShape
    from retrieval.llama import Size

GRID = ((512, 1024, 2048), (50, 500, 2000), (16, 32, 128))
"""Prefix tokens, items and tokens of an item in `--grid`."""
OUR_REQUESTS = 8
"""Requests of the engine without which a cell says nothing: memory, cold, warm, bare products, parity."""
ALLOCATORS = (
    "Fresh memory costs time, and how much depends on the allocator: measure under two and say which. This run used {allocator}; "
    "for another: LD_PRELOAD=libtcmalloc_minimal.so.4 brewline bench prefill ... (Debian package libtcmalloc-minimal4)."
)
BAD_REQUEST = 2
"""Exit status of a cell that the model cannot have, as `ranking.cli.main` says it."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure: every figure is a ratio against a peer in the same run.",
)


class GridError(BrewlineError):
    """A cell of the grid failed."""


class Precision(StrEnum):
    """Of the weights that the plain ways run with."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class ItemLengths(StrEnum):
    """Of the items of one request."""

    equal = "equal"
    mixed = "mixed"


app.command()(search)
app.command()(embed)
app.command()(night)
app.command("serve")(bench_serve)
app.command()(capacity)


@app.command()
def prefill(
    prefix: Annotated[int, typer.Option(help="Tokens of the shared prefix.", min=1)] = 512,
    items: Annotated[int, typer.Option(help="Items in one request.", min=1)] = 500,
    length: Annotated[int, typer.Option(help="Tokens of each item.", min=1)] = 24,
    lengths: Annotated[ItemLengths, typer.Option(help="mixed: evenly from half the length to 1.5 times.")] = ItemLengths.equal,
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
        RankerArithmetic,
        typer.Option(
            help="Arithmetic of the engine; other than the dtype, it converts a copy of the weights. int8 is never chosen by "
            "itself: max_abs_diff says how far its logits are from float32."
        ),
    ] = RankerArithmetic.auto,
    repeats: Annotated[int, typer.Option(help="Rounds; the engine runs once before each contender of a round.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Decides random weights and tokens.")] = 0,
    seconds: Annotated[float | None, typer.Option(help="Budget; contenders that do not fit say so.", min=1)] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Every P of 512-2048, N of 50-2000, L of 16-128, smallest first.")] = False,
    cell_seconds: Annotated[float, typer.Option(help="Budget of each cell of the grid.", min=1)] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Folder for prefill.json and prefill.png (extra `evaluate`).")] = None,
    allocator_note: Annotated[bool, typer.Option("--allocator-note", help="Say on stderr how to use another allocator.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Score N items after one prefix in one prefill, and in turn the plain Hugging Face ways at their best batch size.

    `seconds` is the median of the engine from nothing, `seconds_warm` with its prefix cached. `speedup_*` divides the plain ways'
    seconds by it (one_by_one: full prompts; prefix_cache: prefix once, a batch of items over copies of its keys; prefix_packed:
    prefix once, groups of items in one masked sequence), `speedup_best_contender` those of the fastest that was timed;
    `*_same_arithmetic` when they compute in the engine's precision. `matmul_share` is the time of the linear layers as bare
    matrix products over `seconds`, `lower_bound_share` that of the fewest operations at their rate, `operation_ratio_*` the
    speedup that operation counts alone allow. `seconds_p99` of few repetitions is about `seconds_max`. `peak_bytes` is what two
    first requests added to the process, weights not included. Run it alone: a second busy process slows both several times.

    Example: `brewline bench prefill --prefix 1024 --items 500 --length 32 --json`
    """
    from ranking.prefill.operations import PrefillShape

    if out is not None:
        check_drawing()
    if grid:
        sizes = zip(("layers", "hidden", "mlp", "heads", "kv-heads", "vocab"), (layers, hidden, mlp, heads, kv_heads, vocab))
        rest = {"dtype": dtype.value, "arithmetic": arithmetic.value, "repeats": repeats, "seed": seed, "seconds": cell_seconds}
        words = [f"--{name}={value}" for name, value in (*sizes, *rest.items())] + ([f"--base={base}"] if base else [])
        cells = [PrefillShape(*cell, lengths.value) for cell in itertools.product(*GRID)]
        _hand_over({"cells": measure_grid(cells, words, cell_seconds)}, out, allocator_note, as_json)
        return
    from ranking.prefill.bench import Wishes
    from retrieval.llama import Size

    size = Size(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, mlp=mlp, vocabulary=vocab)
    wishes = Wishes(dtype.value, arithmetic.value, repeats, seed, seconds or math.inf)
    _hand_over(_measure(PrefillShape(prefix, items, length, lengths.value), base or size, wishes), out, allocator_note, as_json)


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

    Each cell is a process of its own, so that no cell's memory hides in an earlier one's. What the engine alone will take is
    foretold from the fewest operations of the cell and the engine's best rate so far (one disturbed cell must not rule out all
    that follow); the contenders keep to what is left. At twice the limit a cell is ended. `words` are the options that all cells
    share. Raises GridError.
    """
    from ranking.cli.output import progress_bar
    from ranking.prefill.operations import lower_bound

    rows: list[Row] = []
    last: Row | None = None
    pace = math.inf
    with progress_bar("cells") as report:
        for done, cell in enumerate(sorted(cells, key=lambda cell: (cell.prefix + cell.item_rows, cell.prefix))):
            report(done, len(cells))
            if last:
                pace = min(pace, last["seconds"] / last["lower_bound_operations"])
            foretold = OUR_REQUESTS * pace * lower_bound(_body(last), cell) if last else 0.0
            if foretold > cell_seconds:
                found: Row = {"skipped": f"foretold {foretold:.0f} s for the engine alone, the limit is {cell_seconds:.0f} s"}
            else:
                found = _cell(cell, words, 2 * cell_seconds)
                last = last if "skipped" in found else found
            rows.append({**asdict(cell), **found})
        report(len(cells), len(cells))
    return rows


def _body(row: Row) -> Body:
    from ranking.prefill.operations import Body

    return Body(**{field.name: row[field.name] for field in fields(Body)})


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
    emit(facts, as_json=as_json, table=lambda: shape_table(facts) if cells is None else grid_table(rows))
