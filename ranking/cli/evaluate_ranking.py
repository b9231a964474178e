"""`brewline evaluate ranking`: a ranker beside rates, regression and boosting on the labelled test events."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranking.cli.arithmetic import How, RankerArithmetic
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

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from ranking.ranker import Ranker
    from ranking.unseen import TaskJudged
    from retrieval.data.schema import Dataset
    from retrieval.data.world import Truth

WITHOUT_ENCODER = "the head reads retrieval's cosine, which is unknown here: name the --encoder to score as the service does"

OneTask = Annotated[
    str | None,
    typer.Option("--task", help="Judge this task alone: FILE#NAME, or a name that the ranker knows.", show_default=False),
]
Shots = Annotated[
    int | None,
    typer.Option("--shots", help="Examples in cold members' prompts.", min=0, max=16, show_default="as the ranker serves"),
]


def ranking(
    data: Data,
    ranker: Annotated[Path, typer.Option("--ranker", help="The ranker folder.", show_default=False)],
    encoder: Annotated[
        Path | None,
        typer.Option("--encoder", help="The encoder it belongs to: its cosine joins the head and the table.", show_default=False),
    ] = None,
    counts: Counts = CountsChoice.live,
    task: OneTask = None,
    shots: Shots = None,
    arithmetic: How = RankerArithmetic.float32,
    told: ToldReaders = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """AUC, calibration and order of a ranker on the labelled test events, beside rates, LR and gradient boosting.

    A ranker with a head is shown fused, as it serves, beside its text alone and its numbers alone. A ranker or encoder that was
    trained past this folder's test cut is refused. With --out it writes report.html, metrics.json, reliability.png and
    scores.parquet (event_id, score, score_text). With --task the ranker alone is judged on one task, be it one that it never saw.

    Example: `brewline evaluate ranking WORLD --ranker models/ranker --counts live --out results/ranking`
    """
    from ranking.baselines import simple_rankers
    from ranking.cli.output import emit, progress_bar
    from ranking.evaluate import labelled_test_rows
    from ranking.evidence import evaluate_ranking, ranking_table, write_ranking_report
    from ranking.ranker import Ranker
    from ranking.scored import check_encoder, other_tasks, retrieval_alone, score_rows
    from retrieval.encoder import Encoder
    from retrieval.provenance import check_provenance

    dataset, truth = read_with_truth(data, told=told)
    loaded = Ranker.load(ranker, arithmetic=arithmetic.value)
    check_provenance(ranker, loaded.facts.training, dataset)
    if task is not None or shots is not None:
        _one_task(dataset, loaded, task or "", counts, shots, as_json)
        return
    rows = labelled_test_rows(dataset)
    reader = None
    if encoder is not None:
        check_encoder(loaded, encoder)
        reader = Encoder.load(encoder)
        check_provenance(encoder, reader.facts.get("training", {}), dataset)
    with progress_bar("rank") as bar:
        scores = score_rows(dataset, rows, loaded, counts.value, reader, bar)
    with progress_bar("fit baselines") as bar:
        simple = simple_rankers(dataset, rows, truth, bar, with_told=told)
    if reader is not None and scores.cosine is not None:
        simple.append(retrieval_alone(dataset, scores.cosine, reader, counts.value))
    report = evaluate_ranking(dataset, rows, simple, counts.value, scores, other_tasks(dataset, loaded, counts.value))
    missing = loaded.head is not None and loaded.head.reads_cosine and reader is None
    facts = {"ranker": loaded.fingerprint, "arithmetic": loaded.engine.arithmetic, "notes": [WITHOUT_ENCODER] if missing else []}
    report = replace(report, facts={**report.facts, **facts})
    if out is not None:
        write_ranking_report(report, rows, scores, out, shlex.join(["brewline", *sys.argv[1:]]))
    emit(report.as_dict(), as_json=as_json, table=lambda: ranking_table(report))
    if missing and not as_json:
        sys.stderr.write(f"{WITHOUT_ENCODER}\n")


def _one_task(dataset: Dataset, ranker: Ranker, task: str, counts: CountsChoice, shots: int | None, as_json: bool) -> None:
    from ranking.cli.output import emit, progress_bar
    from ranking.unseen import judge_task, named_or_read

    with progress_bar("rank") as bar:
        found = judge_task(dataset, ranker, named_or_read(task, ranker.tasks), counts.value, shots, bar)
    emit({"ranker": ranker.fingerprint, **found.as_dict()}, as_json=as_json, table=lambda: _task_table(found))


def _task_table(found: TaskJudged) -> Table:
    from rich.table import Table

    seen = f'trained on as "{found.taught}"' if found.taught else "never trained on"
    table = Table(title=f"Task {found.task.name}: {seen}, {found.shots} examples, text alone", title_justify="left")
    for column in ("candidates", "n", "positive", "AUC", "said"):
        table.add_column(column, justify="left" if column == "candidates" else "right")
    auc = found.judged.auc
    table.add_row(
        "all", f"{found.candidates:,}", f"{found.positive_share:.3f}", f"{auc.value:.4f} ({auc.low:.4f} .. {auc.high:.4f})"
    )
    for name, one in found.judged.slices.items():
        if one["n"]:
            table.add_row(name, f"{one['n']:,}", f"{one['mean_label']:.3f}", f"{one['auc']:.4f}", f"{one['mean_prediction']:.3f}")
    return table


def ranking_baselines(
    dataset: Dataset, truth: Truth | None, out: Path | None, *, told: bool = False
) -> tuple[dict[str, object], Group]:
    from ranking.baselines import simple_rankers
    from ranking.cli.output import progress_bar
    from ranking.evaluate import RankingEvidenceError, labelled_test_rows
    from ranking.evidence import evaluate_ranking, ranking_table, write_ranking_report

    try:
        rows = labelled_test_rows(dataset)
    except RankingEvidenceError as error:
        raise NotAsked(str(error)) from error
    with progress_bar("fit ranking baselines") as bar:
        simple = simple_rankers(dataset, rows, truth, bar, with_told=told)
    report = evaluate_ranking(dataset, rows, simple, "live")
    if out is not None:
        write_ranking_report(report, rows, None, out)
    return report.as_dict(), ranking_table(report)
