"""`brewline evaluate served`: both stages end to end, the ranker's order beside the order of retrieval."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ranking.cli.evaluate_inputs import AsJson, Counts, CountsChoice, Data, Out
from ranking.cli.forms import HybridWeights, hybrid_settings


def served(
    data: Data,
    encoder: Annotated[Path, typer.Option("--encoder", help="The encoder folder.", show_default=False)],
    ranker: Annotated[Path, typer.Option("--ranker", help="The ranker folder; it must go with the encoder.", show_default=False)],
    counts: Counts = CountsChoice.live,
    task: Annotated[str, typer.Option(help="The task to rank for.", show_default="the ranker's first")] = "",
    hybrid: Annotated[bool, typer.Option("--hybrid", help="Rank the hybrid first stage's candidates too, apart.")] = False,
    hybrid_weights: HybridWeights = None,
    sample: Annotated[
        int | None, typer.Option(help="Ask only so many members, evenly spaced in time.", min=2, show_default="all")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What members get in the end: 2,000 candidates of the whole catalogue, ranked as `Recommend` ranks them.

    Recall, NDCG and MRR of the ranked order beside the order of retrieval, on the same candidates and members, with paired
    intervals, by length of history, for cold items and new members. The nights of the test window are replayed from the event
    log, so it takes no store. A model that was trained past this folder's test cut is refused.
    With --out it writes report.html, metrics.json, per_query.parquet and ranked.parquet (both orders), the hybrid's in a folder.

    Example: `brewline evaluate served WORLD --encoder models/encoder --ranker models/ranker --sample 200 --out results/served`
    """
    from ranking.cli.output import emit, progress_bar
    from ranking.ranker import Ranker
    from ranking.scored import check_encoder
    from ranking.served_evidence import evaluate_served, write_served
    from ranking.served_evidence_table import served_table
    from retrieval.data.read import read_dataset
    from retrieval.encoder import Encoder
    from retrieval.provenance import check_provenance

    settings = hybrid_settings(hybrid, hybrid_weights)
    dataset, judge = read_dataset(data), Ranker.load(ranker)
    check_encoder(judge, encoder)
    reader = Encoder.load(encoder)
    check_provenance(ranker, judge.facts.training, dataset)
    check_provenance(encoder, reader.facts.get("training", {}), dataset)
    with progress_bar("recommend") as bar:
        report = evaluate_served(dataset, reader, judge, counts.value, task, settings, sample, bar)
    if out is not None:
        write_served(report, dataset, out, shlex.join(["brewline", *sys.argv[1:]]))
    models = {"encoder": reader.fingerprint, "ranker": judge.fingerprint}
    emit({**report.as_dict(), **models}, as_json=as_json, table=lambda: served_table(report))
