"""`brewline ranker compress`: a plan file from a teacher to something small enough to serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Group
    from rich.table import Table


def compress(
    file: Annotated[Path, typer.Argument(help="The plan (YAML).", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps and their sizes; run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Distill, prune and quantize a ranker step by step, with a gate after each.

    Every step leaves a complete ranker folder with calibrators of its own under OUT; the table is OUT/results.md. A step that
    loses more than the plan allows ends its route, and the command with status 2. The same command goes on after a stop. Data
    with too few answers to judge a step is refused before anything is trained (--json: under "refused").

    Example: `brewline ranker compress benchmarks/compress.yaml --dry-run`
    """
    from ranking.cli.output import emit
    from ranking.cli.train_report import stages
    from ranking.learn import compress as chain
    from ranking.learn.compress_plan import CompressPlan
    from ranking.learn.questions import NothingToJudge

    plan = CompressPlan.read(file)
    if dry_run:
        steps = chain.planned(plan)
        emit({"steps": steps}, as_json=as_json, table=lambda: _steps(steps))
        return
    try:
        with stages() as stage:
            found = chain.compress(plan, stage)
    except NothingToJudge as refusal:
        emit({"refused": str(refusal)}, as_json=as_json, table=lambda: None)
        raise
    emit({**found, "results": str(plan.out / chain.TABLE)}, as_json=as_json, table=lambda: _models(found))
    chain.refuse_if_stopped(found, plan)


def _steps(steps: Sequence[Mapping[str, object]]) -> Table:
    from rich.table import Table

    from ranking.cli.output import words

    table = Table(*("route", "step", "kind", "parameters", "outside embeddings", "learns", "seeds there"), box=None)
    for step in steps:
        sizes = (f"{step[name]:,}" for name in ("parameters", "outside_embeddings", "learns"))
        told = (words(str(step[name])) for name in ("route", "step", "kind"))
        table.add_row(*told, *sizes, f"{step['there']}/{step['seeds']}")
    return table


def _models(found: Mapping[str, Any]) -> Group:
    """One line per model and seed, and every line of a gate that was not passed."""
    from rich.console import Group
    from rich.table import Table

    from ranking.cli.output import words

    columns = ("model, seed", "weights", "AUC", "NE", "ECE", "AUC lost, % (95 %)", "items/s", "gate")
    title = f"{found['test_candidates']:,} candidates after the test cut"
    models = Table(title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    for column in columns:
        models.add_column(column, no_wrap=column != columns[0], overflow="fold")
    broken = Table("model", "metric", "parent", "child", "lost (95 %)", "limit", title="Gates not passed", box=None)
    for row in found["rows"]:
        name = words(f"{row['route']}: {row['step']}, {row['seed']}" if row["route"] else row["step"])
        numbers = (f"{row[metric]:.4f}" for metric in ("auc", "ne", "ece"))
        lost = f"{100 * row['auc_lost']:.2f} ({100 * row['auc_lost_low']:.2f}..{100 * row['auc_lost_high']:.2f})"
        gate = "failed" if row["refused"] else "passed" if row["gate"] else ""
        size, speed = f"{row['parameters']:,}", f"{row['items_per_second']:,.0f}"
        models.add_row(name, size, *numbers, lost, speed, gate)
        for one in row["gate"]:
            if not one["passed"]:
                sides = (f"{one[side]:.4f}" for side in ("parent", "child"))
                spread = f"{one['lost']:+.4f} ({one['low']:+.4f} .. {one['high']:+.4f})"
                broken.add_row(name, one["metric"], *sides, spread, f"{one['limit']:g}")
    return Group(models, broken) if broken.row_count else Group(models)
