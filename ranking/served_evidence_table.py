"""What `brewline evaluate served` shows on a terminal: both orders, their difference, and that by slice."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ranking.served_evidence import ServedReport
from retrieval.evidence.intervals import Estimate
from retrieval.evidence.report import PLAIN, short, verdict, with_error

SHOWN = {"recall@10": "R@10", "recall@100": "R@100", "ndcg@10": "NDCG@10", "mrr": "MRR"}
BY_SLICE = ("recall@10", "recall@100")


def served_table(report: ServedReport) -> Group:
    """Returns each order ± its standard error, ranked minus retrieval (paired), and the slices; the hybrid's below."""
    reports = [report, *(form for form in report.apart if isinstance(form, ServedReport))]
    parts = [part for one in reports for part in (orders_table(one), leads_table(one), slices_table(one))]
    return Group(*parts, Text(report.own.setting, style="dim"))


def orders_table(report: ServedReport) -> Table:
    """Returns one row per order; the title says how many members were asked, and of how many."""
    facts = report.facts
    asked = f"{facts['members']:,} members" + (f", a SAMPLE of {facts['members_in_window']:,}" if facts["sampled"] else "")
    table = Table(title=f"{report.dataset}, {report.counts} counts, end to end: {asked}; {facts['candidates']:,} items", **PLAIN)
    shown = _shown(report)
    table.add_column("order")
    for words in shown.values():
        table.add_column(words, justify="right", no_wrap=True)
    for run in (report.own, *report.baselines):
        table.add_row(run.name, *(with_error(run.quality.metrics[metric]) for metric in shown))
    return table


def leads_table(report: ServedReport) -> Table:
    """Returns the ranked order minus each other one by metric, with its paired 95 % interval."""
    table = Table(title=f"{report.own.name} minus the other (paired bootstrap over members, 95 %)", **PLAIN)
    for column in ("other", "metric", "difference", "interval", "verdict"):
        table.add_column(column, justify="right" if column in ("difference", "interval") else "left")
    for name, leads in report.differences.items():
        for metric, words in _shown(report).items():
            table.add_row(name, words, *_cells(leads[metric]))
    return table


def slices_table(report: ServedReport) -> Table:
    """Returns by slice recall of both orders and their paired difference; the last slice weighs members alike, not targets."""
    ours, rival = report.own.quality, report.baselines[0]
    table = Table(title=f"Slices: {rival.name.lower()}, ranked, and the difference (paired, 95 %)", **PLAIN)
    for column in ("slice", "n", "metric", "found", "ranked", "difference", "interval"):
        table.add_column(column, justify="left" if column in ("slice", "metric") else "right", no_wrap=True)
    for name, leads in report.leads_by_slice.items():
        one, other = rival.quality.slices[name], ours.slices[name]
        for metric in (metric for metric in BY_SLICE if metric in leads):
            cells = (f"{int(one['n']):,}", metric.replace("recall", "R"), short(one[metric]), short(other[metric]))
            table.add_row(name, *cells, *_cells(leads[metric])[:2])
    return table


def _shown(report: ServedReport) -> dict[str, str]:
    """The metrics that the lists are deep enough for."""
    return {metric: words for metric, words in SHOWN.items() if metric in report.own.quality.metrics}


def _cells(lead: Estimate) -> tuple[str, str, str]:
    return f"{lead.value:+.4f}", f"{lead.low:+.4f} .. {lead.high:+.4f}", verdict(lead)
