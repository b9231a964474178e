"""`brewline index tune`: measured choice of the index that a night builds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ranking.cli.output import emit, progress_bar

if TYPE_CHECKING:
    from index.hits import Vectors
    from index.tune import Choice, Point


def tune(
    store: Annotated[
        Path | None, typer.Option(help="Vectors of the served snapshot.", exists=True, file_okay=False, metavar="DIR")
    ] = None,
    items: Annotated[
        int, typer.Option(help="Without --store: so many vectors of the generator of `bench search`.", min=1)
    ] = 200_000,
    dims: Annotated[int, typer.Option(help="Without --store: numbers of each vector.", min=2)] = 128,
    queries: Annotated[
        Path | None,
        typer.Option(
            help="Real query vectors, a .npy of floats [Q, D]: members held out. Default: some of the items.", exists=True
        ),
    ] = None,
    asked: Annotated[int, typer.Option(help="Queries that are measured.", min=8)] = 128,
    k: Annotated[int, typer.Option(help="How many are to be found.", min=1)] = 2_000,
    target: Annotated[float, typer.Option(help="Mean recall at k that the index must reach.", min=0.01, max=1)] = 0.95,
    most_ms: Annotated[float | None, typer.Option(help="Milliseconds that a query may take (median).")] = None,
    most_mib: Annotated[int | None, typer.Option(help="Memory that the index may take, in MiB.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the training sample and the k-means.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="The choice as JSON, for `brewline nightly --recipe`.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Build the indexes that suit this size, measure recall against latency, and choose the quickest that reaches the target.

    Memory and disk are predicted before anything is built; an index that would not fit is left out.

        brewline index tune --store store/ --queries members.npy --target 0.95 --out recipe.json
        brewline index tune --items 1000000 --dims 128 --most-mib 700 --json
    """
    from index.tune import Wishes, candidates, choose, frontier, predict

    vectors, questions, source = _measured_on(store, items, dims, queries, asked, seed)
    wishes = Wishes(k, target, most_ms, None if most_mib is None else most_mib << 20, seed)
    count, width = vectors.shape
    recipes = candidates(count, width, wishes)
    weights = {str(recipe): asdict(predict(count, width, recipe)) for recipe in recipes}
    points: list[Point] = []
    with progress_bar("tune") as bar:
        for done, recipe in enumerate(recipes):
            bar(done, len(recipes))
            points += frontier(vectors, questions, [recipe], wishes, source)
        bar(len(recipes), len(recipes))
    choice = choose(points, wishes, count, width, source)
    if out is not None:
        choice.write(out)
    found = {"items": count, "dims": width, "queries": len(questions), "source": source, "predicted": weights}
    found |= {"points": [asdict(point) for point in points], "choice": asdict(choice)}
    emit(found, as_json=as_json, table=lambda: _table(points, choice))


def _measured_on(
    store: Path | None, items: int, dims: int, queries: Path | None, asked: int, seed: int
) -> tuple[Vectors, Vectors, str]:
    """Vectors, queries, and where the queries came from ("members", "items", or "generator")."""
    import numpy as np

    from index.bench import made_items, made_queries
    from index.build import sample_queries
    from index.hits import check_queries
    from index.tune import TuneError
    from ranking.cli.bench_search import vectors_of_store

    vectors = made_items(items, dims) if store is None else vectors_of_store(store)
    if queries is not None:
        try:
            given = np.load(queries, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise TuneError(f"--queries {queries}: {error}; expected a .npy of floats [Q, {vectors.shape[1]}]") from None
        return vectors, sample_queries(check_queries(given, vectors.shape[1]), asked, seed), "members"
    if store is None:
        return vectors, made_queries(asked, dims, 0), "generator"
    return vectors, sample_queries(vectors, asked, seed), "items"


def _table(points: Sequence[Point], choice: Choice) -> Table:
    title = f"Chosen: {choice.recipe} ({choice.measured.recall:.4f} in {choice.measured.p50_ms:.2f} ms), queries: {choice.source}"
    table = Table("index", "lists visited", "recall", "worst 5 %", "p50 ms", "build s", "MiB memory", "MiB disk", title=title)
    for point in sorted(points, key=lambda one: one.recall):
        sizes = (f"{size / 2**20:,.0f}" for size in (point.weight.memory, point.weight.disk))
        figures = (f"{point.recall:.4f}", f"{point.recall_p5:.3f}", f"{point.p50_ms:.2f}", f"{point.build_seconds:.1f}")
        table.add_row(point.recipe, str(point.nprobe), *figures, *sizes)
    return table
