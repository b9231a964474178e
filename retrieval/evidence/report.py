"""What an evaluation shows on a terminal: all systems, their settings, the model's lead, its slices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypedDict

from rich.box import SIMPLE_HEAD, Box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from retrieval.evidence.evaluate import RetrievalReport
from retrieval.evidence.intervals import Estimate
from retrieval.evidence.similarity import Similarity


class TableStyle(TypedDict):
    """How every table of an evaluation looks."""

    box: Box
    title_justify: Literal["left"]
    title_style: str
    pad_edge: bool


METRICS_FILE = "metrics.json"
SHOWN = ("recall@10", "recall@100", "recall@2000", "ndcg@10")
SLICE_SHOWN = ("recall@10", "recall@100", "recall@2000")
PLAIN: TableStyle = {"box": SIMPLE_HEAD, "title_justify": "left", "title_style": "bold", "pad_edge": False}


def without_nan(value: object) -> object:
    """Returns the value with None for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_table(report: RetrievalReport) -> Group:
    """Returns what a terminal of 80 columns shows: all systems, the settings, the model's lead, the model's slices."""
    parts: list[RenderableType] = [systems_table(report), settings_line(report)]
    if report.model is not None:
        parts += [lead_table(report), slices_table(report)]
    if report.apart:
        parts.append(apart_table(report))
    if report.similarity is not None:
        parts.append(Text(similarity_line(report.similarity)))
    return Group(*parts)


def systems_table(report: RetrievalReport) -> Table:
    """Returns one row per system; ± is the standard error over members, * marks the best simple baseline of a column."""
    facts = report.facts
    title = f"{report.dataset} ({facts['window']} window): {facts['members']:,} members, {facts['candidates']:,} candidates, "
    table = Table(title=f"{title}{facts['cold_target_share']:.1%} of the targets cold", **PLAIN)
    runs = [*([] if report.model is None else [report.model]), *report.baselines]
    shown = [name for name in SHOWN if name in runs[0].quality.metrics]
    table.add_column("system", overflow="fold", min_width=19)
    for name in shown:
        table.add_column(_column(name), justify="right", no_wrap=True)
    for run in runs:
        ours = run is report.model
        name = f"{run.name} ({run.knowledge})" if ours else run.name
        cells = [with_error(run.quality.metrics[metric], report.best.get(metric) == run.name) for metric in shown]
        table.add_row(name, *cells, style="bold" if ours else None, end_section=ours)
    return table


def _column(metric: str) -> str:
    return metric.replace("recall", "R").replace("ndcg", "NDCG")


def with_error(estimate: Estimate, best: bool = False) -> str:
    """Returns a mean with its standard error; a star in front marks the best simple baseline."""
    error = "" if math.isnan(estimate.error) else f"±{short(estimate.error)}"
    return f"{'*' if best else ''}{short(estimate.value)}{error}"


def short(value: float) -> str:
    """Returns a number with four decimals and without a leading zero."""
    text = f"{value:.4f}"
    return text[1:] if text.startswith("0.") else text


def similarity_line(found: Similarity) -> str:
    """Returns how far the model's cosine follows popularity, in one sentence."""
    within = found.within_member
    return (
        f"Cosine against log popularity over {len(found.cosine):,} pairs: Pearson {found.pearson:+.4f}, Spearman "
        f"{found.spearman:+.4f}; within a member {within.value:+.4f} ({within.low:+.4f} .. {within.high:+.4f})."
    )


def settings_line(report: RetrievalReport) -> Text:
    """Returns the settings that the validation window chose, and what is frozen or live."""
    told = [f"{run.name} ({run.knowledge}): {run.setting}" for run in report.baselines]
    missing = "".join(f" Left out: {name}, {reason}." for name, reason in report.left_out.items())
    return Text("Settings: " + "; ".join(told) + f". * marks the best simple baseline.{missing}\n", style="dim")


def lead_table(report: RetrievalReport) -> Table:
    """Returns the model minus the best simple baseline of each metric, with the paired 95 % interval."""
    table = Table(title="Model minus best simple baseline (paired bootstrap over members, 95 %)", **PLAIN)
    for column in ("metric", "best simple baseline", "difference", "interval", "verdict"):
        table.add_column(column, justify="right" if column in ("difference", "interval") else "left")
    for metric, baseline in report.best.items():
        lead = report.differences[baseline][metric]
        table.add_row(metric, baseline, f"{lead.value:+.4f}", f"{lead.low:+.4f} .. {lead.high:+.4f}", verdict(lead))
    return table


def apart_table(report: RetrievalReport) -> Table:
    """Returns a row for each other form of the model, and below it that form minus the model, paired over members."""
    table = Table(title="Reported apart: other forms of the model, and each minus the model (paired, 95 %)", **PLAIN)
    shown = [name for name in SHOWN if name in report.own.quality.metrics]
    table.add_column("system", overflow="fold", min_width=19)
    for name in shown:
        table.add_column(_column(name), justify="right")
    for form in report.apart:
        leads = [form.differences[report.own.name][name] for name in shown]
        table.add_row(form.own.name, *(with_error(form.own.quality.metrics[name]) for name in shown))
        told = (f"{lead.value:+.4f} {verdict(lead)}" for lead in leads)
        table.add_row(Text(form.own.setting, style="dim"), *told, end_section=True)
    return table


def verdict(difference: Estimate) -> str:
    """Returns what a paired interval says in one word."""
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "undecided"


def slices_table(report: RetrievalReport) -> Table:
    """Returns recall by slice of the model and of the baseline to beat; "n" counts members, for cold targets targets."""
    rival = next((run for run in report.baselines if run.name == report.best.get("recall@100")), None)
    runs = [run for run in (report.model, rival) if run is not None]
    table = Table(title="Slices: R@10 / R@100 / R@2000", **PLAIN)
    for column in ("slice", "n"):
        table.add_column(column)
    for run in runs:
        table.add_column(run.name, justify="right")
    for name, values in runs[0].quality.slices.items():
        table.add_row(name, f"{int(values['n']):,}", *(_slice_cell(run.quality.slices[name]) for run in runs))
    return table


def _slice_cell(values: Mapping[str, float]) -> str:
    return " / ".join(short(values[name]) if name in values else "-" for name in SLICE_SHOWN)
