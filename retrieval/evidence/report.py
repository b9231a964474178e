"""What an evaluation leaves behind: `metrics.json` for machines, `ranked.parquet` for checks, a table for people."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Group
from rich.table import Table

from retrieval.data.schema import Dataset
from retrieval.evidence.evaluate import RetrievalReport, Run
from retrieval.evidence.intervals import Estimate
from retrieval.evidence.rank import write_ranked

METRICS_FILE = "metrics.json"
RANKED_FILE = "ranked.parquet"
SHOWN = ("recall@10", "recall@100", "recall@1000", "recall@2000", "ndcg@10", "mrr")
SLICE_SHOWN = ("recall@10", "recall@100", "recall@2000")


def write_report(report: RetrievalReport, dataset: Dataset, folder: Path) -> None:
    """Writes metrics.json and, if a model was judged, ranked.parquet into `folder` (made if need be)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(report.as_dict()), indent=1, allow_nan=False)
    (folder / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
    if report.ranked is not None:
        write_ranked(folder / RANKED_FILE, report.ranked, report.queries, dataset.members, dataset.items)


def without_nan(value: object) -> object:
    """Returns the value with None for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_table(report: RetrievalReport) -> Group:
    """Returns what a terminal shows: all systems, the model's lead with its interval, the model's slices."""
    parts = [systems_table(report)]
    if report.model is not None:
        parts += [lead_table(report), slices_table([report.model, *_best_runs(report)])]
    return Group(*parts)


def systems_table(report: RetrievalReport) -> Table:
    """Returns one row per system; ± is the standard error over members, * marks the best simple baseline of a column."""
    facts = report.facts
    title = f"{report.dataset}, last after the cut ({facts['window']}): {facts['members']:,} members, "
    title += f"{facts['candidates']:,} candidates, {facts['cold_target_share']:.1%} of the targets cold"
    table = Table(title=title, title_justify="left")
    for column in ("system", "counts", "setting"):
        table.add_column(column, overflow="fold")
    runs = [*([] if report.model is None else [report.model]), *report.baselines]
    shown = [name for name in SHOWN if name in runs[0].quality.metrics]
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        style = "bold" if run is report.model else None
        cells = [_with_error(run.quality.metrics[name], report.best.get(name) == run.name) for name in shown]
        table.add_row(run.name, run.knowledge, run.setting, *cells, style=style, end_section=run is report.model)
    return table


def _with_error(estimate: Estimate, best: bool) -> str:
    error = "" if math.isnan(estimate.error) else f" ± {estimate.error:.4f}"
    return f"{'*' if best else ''}{estimate.value:.4f}{error}"


def lead_table(report: RetrievalReport) -> Table:
    """Returns the model minus the best simple baseline of each metric, with the paired 95 % interval."""
    table = Table(title="Model minus the best simple baseline (paired bootstrap over members, 95 %)", title_justify="left")
    for column in ("metric", "best simple baseline", "difference", "interval", "verdict"):
        table.add_column(column, justify="right" if column in ("difference", "interval") else "left")
    for metric, baseline in report.best.items():
        lead = report.differences[baseline][metric]
        table.add_row(metric, baseline, f"{lead.value:+.4f}", f"{lead.low:+.4f} .. {lead.high:+.4f}", verdict(lead))
    return table


def verdict(difference: Estimate) -> str:
    """Returns what a paired interval says in one word."""
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "undecided"


def slices_table(runs: Iterable[Run]) -> Table:
    """Returns recall by slice; "n" counts members, for cold targets it counts targets."""
    table = Table(title="Slices: Recall@10 / @100 / @2000", title_justify="left")
    table.add_column("system", overflow="fold")
    rows = list(runs)
    for name, values in rows[0].quality.slices.items():
        table.add_column(f"{name} (n={int(values['n']):,})", justify="right")
    for run in rows:
        table.add_row(run.name, *(_slice_cell(values) for values in run.quality.slices.values()))
    return table


def _slice_cell(values: Mapping[str, float]) -> str:
    return " / ".join(f"{values[name]:.3f}" if name in values else "-" for name in SLICE_SHOWN)


def _best_runs(report: RetrievalReport) -> list[Run]:
    names = dict.fromkeys(report.best.values())
    return [run for run in report.baselines if run.name in names]
