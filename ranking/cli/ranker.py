"""`brewline ranker`: train the model that scores all candidates of a member in one pass."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranking.cli.compress import compress
from ranking.cli.out_folder import out_folder
from ranking.cli.stages import run

if TYPE_CHECKING:
    from rich.table import Table

    from ranking.learn.train import TrainReport

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The ranker: a LLaMA that reads a member and scores every candidate in one prefill.",
    epilog="Start with `brewline ranker train DATA --out RANKER --minutes 5`.",
)


class Calibration(StrEnum):
    """How a logit becomes a probability."""

    platt = "platt"
    isotonic = "isotonic"
    temperature = "temperature"


Base = Annotated[
    str | None, typer.Option(help="A LLaMA checkpoint to start from (a folder, or a hub name).", show_default="from scratch")
]
Encoder = Annotated[
    Path | None,
    typer.Option(help="An encoder folder: its tokenizer, numbers and word vectors are the start.", show_default=False),
]
Minutes = Annotated[float | None, typer.Option(help="How long to train; the steps reached are recorded.", show_default="5")]
Steps = Annotated[int | None, typer.Option(help="How many steps instead: the same seed gives the same weights.", min=1)]
LearningRate = Annotated[
    float | None,
    typer.Option(help="The highest learning rate.", min=1e-9, show_default="3e-4, or chosen by trials in a long run"),
]
LoraRank = Annotated[int | None, typer.Option(help="With --base: train LoRA of this rank instead of all weights.", min=1)]
Fusion = Annotated[
    bool, typer.Option("--fusion/--no-fusion", help="Join numbers and retrieval's cosine to the words in a small head.")
]
Calibrated = Annotated[Calibration, typer.Option(help="How the text model's own probabilities are fitted on later events.")]
TasksFile = Annotated[
    Path | None,
    typer.Option("--tasks", help="A YAML file of tasks (docs/tasks.md).", show_default="those of the folder", metavar="FILE"),
]
Shots = Annotated[int, typer.Option(help="Answered examples of other members in the prompts of cold members.", min=0, max=16)]
Wishes = Annotated[float, typer.Option(help="Share of training groups with a member's instruction made by rule.", min=0, max=1)]
More = Annotated[
    list[str] | None,
    typer.Option("--set", help="A further setting, as in layout.grouped=true. Repeatable.", metavar="PART.NAME=VALUE"),
]


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="The data folder.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(help="The ranker folder to write; it must not hold a ranker yet.", show_default=False, callback=out_folder),
    ],
    base: Base = None,
    encoder: Encoder = None,
    minutes: Minutes = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    lora_rank: LoraRank = None,
    fusion: Fusion = True,
    calibration: Calibrated = Calibration.platt,
    tasks: TasksFile = None,
    shots: Shots = 0,
    wishes: Wishes = 0.0,
    more: More = None,
    seed: Annotated[int, typer.Option(help="Decides every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Train a ranker on labels and impressions, or on engagements alone, and leave a complete folder.

    Learning rate and length are chosen on the validation window, and where there are labels a head that joins numbers to the
    words is fitted there; then the model is fitted again on everything before the test cut, and its probabilities are calibrated
    on members held back in the newest days. An encoder that was trained past that cut is refused. A killed run goes on
    from its last checkpoint when started again on the same data.

    Example: `brewline ranker train my-data --out my-ranker --encoder my-encoder --minutes 20`
    """
    from ranking.cli.output import emit
    from ranking.cli.train_report import how_long, stages
    from ranking.learn.settings import with_settings
    from ranking.learn.start import RankerPlan
    from ranking.learn.train import train_ranker
    from ranking.tasks_file import read_tasks
    from retrieval.data.read import read_dataset
    from retrieval.learn.checkpoint import TrainingError

    if lora_rank is not None and base is None:
        raise TrainingError("--lora-rank needs --base: there is nothing to adapt in a model that starts from scratch")
    plan = RankerPlan(
        steps=steps,
        minutes=how_long(steps, minutes),
        seed=seed,
        learning_rate=learning_rate,
        base=base,
        lora_rank=lora_rank,
        encoder=None if encoder is None else str(encoder),
        fusion=fusion,
        calibration=calibration.value,
        tasks=() if tasks is None else tuple(read_tasks(tasks).values()),
        wishes=wishes,
        shots=shots,
    )
    dataset = read_dataset(data)
    with stages() as stage:
        report = train_ranker(dataset, out, with_settings(plan, more or []), stage)
    emit(vars(report), as_json=as_json, table=lambda: _table(report))


@app.command()
def export(
    ranker: Annotated[Path, typer.Argument(help="The ranker folder.", show_default=False)],
    data: Annotated[Path, typer.Option(help="The data folder whose groups the two engines are compared on.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    int8: Annotated[bool, typer.Option("--int8", help="Products in int8; refused unless the ranking stays the same.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Write the ranker's prefill engine for onnxruntime, to score token ids where there is no torch, and compare it.

    What it takes and gives is in docs/prefill.md. An int8 engine that orders candidates differently is not admitted.

    Example: `brewline ranker export my-ranker --data my-data --out my-ranker-onnx`
    """
    from ranking.cli.output import emit
    from ranking.cli.train_report import facts_table
    from ranking.export import export_ranker
    from retrieval.data.read import read_dataset

    facts = export_ranker(ranker, read_dataset(data), out, int8=int8)
    emit(facts, as_json=as_json, table=lambda: facts_table(facts))


app.command()(compress)
app.command("stages")(run)


def _table(report: TrainReport) -> Table:
    from rich.table import Table

    from ranking.cli.train_report import places

    table = Table(title=f"Ranker {report.fingerprint}", title_justify="left", show_header=False)
    table.add_row("folder", report.folder)
    table.add_row("steps", f"{report.steps:,} in {report.seconds:,.0f} s, {report.tokens_per_second:,.0f} tokens/s")
    tried = ", ".join(f"{rate}: AUC {reached:.4f}" for rate, reached in report.trials.items())
    table.add_row("learning rate", f"{report.learning_rate:g}" + (f" (trials: {tried})" if tried else ""))
    table.add_row("parameters", f"{report.parameters:,}")
    for name, measures in report.validation.items():
        words = f"AUC {measures['auc']:.4f}, calibration error {measures['calibration_error']:.4f}"
        table.add_row(f"validation: {name}", f"{words}, {measures['candidates']:,.0f} candidates")
    for name, words in places(report.positions).items():
        table.add_row(f"positions: {name}" if name else "positions", words)
    if report.note:
        table.add_row("note", report.note)
    return table
