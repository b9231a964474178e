"""`brewline bench search`: top-k search of every kind at the k that recommenders ask for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranking.cli.bench_report import check_drawing
from ranking.cli.output import emit, plain, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from index.bench import Method, Progress, Row, Wishes
    from index.hits import Vectors

INTERRUPTED = 130
"""The exit status that shells give to what Ctrl-C ended."""
DEFAULT = "ours,faiss,faiss-hnsw,torch,hnswlib,usearch,scann"


def search(
    items: Annotated[int, typer.Option(help="Vectors to search in, of the generator.", min=1)] = 1_000_000,
    dims: Annotated[int, typer.Option(help="Numbers of each vector.", min=2)] = 128,
    k: Annotated[int, typer.Option(help="How many are to be found.", min=1)] = 2_000,
    batch: Annotated[int, typer.Option(help="Queries in one call.", min=1)] = 1,
    shift: Annotated[
        float, typer.Option(help="How far queries lie apart from items: the length of a constant offset.", min=0)
    ] = 0,
    methods: Annotated[str, typer.Option(help="Which to measure, by commas; also faiss-flat, gpu-exact, gpu-torch.")] = DEFAULT,
    lists: Annotated[
        list[int] | None,
        typer.Option(help="A number of lists in FAISS's grid; may be repeated.", min=1, show_default="1024 4096 16384"),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Vectors of the served snapshot; queries are some of them.", exists=True, file_okay=False),
    ] = None,
    judged: Annotated[int, typer.Option(help="Queries that recall is measured on.", min=1)] = 128,
    seconds: Annotated[float, typer.Option(help="Time of each setting.", min=0)] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Folder for search.json and search.png (extra `evaluate`).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Latency, throughput, recall and memory of ours and its peers at equal vectors, queries and k.

    Each row of `rows` is one method with one setting: milliseconds of a call (`p50_ms`, `p99_ms`), queries per second (`qps`),
    recall against an exact float32 search (`recall_mean`, `recall_p5`: the worst twentieth), `bytes` of index and vectors. A
    library that is not installed has a row that says so. Run it alone; rows whose `yardstick_ms` differ were disturbed. A million
    vectors take more than half an hour of two cores, 13 minutes of it FAISS's training of 16,384 lists; Ctrl-C keeps what was
    measured.

        brewline bench search --items 1000000 --dims 128 --k 2000 --batch 256 --json
        brewline bench search --items 200000 --shift 1 --methods ours,faiss --lists 1024 --lists 4096 --out frontier/
        brewline bench search --store store/ --k 500
    """
    from index.bench import Wishes, machine, made_items, made_queries
    from index.bench_peers import LISTS, methods_named

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if lists and "faiss" not in names:
        raise typer.BadParameter("they are FAISS's: name faiss among the --methods too", param_hint="--lists")
    if out is not None:
        check_drawing()
    chosen = methods_named(names, lists or LISTS)
    wishes = Wishes(k, batch, judged, seconds)
    asked = max(judged, batch)
    vectors, queries = _of_store(store, asked, shift) if store else (made_items(items, dims), made_queries(asked, dims, shift))
    facts = {**asdict(wishes), "items": len(vectors), "dims": vectors.shape[1], "shift": shift, "store": store, **machine()}
    with progress_bar("search") as bar:
        rows, complete = _measured(vectors, queries, chosen, wishes, lambda _, done, total: bar(done, total))
    found = {**facts, "complete": complete, "rows": [row.plain() for row in rows]}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "search.json").write_text(json.dumps(plain(found), indent=1) + "\n", encoding="utf-8")
        draw_frontier(rows, out / "search.png")
    emit(found, as_json=as_json, table=lambda: search_table(rows))
    if not complete:
        raise typer.Exit(INTERRUPTED)


def _measured(
    vectors: Vectors, queries: Vectors, chosen: list[Method], wishes: Wishes, progress: Progress
) -> tuple[list[Row], bool]:
    """The rows, and whether these are all: Ctrl-C ends the measuring and keeps what was measured."""
    from index.bench import measure

    rows: list[Row] = []
    try:
        for row in measure(vectors, queries, chosen, wishes, progress):
            rows.append(row)
    except KeyboardInterrupt:
        if not rows:
            raise
        return rows, False
    return rows, True


def _of_store(store: Path, asked: int, shift: float) -> tuple[Vectors, Vectors]:
    """The vectors of the served snapshot, and some of them as queries."""
    import numpy as np

    from index.bench import shifted

    vectors = vectors_of_store(store)
    chosen = np.random.default_rng(0).choice(len(vectors), min(asked, len(vectors)), replace=False)
    return vectors, shifted(vectors[np.sort(chosen)], shift)


def vectors_of_store(store: Path) -> Vectors:
    """The vectors [N, D] of the served snapshot are returned, in memory. Raises PublishError if there is none."""
    import numpy as np

    from index.publish import PublishError, current
    from index.snapshot import Snapshot

    path = current(store)
    if path is None:
        raise PublishError(f"{store} serves no snapshot yet: run `brewline nightly` first, or leave out --store")
    return np.ascontiguousarray(Snapshot.open(path, verify=False).vectors, dtype=np.float32)


def search_table(rows: Sequence[Row]) -> Table:
    """One line per row, in the order in which they were measured."""
    from rich.table import Column, Table

    columns = (Column("method", no_wrap=True), Column("setting", no_wrap=True))
    table = Table(*columns, "p50 ms", "p99 ms", "queries/s", "recall", "worst 5 %", "MiB", "build s", "note")
    for row in rows:
        numbers = ((row.p50_ms, 2), (row.p99_ms, 2), (row.qps, 0), (row.recall_mean, 4), (row.recall_p5, 3))
        size = None if row.bytes is None else row.bytes / 2**20
        shown = [
            "" if value is None else f"{value:,.{places}f}" for value, places in (*numbers, (size, 0), (row.build_seconds, 1))
        ]
        table.add_row(row.method, row.setting, *shown, row.note or "")
    return table


def draw_frontier(rows: Sequence[Row], path: Path) -> None:
    """A picture of milliseconds per call against recall, each index a line. Raises PictureError."""
    check_drawing()
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.recall_mean is not None and row.p50_ms is not None:
            name = f"{row.method} {row.setting.split(' ')[0]}"
            lines.setdefault(name, []).append((row.recall_mean, row.p50_ms))
    figure = Figure(figsize=(9, 6), layout="constrained")
    field = figure.subplots()
    for number, (name, points) in enumerate(lines.items()):
        ours = name.startswith("ours")
        field.plot(
            *zip(*sorted(points)),
            marker="o",
            label=name,
            color=f"C{number % 10}",
            linewidth=3 if ours else 1,
            linestyle="-" if number < 10 else "--",
        )
    field.set(xlabel="recall at k", ylabel="ms per call (median)", yscale="log")
    field.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
