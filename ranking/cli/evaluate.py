"""`brewline evaluate`: a model beside every simple baseline, on the same questions, with intervals."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Group

    from retrieval.data.schema import Dataset
    from retrieval.data.world import Truth
    from retrieval.evidence.choice import Choice
    from retrieval.evidence.evaluate import VectorModel

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Judge a trained model beside random, popularity, neighbours, text, blends and (in a synthetic world) the oracle.",
    epilog="The protocol is written out in docs/evaluation.md.",
)


class CountsChoice(StrEnum):
    """What the numbers in prompts may know: up to the day before the query, or up to the test cut."""

    live = "live"
    frozen = "frozen"


class WindowChoice(StrEnum):
    """Which part of the log asks the questions."""

    test = "test"
    valid = "valid"


Data = Annotated[Path, typer.Argument(help="The data folder.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for report.html, metrics.json and the scores.", show_default=False)
]
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
Counts = Annotated[CountsChoice, typer.Option(help="live: numbers as of each day's start; frozen: as of the test cut.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


@app.command()
def retrieval(
    data: Data,
    encoder: Annotated[Path, typer.Option("--encoder", help="The encoder folder.", show_default=False)],
    counts: Counts = CountsChoice.live,
    wanted: With = None,
    unwanted: Without = None,
    sentence_model: Sentence = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Recall of an encoder over the whole catalogue, "last after the cut", beside the simple baselines.

    An encoder that was trained past this folder's test cut is refused.
    With --out it writes report.html, metrics.json, per_query.parquet and ranked.parquet (member_id, query_timestamp, item_ids,
    scores; 2,000 deep).

    Example: `brewline evaluate retrieval WORLD --encoder models/encoder --counts live --out results/retrieval`
    """
    from ranking.cli.output import emit
    from retrieval.encoder import Encoder
    from retrieval.evidence.choice import choose
    from retrieval.evidence.encoded import EncoderModel
    from retrieval.provenance import check_provenance

    choice = choose(wanted or (), unwanted or (), sentence_model)
    dataset, truth = read_with_truth(data)
    loaded = Encoder.load(encoder)
    check_provenance(encoder, loaded.facts.get("training", {}), dataset)
    model = EncoderModel(loaded, dataset, counts.value, dataset.meta.cut_test)
    content, shown = _judge_retrieval(dataset, truth, choice, model, counts, WindowChoice.test, out)
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
) -> tuple[dict[str, object], Group]:
    """Tunes, judges and writes; returns the report for JSON and for the terminal."""
    from ranking.cli.output import progress_bar
    from retrieval.evidence.choice import choose_baselines
    from retrieval.evidence.evaluate import evaluate_retrieval
    from retrieval.evidence.report import report_table
    from retrieval.evidence.saved import write_report

    with progress_bar("tune baselines") as bar:
        chosen = choose_baselines(dataset, bar, choice)
    with progress_bar("evaluate") as bar:
        report = evaluate_retrieval(dataset, model, counts.value, chosen, truth, window.value, bar, choice.left_out)
    if out is not None:
        write_report(report, dataset, out, shlex.join(["brewline", *sys.argv[1:]]))
    return report.as_dict(), report_table(report)


@app.command()
def ranking(
    data: Data,
    ranker: Annotated[Path, typer.Option("--ranker", help="The ranker folder.", show_default=False)],
    encoder: Annotated[
        Path | None, typer.Option("--encoder", help="The encoder that the ranker must belong to.", show_default=False)
    ] = None,
    counts: Counts = CountsChoice.live,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """AUC, calibration and order of a ranker on the labelled test events, beside rates, LR and gradient boosting.

    A ranker or encoder that was trained past this folder's test cut is refused.
    With --out it writes metrics.json and scores.parquet (event_id, score, score_text).

    Example: `brewline evaluate ranking WORLD --ranker models/ranker --counts live --out results/ranking`
    """
    from ranking.baselines import simple_rankers
    from ranking.cli.output import emit, progress_bar
    from ranking.evaluate import labelled_test_rows
    from ranking.evidence import evaluate_ranking, ranking_table, write_ranking_report
    from ranking.ranker import Ranker
    from ranking.scored import check_encoder, score_rows
    from retrieval.encoder import read_facts
    from retrieval.provenance import check_provenance

    dataset, truth = read_with_truth(data)
    rows = labelled_test_rows(dataset)
    loaded = Ranker.load(ranker)
    check_provenance(ranker, loaded.facts.training, dataset)
    if encoder is not None:
        check_encoder(loaded, encoder)
        check_provenance(encoder, read_facts(encoder).get("training", {}), dataset)
    with progress_bar("rank") as bar:
        probability = score_rows(dataset, rows, loaded, counts.value, bar)
    with progress_bar("fit baselines") as bar:
        simple = simple_rankers(dataset, rows, truth, bar)
    report = evaluate_ranking(dataset, rows, simple, counts.value, probability)
    if out is not None:
        write_ranking_report(report, rows, probability, out)
    emit({**report.as_dict(), "ranker": loaded.fingerprint}, as_json=as_json, table=lambda: ranking_table(report))


@app.command()
def baselines(
    data: Data,
    window: Annotated[WindowChoice, typer.Option(help="test, or valid: the same one window earlier.")] = WindowChoice.test,
    wanted: With = None,
    unwanted: Without = None,
    sentence_model: Sentence = None,
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
    dataset, truth = read_with_truth(data)
    found: dict[str, dict[str, object]] = {}
    tables: list[Group] = []
    notes: dict[str, str] = {}
    parts = {
        "retrieval": lambda folder: _retrieval_baselines(dataset, truth, choice, window, folder),
        "ranking": lambda folder: _ranking_baselines(dataset, truth, window, folder),
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


class NotAsked(Exception):
    """One half of the comparison has no questions in this folder; the other half may."""


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
    dataset: Dataset, truth: Truth | None, window: WindowChoice, out: Path | None
) -> tuple[dict[str, object], Group]:
    from ranking.baselines import simple_rankers
    from ranking.cli.output import progress_bar
    from ranking.evaluate import RankingEvidenceError, labelled_test_rows
    from ranking.evidence import evaluate_ranking, ranking_table, write_ranking_report

    if window is WindowChoice.valid:
        raise NotAsked("labels are judged on the test split only")
    try:
        rows = labelled_test_rows(dataset)
    except RankingEvidenceError as error:
        raise NotAsked(str(error)) from error
    with progress_bar("fit ranking baselines") as bar:
        simple = simple_rankers(dataset, rows, truth, bar)
    report = evaluate_ranking(dataset, rows, simple, "live")
    if out is not None:
        write_ranking_report(report, rows, None, out)
    return report.as_dict(), ranking_table(report)


def read_with_truth(data: Path) -> tuple[Dataset, Truth | None]:
    """Returns the data set and, where it is a synthetic world, what is true of it.

    Raises DataError for a malformed folder, EvidenceError if the truth is that of another world.
    """
    from retrieval.data.read import read_dataset
    from retrieval.data.world import read_truth
    from retrieval.evidence.protocol import EvidenceError

    dataset = read_dataset(data)
    if not (data / "truth").is_dir():
        return dataset, None
    truth = read_truth(data)
    sizes = (len(truth.theta_first), len(truth.phi))
    if sizes != (len(dataset.members), len(dataset.items)):
        raise EvidenceError(
            f"{data}: the truth knows {sizes[0]} members and {sizes[1]} items, the data {len(dataset.members)} and "
            f"{len(dataset.items)}. Make the world again, or remove its folder truth."
        )
    return dataset, truth
