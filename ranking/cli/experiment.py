"""`brewline experiment`: a grid of trainings and evaluations in one command, one row each, resumable."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Group

    from ranking.cli.train_report import StageReport
    from retrieval.learn.experiment import Kind
    from retrieval.learn.grid import Experiment, Run

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Many trainings, each judged, in one results table.",
    epilog="benchmarks/evidence.yaml is an example, benchmarks/ranker_scaling.yaml one for rankers.",
)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="The experiment (YAML).", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its predicted cost; run nothing.")] = False,
    retry: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Train and judge every cell of an experiment: one default, some factors, some data sets, some seeds.

    Each cell does what `brewline encoder train` and `brewline evaluate retrieval` do, or with `kind: ranker` in the file what
    `brewline ranker train` and `brewline evaluate ranking` do (without baselines), and leaves a row in OUT/results.parquet and
    OUT/results.md, its model in OUT/models and its lists in OUT/judged (for `brewline evaluate compare`). Rows are known by a
    digest of settings and data: the same command goes on after a stop, and runs only what is new after a change. A cell that
    fails leaves a row with the reason.

    Example: `brewline experiment run benchmarks/evidence.yaml --dry-run`
    """
    from ranking.cli.memory import keep_freed_memory
    from ranking.cli.output import console_err, emit, words
    from ranking.cli.train_report import facts_table, stages
    from retrieval.learn.experiment import run_experiment
    from retrieval.learn.grid import Experiment

    keep_freed_memory()
    experiment = Experiment.read(file)
    if dry_run:
        content, shown = _plan(experiment)
        emit(content, as_json=as_json, table=lambda: shown)
        return
    with ExitStack() as bars:

        def begin(number: int, of: int, run: Run) -> StageReport:
            bars.close()
            console_err().print(words(f"[{number}/{of}] {run.words}"))
            return bars.enter_context(stages())

        found = run_experiment(experiment, begin, retry=retry, kind=_kind(experiment))
    facts = {**found, "results": str(experiment.out / "results.md")}
    emit(facts, as_json=as_json, table=lambda: facts_table(facts))


def _kind(experiment: Experiment) -> Kind:
    from ranking.learn.experiment import RANKERS
    from retrieval.learn.experiment import ENCODERS

    return RANKERS if experiment.kind == "ranker" else ENCODERS


def _plan(experiment: Experiment) -> tuple[dict[str, object], Group]:
    """What would run and how long it may take, for JSON and for the terminal. Cells that share a training pay for it once."""
    from rich.console import Group
    from rich.table import Table

    from ranking.cli.output import words
    from retrieval.data.read import read_dataset
    from retrieval.learn.experiment import pending
    from retrieval.learn.results import read_rows

    rows, kind = read_rows(experiment.out), _kind(experiment)
    jobs = kind.jobs(experiment, {name: read_dataset(folder) for name, folder in experiment.data.items()})
    waiting = pending(jobs, rows, retry=False)
    table = Table("run", "minutes", "from", box=None)
    paid = {str(row["model"]) for row in rows.values()}
    total, planned = 0.0, []
    for job in waiting:
        seconds, source = (0.0, "trained already") if job.model in paid else kind.seconds(job, experiment, rows)
        paid.add(job.model)
        total += seconds
        planned.append({"run": job.run.words, "seconds": round(seconds), "from": source, "digest": job.digest})
        table.add_row(words(job.run.words), f"{seconds / 60:.1f}", source)
    done = len({job.digest for job in jobs}) - len(waiting)
    words_of_sum = (
        f"{len(waiting)} to run, {done} there, about {total / 3600:.2f} hours (judging comes on top unless taken from rows)"
    )
    return {"runs": planned, "there": done, "seconds": round(total)}, Group(table, words_of_sum)
