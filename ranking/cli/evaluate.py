"""`brewline evaluate`: a model beside every simple baseline, on the same questions, with intervals."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranking.cli.evaluate_inputs import (
    AsJson,
    Counts,
    CountsChoice,
    Data,
    NotAsked,
    Out,
    ToldReaders,
    read_with_truth,
)
from ranking.cli.evaluate_instructions import instructions
from ranking.cli.evaluate_ranking import ranking, ranking_baselines
from ranking.cli.evaluate_served import served
from ranking.cli.forms import CodesChoice, HybridWeights, hybrid_settings

if TYPE_CHECKING:
    from rich.console import Group

    from retrieval.data.schema import Dataset
    from retrieval.data.world import Truth
    from retrieval.evidence.choice import Choice
    from retrieval.evidence.forms import Form, VectorModel

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Judge a trained model beside random, popularity, neighbours, text, blends and (in a synthetic world) the oracle.",
    epilog="The protocol is written out in docs/evaluation.md.",
)


class WindowChoice(StrEnum):
    """Which part of the log asks the questions."""

    test = "test"
    valid = "valid"


With = Annotated[
    list[str] | None,
    typer.Option("--with", help="A baseline to add, by name (sasrec costs minutes). Repeatable.", show_default=False),
]
Without = Annotated[
    list[str] | None,
    typer.Option("--without", help="A baseline to leave out, by name, or all. Repeatable.", show_default=False),
]
Sentence = Annotated[
    Path | None,
    typer.Option("--sentence-model", help="A local sentence-transformers folder as one more baseline.", show_default=False),
]


@app.command()
def retrieval(
    data: Data,
    encoder: Annotated[Path, typer.Option("--encoder", help="The encoder folder.", show_default=False)],
    counts: Counts = CountsChoice.live,
    wanted: With = None,
    unwanted: Without = None,
    sentence_model: Sentence = None,
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Judge the hybrid first stage too, apart.")] = False,
    hybrid_weights: HybridWeights = None,
    dims: Annotated[
        list[int] | None,
        typer.Option(help="Judge vectors of so many leading numbers too, apart. Repeatable.", min=1, show_default=False),
    ] = None,
    codes: Annotated[
        list[CodesChoice] | None,
        typer.Option(help="Judge item vectors kept so too, apart; with --dims, of each length. Repeatable.", show_default=False),
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Recall of an encoder over the whole catalogue, "last after the cut", beside the simple baselines.

    An encoder that was trained past this folder's test cut is refused.
    With --out it writes report.html, metrics.json, per_query.parquet and ranked.parquet (member_id, query_timestamp, item_ids,
    scores; 2,000 deep); the same about each form that is judged apart goes into a folder of its own in it.

    Example: `brewline evaluate retrieval WORLD --encoder models/encoder --counts live --out results/retrieval`

    Example: `brewline evaluate retrieval WORLD --encoder models/encoder --hybrid --dims 64 --dims 32 --codes int8`
    """
    from ranking.cli.output import emit
    from retrieval.encoder import Encoder
    from retrieval.evidence.choice import choose
    from retrieval.evidence.encoded import EncoderModel
    from retrieval.evidence.forms import HybridForm, coded_forms
    from retrieval.provenance import check_provenance

    choice = choose(wanted or (), unwanted or (), sentence_model)
    dataset, truth = read_with_truth(data)
    loaded = Encoder.load(encoder)
    check_provenance(encoder, loaded.facts.get("training", {}), dataset)
    model = EncoderModel(loaded, dataset, counts.value, dataset.meta.cut_test)
    forms = coded_forms(model.name, loaded.dims, dims or (), [one.value for one in codes or ()])
    if settings := hybrid_settings(hybrid, hybrid_weights):
        forms.append(HybridForm(dataset, counts.value, dataset.meta.cut_test, settings))
    content, shown = _judge_retrieval(dataset, truth, choice, model, counts, WindowChoice.test, out, forms)
    facts = {"encoder": loaded.fingerprint, "item_prompts_encoded": model.encoded}
    emit({**content, **facts}, as_json=as_json, table=lambda: shown)


def _judge_retrieval(
    dataset: Dataset,
    truth: Truth | None,
    choice: Choice,
    model: VectorModel | None,
    counts: CountsChoice,
    window: WindowChoice,
    out: Path | None,
    forms: Sequence[Form] = (),
) -> tuple[dict[str, object], Group]:
    """Tunes, judges and writes; returns the report for JSON and for the terminal."""
    from ranking.cli.output import progress_bar
    from retrieval.evidence.choice import choose_baselines
    from retrieval.evidence.evaluate import evaluate_retrieval
    from retrieval.evidence.forms import form_folder
    from retrieval.evidence.report import report_table
    from retrieval.evidence.saved import write_report

    with progress_bar("tune baselines") as bar:
        chosen = choose_baselines(dataset, bar, choice)
    with progress_bar("evaluate") as bar:
        report = evaluate_retrieval(dataset, model, counts.value, chosen, truth, window.value, bar, choice.left_out, forms)
    if out is not None:
        command = shlex.join(["brewline", *sys.argv[1:]])
        write_report(report, dataset, out, command)
        for form in report.apart:
            write_report(form, dataset, out / form_folder(form.own.name), command)
    return report.as_dict(), report_table(report)


app.command()(ranking)
app.command()(served)
app.command()(instructions)


@app.command()
def baselines(
    data: Data,
    window: Annotated[WindowChoice, typer.Option(help="test, or valid: the same one window earlier.")] = WindowChoice.test,
    wanted: With = None,
    unwanted: Without = None,
    sentence_model: Sentence = None,
    told: ToldReaders = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Every simple retrieval and ranking baseline, settings chosen on the validation window. Needs no model.

    --with and --without name retrieval baselines: random, popularity, recent, live, freshness, knn, ease, ials, tfidf, profile,
    bm25, blend; and, on request only, sasrec and sentence.

    Example: `brewline evaluate baselines WORLD --out results/baselines`
    """
    from rich.console import Group

    from ranking.cli.output import emit
    from retrieval.evidence.choice import choose

    choice = choose(wanted or (), unwanted or (), sentence_model)
    dataset, truth = read_with_truth(data, told=told)
    found: dict[str, dict[str, object]] = {}
    tables: list[Group] = []
    notes: dict[str, str] = {}
    parts = {
        "retrieval": lambda folder: _retrieval_baselines(dataset, truth, choice, window, folder),
        "ranking": lambda folder: _ranking_baselines(dataset, truth, window, folder, told),
    }
    for name, part in parts.items():
        try:
            found[name], shown = part(None if out is None else out / name)
            tables.append(shown)
        except NotAsked as reason:
            notes[name] = str(reason)
            tables.append(Group(f"{name}: {reason}"))
    emit({**found, "notes": notes}, as_json=as_json, table=lambda: Group(*tables))


@app.command()
def compare(
    first: Annotated[list[Path], typer.Argument(help="The folder(s) of the first run; several seeds count as their mean.")],
    second: Annotated[Path, typer.Argument(help="The folder of the run to compare with.", show_default=False)],
    system: Annotated[
        str | None, typer.Option(help="System of the first run(s); default: the model.", show_default=False)
    ] = None,
    rival: Annotated[str | None, typer.Option(help="System of the second run; default: its model.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Two saved retrieval runs on the same queries: differences with paired bootstrap intervals over members.

    A folder is what --out of `evaluate retrieval` (or the folder retrieval in that of `evaluate baselines`) holds.
    Runs that did not answer the same queries are refused.

    Example: `brewline evaluate compare results/seed1 results/seed2 results/seed3 results/seed1 --rival "Blend, live"`
    """
    from ranking.cli.output import emit
    from retrieval.evidence.compare import compare as compare_runs
    from retrieval.evidence.compare import compared_table, read_run

    found = compare_runs([read_run(folder, system) for folder in first], read_run(second, rival))
    emit(found.as_dict(), as_json=as_json, table=lambda: compared_table(found))


def _retrieval_baselines(
    dataset: Dataset, truth: Truth | None, choice: Choice, window: WindowChoice, out: Path | None
) -> tuple[dict[str, object], Group]:
    from retrieval.evidence.protocol import EvidenceError, last_after_cut

    try:
        last_after_cut(dataset, window.value)
    except EvidenceError as error:
        raise NotAsked(str(error)) from error
    return _judge_retrieval(dataset, truth, choice, None, CountsChoice.live, window, out)


def _ranking_baselines(
    dataset: Dataset, truth: Truth | None, window: WindowChoice, out: Path | None, told: bool
) -> tuple[dict[str, object], Group]:
    if window is WindowChoice.valid:
        raise NotAsked("labels are judged on the test split only")
    return ranking_baselines(dataset, truth, out, told=told)
