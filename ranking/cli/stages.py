"""`brewline ranker stages`: a plan file from text to an aligned ranker, one gated stage after the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table


def run(
    file: Annotated[Path, typer.Argument(help="The plan (YAML).", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the stages; read no data, run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Read, learn tasks, follow instructions, align: each stage a complete ranker, with a suite and a gate after it.

    Every stage leaves its folder under OUT; the table is OUT/results.md. A stage that does not pass its gate ends the plan, and
    the command with status 2. The same command goes on after a stop.

    Example: `brewline ranker stages benchmarks/stages.yaml --dry-run`
    """
    from ranking.cli.output import emit
    from ranking.cli.train_report import stages
    from ranking.learn import stages as chain
    from ranking.learn.stages_plan import StagesPlan

    plan = StagesPlan.read(file)
    if dry_run:
        rows = chain.planned(plan)
        emit({"stages": rows}, as_json=as_json, table=lambda: _plan(rows))
        return
    with stages() as stage:
        found = chain.run_stages(plan, stage)
    emit({**found, "results": str(plan.out / chain.TABLE)}, as_json=as_json, table=lambda: _results(found))
    chain.refuse_if_stopped(found, plan)


def _plan(rows: Sequence[Mapping[str, object]]) -> Table:
    from rich.table import Table

    from ranking.cli.output import words

    table = Table("stage", "kind", "steps", "there", box=None)
    for row in rows:
        table.add_row(words(str(row["stage"])), str(row["kind"]), f"{row['steps']:,}", "yes" if row["there"] else "no")
    return table


def _results(found: Mapping[str, Any]) -> Table:
    """Stages side by side, a line for each number: there are more numbers than stages."""
    from rich.table import Table

    from ranking.cli.output import words

    rows = found["rows"]
    table = Table("", box=None, title=words(found["name"]), title_justify="left")
    for row in rows:
        table.add_column(words(row["stage"]), justify="right")
    for name in ("auc", "ne", "ece"):
        table.add_row(f"test {name.upper()}", *(f"{row['test'][name]:.4f}" for row in rows))
    for name in dict.fromkeys(name for row in rows for name in row["suite"]):
        table.add_row(name.replace("_", " "), *(f"{row['suite'][name]:.4f}" if name in row["suite"] else "" for row in rows))
    table.add_row("gate", *("stopped" if row["refused"] else "passed" for row in rows))
    return table
