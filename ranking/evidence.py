"""A ranker beside the simple baselines on the labelled test events: the report, its files and its table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ranking.baselines import Scored
from ranking.evaluate import Judged, Rows, auc_difference, engaged_before, judge_scores, order_alone, slice_leads
from ranking.metrics import reliability
from ranking.page import ranking_page, reliability_plot
from ranking.scores import OrderOnly, Scores
from ranking.told import TOLD
from retrieval.data.schema import Dataset
from retrieval.evidence.baselines import Knowledge
from retrieval.evidence.intervals import Estimate
from retrieval.evidence.report import METRICS_FILE, PLAIN, short, verdict, without_nan

SCORES_FILE, PAGE_FILE, RELIABILITY_FILE = "scores.parquet", "report.html", "reliability.png"
Floats = npt.NDArray[np.float64]
SHOWN = {
    "member_auc": "member",
    "log_loss": "loss",
    "normalized_entropy": "NE",
    "calibration_error_debiased": "ECE",
    "predicted_over_actual": "ratio",
    "member_ndcg@10": "NDCG",
    "request_ndcg@10": "request",
}
NOT_SIMPLE = ("Base rate", "Oracle", *TOLD)
KNOWS_TRUTH = "'Told' readers and the oracle know what is true of this world, each more than the one above: none is a rival."
TEXT_ONLY, WITHOUT_TEXT = "text only", "without text"
WORTH_OF_TEXT = 0.005
"""AUC that the fused model must lose without the text logit, else it is gradient boosting in disguise."""


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
    know no more than the model; `differences` label -> model's AUC minus that run's, paired over members. Of a ranker with a
    head, `variants` are the words alone and the numbers alone, `fusion` what the model gains over each of them. `gains`: system
    (the model, its words alone) -> slice -> AUC minus that of `best`, paired."""

    dataset: str
    counts: Knowledge
    facts: Mapping[str, object]
    model: RankingRun | None
    baselines: Sequence[RankingRun]
    best: str
    differences: Mapping[str, Estimate]
    variants: Sequence[RankingRun] = ()
    fusion: Mapping[str, Estimate] = field(default_factory=dict)
    gains: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """The report ready for JSON."""
        return {
            "dataset": self.dataset,
            "counts": self.counts,
            **self.facts,
            "model": None if self.model is None else self.model.as_dict(),
            "variants": [run.as_dict() for run in self.variants],
            "baselines": [run.as_dict() for run in self.baselines],
            "best_baseline": self.best,
            "auc_model_minus_baseline": {name: lead.as_dict() for name, lead in self.differences.items()},
            "auc_minus_best_by_slice": {
                system: {name: lead.as_dict() for name, lead in found.items()} for system, found in self.gains.items()
            },
            "auc_model_minus_variant": {name: lead.as_dict() for name, lead in self.fusion.items()},
            "fusion_verdict": self.verdict,
        }

    @property
    def runs(self) -> list[RankingRun]:
        """All systems, the model first."""
        return [*([] if self.model is None else [self.model]), *self.variants, *self.baselines]

    @property
    def caption(self) -> str | None:
        """What to know of rows that know the truth; None without any."""
        return KNOWS_TRUTH if any(run.name in TOLD for run in self.baselines) else None

    @property
    def verdict(self) -> str:
        """What the words are worth to the fused model, in words; "" without a head."""
        lost = self.fusion.get(WITHOUT_TEXT)
        if lost is None:
            return ""
        told = f"Taking the text logit away costs {lost.value:+.4f} AUC ({lost.low:+.4f} .. {lost.high:+.4f})"
        if lost.low >= WORTH_OF_TEXT:
            return f"{told}, surely {WORTH_OF_TEXT} or more: the words carry their part."
        if lost.high < WORTH_OF_TEXT:
            return f"{told}, surely less than {WORTH_OF_TEXT}: this is a gradient-boosting model in disguise."
        return f"{told}; whether it is {WORTH_OF_TEXT} or more is not shown."


def evaluate_ranking(
    dataset: Dataset,
    rows: Rows,
    baselines: Sequence[Scored],
    counts: Knowledge,
    scores: Scores | None = None,
    tasks: Mapping[str, Mapping[str, float]] | None = None,
) -> RankingReport:
    """Returns a ranker's scores (if any) beside those of the baselines; `tasks` holds the numbers of its other tasks.

    Slices by history count what `counts` knows of it.
    """
    if counts == "frozen":
        rows = replace(rows, history=engaged_before(dataset, rows.member, np.full(len(rows), dataset.meta.cut_test)))
    runs = [RankingRun(one.name, one.knowledge, _judged(rows, one)) for one in baselines]
    fair = [run for run in runs if run.name not in NOT_SIMPLE and (counts == "live" or run.knowledge == "frozen")]
    best = max(fair, key=lambda run: run.judged.auc.value).label if fair else ""
    facts: dict[str, object] = {"events": len(rows), "members": len(np.unique(rows.member))}
    facts |= {"positive_share": float(rows.label.mean()), "tasks": tasks or {}}
    if scores is None:
        return RankingReport(dataset.meta.name, counts, facts, None, runs, best, {})
    fused = scores.without_text is not None
    model = RankingRun("Ranker, fused" if fused else "Ranker", counts, judge_scores(rows, scores.final))
    held = {TEXT_ONLY: scores.text, WITHOUT_TEXT: scores.without_text} if fused else {}
    judged_apart = {model.name: scores.final} | ({f"Ranker, {TEXT_ONLY}": scores.text} if fused else {})
    rival = next((one.probability for one, run in zip(baselines, runs) if run.label == best), None)
    variants = {name: judge_scores(rows, found) for name, found in held.items() if found is not None}
    return RankingReport(
        dataset.meta.name,
        counts,
        facts,
        model,
        runs,
        best,
        {run.label: auc_difference(model.judged, run.judged) for run in runs},
        [RankingRun(f"Ranker, {name}", counts, judged) for name, judged in variants.items()],
        {name: auc_difference(model.judged, judged) for name, judged in variants.items()},
        {} if rival is None else {name: slice_leads(rows, found, rival) for name, found in judged_apart.items()},
    )


def _judged(rows: Rows, one: Scored) -> Judged:
    found = judge_scores(rows, one.probability)
    return order_alone(found) if isinstance(one, OrderOnly) else found


def write_ranking_report(report: RankingReport, rows: Rows, scores: Scores | None, folder: Path, command: str = "") -> None:
    """Writes metrics.json, report.html and, if a model was judged, scores.parquet (event_id, score, score_text) into `folder`.

    `score` is the calibrated probability of label 1 as served, `score_text` that of the text model alone. With matplotlib,
    reliability.png too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(report.as_dict()), indent=1, allow_nan=False)
    (folder / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
    if scores is not None:
        write_scores(rows, scores, folder / SCORES_FILE)
    picture = reliability_plot(_reliable(report, rows, scores))
    if picture is not None:
        (folder / RELIABILITY_FILE).write_bytes(picture)
    tables = {"All systems": systems_table(report), "Model minus baseline": _lead_table(report), "Slices": slices_table(report)}
    tables |= {"Gain over the best simple baseline by slice": gains_table(report)} if report.gains else {}
    tables |= {"Further tasks": tasks_table(report)} if report.facts["tasks"] else {}
    page = ranking_page(report.dataset, [report.verdict, report.caption or ""], tables, picture, command)
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")


def write_scores(rows: Rows, scores: Scores, path: Path) -> None:
    """Writes one row per labelled event: event_id int64, score and score_text float64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"score": pa.array(scores.final, pa.float64()), "score_text": pa.array(scores.text, pa.float64())}
    pq.write_table(pa.table({"event_id": pa.array(rows.event_id, pa.int64()), **columns}), path)


def _reliable(report: RankingReport, rows: Rows, scores: Scores | None) -> dict[str, tuple[Floats, Floats]]:
    """Mean prediction and share of positives by bin of what is plotted."""
    if scores is None or report.model is None:
        return {}
    shown = (
        {report.model.name: scores.final, f"Ranker, {TEXT_ONLY}": scores.text} if report.variants else {"Ranker": scores.final}
    )
    return {name: reliability(rows.label, found)[:2] for name, found in shown.items()}


def ranking_table(report: RankingReport) -> Group:
    """Returns one row per system, ± the bootstrap error over members, the model's lead with its paired interval, and slices."""
    leads = [] if report.model is None else [_lead_table(report), slices_table(report)]
    leads += [gains_table(report)] if report.gains else []
    leads += [tasks_table(report)] if report.facts["tasks"] else []
    return Group(systems_table(report), *leads, *([Text(report.verdict)] if report.verdict else []))


def systems_table(report: RankingReport) -> Table:
    """Returns one row per system; * marks the best simple baseline."""
    facts, runs = report.facts, report.runs
    title = f"{report.dataset}: {facts['events']:,} labelled test events, {facts['positive_share']:.1%} positive"
    table = Table(title=title, **PLAIN)
    shown = {metric: words for metric, words in SHOWN.items() if not math.isnan(runs[0].judged.metrics[metric])}
    for column in ("system", "AUC", *shown.values()):
        wide = column == "system"
        table.add_column(column, justify="left" if wide else "right", no_wrap=not wide, min_width=10 if wide else None)
    for run in runs:
        best = "*" if run.label == report.best else ""
        cells = [f"{best}{short(run.judged.auc.value)}±{short(run.judged.auc.error)}"]
        cells += ["-" if math.isnan(value := run.judged.metrics[metric]) else short(value) for metric in shown]
        ours = run is report.model
        table.add_row(run.label, *cells, style="bold" if ours else None, end_section=ours)
    table.caption = report.caption
    return table


def slices_table(report: RankingReport) -> Table:
    """Returns AUC by slice of the model, its variants and the best simple baseline."""
    chosen = [run for run in report.runs if run is report.model or run in report.variants or run.label == report.best]
    table = Table(title="AUC by slice; calibration of the first", **PLAIN)
    for column in ("slice", "n", "positive", "said", *(run.label for run in chosen)):
        table.add_column(column, justify="left" if column == "slice" else "right")
    for name, first in (chosen[0].judged.slices if chosen else {}).items():
        if first["n"]:
            cells = [short(run.judged.slices[name]["auc"]) for run in chosen]
            table.add_row(name, f"{first['n']:,}", short(first["mean_label"]), short(first["mean_prediction"]), *cells)
    return table


def gains_table(report: RankingReport) -> Table:
    """Returns by slice what the model, and its words alone, gain over the best simple baseline: do cold members gain most?"""
    table = Table(title=f"AUC minus that of {report.best}, by slice (paired bootstrap over its members, 95 %)", **PLAIN)
    for column in ("slice", "n", "system", "gain", "interval"):
        table.add_column(column, justify="left" if column in ("slice", "system") else "right", no_wrap=True)
    for name, size in ({} if report.model is None else report.model.judged.slices).items():
        for system, leads in report.gains.items():
            if name in leads:
                table.add_row(name, f"{size['n']:,}", system, *_cells(leads[name])[:2])
    return table


def _cells(lead: Estimate) -> tuple[str, str, str]:
    return f"{lead.value:+.4f}", f"{lead.low:+.4f} .. {lead.high:+.4f}", verdict(lead)


def tasks_table(report: RankingReport) -> Table:
    """Returns one row per further task of the ranker: the text model alone, no head joins there. A held-out task is zero-shot."""
    found = report.facts["tasks"]
    table = Table(title="Further tasks, text alone", **PLAIN)
    columns = {"auc": "AUC", **SHOWN}
    known = next(iter(found.values())) if isinstance(found, Mapping) and found else {}
    shown = {metric: words for metric, words in columns.items() if metric in known}
    for column in ("task", "taught", "candidates", "positive", *shown.values()):
        table.add_column(column)
    for name, values in found.items() if isinstance(found, Mapping) else ():
        taught = "never (held out)" if values["held_out"] else "yes"
        cells = [short(values[metric]) for metric in shown]
        table.add_row(name, taught, f"{values['candidates']:,.0f}", short(values["positive_share"]), *cells)
    return table


def _lead_table(report: RankingReport) -> Table:
    table = Table(title="Model's AUC minus the other's (paired bootstrap over members, 95 %)", **PLAIN)
    for column in ("other", "difference", "interval", "verdict"):
        table.add_column(column)
    for label, lead in {**report.fusion, **report.differences}.items():
        mark = "*" if label == report.best else ""
        table.add_row(f"{mark}{label}", *_cells(lead))
    return table
