"""A ranker beside the simple baselines on the labelled test events: the report, its files and its table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Group
from rich.table import Table

from ranking.baselines import Scored
from ranking.evaluate import Judged, Rows, auc_difference, judge_scores
from retrieval.data.schema import Dataset
from retrieval.evidence.baselines import Knowledge
from retrieval.evidence.intervals import Estimate
from retrieval.evidence.report import METRICS_FILE, PLAIN, short, verdict, without_nan

SCORES_FILE = "scores.parquet"
SHOWN = {
    "member_auc": "per member",
    "log_loss": "log loss",
    "normalized_entropy": "NE",
    "calibration_error": "ECE",
    "request_ndcg@10": "NDCG@10",
}
NOT_SIMPLE = ("Base rate", "Oracle")


@dataclass(frozen=True)
class RankingRun:
    """One system's result."""

    name: str
    knowledge: Knowledge
    judged: Judged

    @property
    def label(self) -> str:
        """Name and knowledge: the same baseline appears frozen and live."""
        return f"{self.name}, {self.knowledge}"

    def as_dict(self) -> dict[str, object]:
        """The run ready for JSON."""
        return {"name": self.name, "counts": self.knowledge, **self.judged.as_dict()}


@dataclass(frozen=True)
class RankingReport:
    """All runs on the labelled test events. `best` is the label of the simple baseline with the highest AUC among those that
    know no more than the model; `differences` label -> model's AUC minus that run's, paired over members."""

    dataset: str
    counts: Knowledge
    facts: Mapping[str, object]
    model: RankingRun | None
    baselines: Sequence[RankingRun]
    best: str
    differences: Mapping[str, Estimate]

    def as_dict(self) -> dict[str, object]:
        """The report ready for JSON."""
        return {
            "dataset": self.dataset,
            "counts": self.counts,
            **self.facts,
            "model": None if self.model is None else self.model.as_dict(),
            "baselines": [run.as_dict() for run in self.baselines],
            "best_baseline": self.best,
            "auc_model_minus_baseline": {name: lead.as_dict() for name, lead in self.differences.items()},
        }


def evaluate_ranking(
    dataset: Dataset,
    rows: Rows,
    baselines: Sequence[Scored],
    counts: Knowledge,
    probability: npt.NDArray[np.float64] | None = None,
    name: str = "Ranker",
) -> RankingReport:
    """Returns the model's probabilities [E] (if any) beside those of the baselines."""
    runs = [RankingRun(one.name, one.knowledge, judge_scores(rows, one.probability)) for one in baselines]
    model = None if probability is None else RankingRun(name, counts, judge_scores(rows, probability))
    fair = [run for run in runs if run.name not in NOT_SIMPLE and (counts == "live" or run.knowledge == "frozen")]
    best = max(fair, key=lambda run: run.judged.auc.value).label if fair else ""
    leads = {} if model is None else {run.label: auc_difference(model.judged, run.judged) for run in runs}
    facts = {"events": len(rows), "members": len(np.unique(rows.member)), "positive_share": float(rows.label.mean())}
    return RankingReport(dataset.meta.name, counts, facts, model, runs, best, leads)


def write_ranking_report(report: RankingReport, rows: Rows, probability: npt.NDArray[np.float64] | None, folder: Path) -> None:
    """Writes metrics.json and, if a model was judged, scores.parquet (event_id, score, score_text) into `folder`.

    `score` is the calibrated probability of label 1; `score_text` that of the text model alone, the same until a fused head
    is part of the ranker.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(report.as_dict()), indent=1, allow_nan=False)
    (folder / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
    if probability is not None:
        score = pa.array(probability, pa.float64())
        table = pa.table({"event_id": pa.array(rows.event_id, pa.int64()), "score": score, "score_text": score})
        pq.write_table(table, folder / SCORES_FILE)


def ranking_table(report: RankingReport) -> Group:
    """Returns one row per system, ± the bootstrap error over members, and the model's lead with its paired interval."""
    facts = report.facts
    title = f"{report.dataset}: {facts['events']:,} labelled test events, {facts['positive_share']:.1%} positive"
    table = Table(title=title, **PLAIN)
    runs = [*([] if report.model is None else [report.model]), *report.baselines]
    shown = {metric: words for metric, words in SHOWN.items() if not math.isnan(runs[0].judged.metrics[metric])}
    for column in ("system", "AUC", *shown.values()):
        table.add_column(column, justify="left" if column == "system" else "right", no_wrap=column != "system")
    for run in runs:
        best = "*" if run.label == report.best else ""
        cells = [f"{best}{short(run.judged.auc.value)}±{short(run.judged.auc.error)}"]
        cells += [short(run.judged.metrics[metric]) for metric in shown]
        ours = run is report.model
        table.add_row(run.label, *cells, style="bold" if ours else None, end_section=ours)
    return Group(table, *([] if report.model is None else [_lead_table(report)]))


def _lead_table(report: RankingReport) -> Table:
    table = Table(title="Model's AUC minus the baseline's (paired bootstrap over members, 95 %)", **PLAIN)
    for column in ("baseline", "difference", "interval", "verdict"):
        table.add_column(column)
    for label, lead in report.differences.items():
        mark = "*" if label == report.best else ""
        table.add_row(f"{mark}{label}", f"{lead.value:+.4f}", f"{lead.low:+.4f} .. {lead.high:+.4f}", verdict(lead))
    return table
