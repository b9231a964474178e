"""The report as one HTML page: plots inside, nothing fetched, no scripts, every word of a stranger escaped."""

from __future__ import annotations

import logging
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.util import find_spec

from retrieval.evidence.evaluate import RetrievalReport
from retrieval.evidence.metrics import CUTOFFS
from retrieval.evidence.plots import SLICE_METRICS, all_plots, runs_of
from retrieval.evidence.report import short, similarity_line, verdict, with_error

log = logging.getLogger(__name__)

NO_PLOTS = (
    "No plots: matplotlib is not installed. All numbers are in the tables; pip install 'brewline[evaluate]' draws them too."
)
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem;font-variant-numeric:tabular-nums}th,td{padding:.15rem .6rem;
border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child{text-align:left}img{max-width:100%}
tr.ours{font-weight:600}code{background:#f3f3f3;padding:.1rem .3rem;overflow-wrap:anywhere}p.note{color:#a33}"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PROTOCOL = (
    "Query: the last time point at or after the cut at which a member engages with an item that is new to them, if they did "
    "something strictly earlier. Targets: the new items of that time point. History: every strictly earlier engagement of that "
    "member. Candidates: the whole catalogue minus the history; nothing is sampled. Settings of the baselines are chosen by "
    "recall@100 on the validation window, where nothing at or after the test cut is known."
)
KNOWLEDGE = {
    "live": "Live: item vectors are rebuilt at the start of each query's day with counts up to that moment. The model is "
    "compared with live and frozen baselines.",
    "frozen": "Frozen: one set of item vectors with counts before the cut; the member is still read as of the query. The model "
    "is compared with frozen baselines only.",
}
READING = (
    "± is the standard error over members; intervals are 95 % percentile bootstrap over members, of differences in pairs. * "
    "marks the best simple baseline of a column, chosen on these very queries. Cold targets: nobody engaged with them before the "
    "cut; their n counts targets. New members: all of their history lies after the cut."
)


def render_page(report: RetrievalReport, command: str = "") -> str:
    """Returns the page. Without matplotlib it says so in place of the plots, and so does the log."""
    plots: Mapping[str, bytes] = {}
    if find_spec("matplotlib") is None:
        log.warning(NO_PLOTS)
    else:
        plots = all_plots(report)
    title = escape(f"Retrieval on {report.dataset}: {report.facts['window']} window")
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title>'
    return "\n".join(
        [
            f"<!DOCTYPE html><html lang='en'><head>{head}<style>{STYLE}</style></head><body><h1>{title}</h1>",
            *_question(report, command),
            *([] if plots else [_paragraph(NO_PLOTS, "note")]),
            *_systems(report, plots),
            *_leads(report),
            *_slices(report, plots),
            *_similarity(report, plots),
            "</body></html>\n",
        ]
    )


def _question(report: RetrievalReport, command: str) -> list[str]:
    facts = [(str(name).replace("_", " "), _number(value)) for name, value in report.facts.items()]
    shown = [f"<p>Command: <code>{escape(command)}</code></p>"] if command else []
    return [*shown, _table(("fact", ""), facts), *map(_paragraph, (PROTOCOL, KNOWLEDGE[report.counts], READING))]


def _systems(report: RetrievalReport, plots: Mapping[str, bytes]) -> list[str]:
    runs = runs_of(report)
    metrics = list(runs[0].quality.metrics) if runs else []
    lists = list(runs[0].quality.lists) if runs else []
    rows = []
    for run in runs:
        values = [with_error(run.quality.metrics[name], report.best.get(name) == run.name) for name in metrics]
        rows.append((run.name, run.knowledge, *values, *(_number(run.quality.lists[name]) for name in lists)))
    curve = [(run.name, *map(short, run.quality.curve.values())) for run in runs]
    cutoffs = [str(cutoff) for cutoff in (runs[0].quality.curve if runs else ())]
    return [
        "<h2>All systems</h2>",
        _picture(plots, "curves", "Recall against K of every system"),
        _table(("system", "counts", *metrics, *lists), rows, ours=report.model is not None),
        "<h3>Recall at K</h3>",
        _table(("K", *cutoffs), curve, ours=report.model is not None),
        "<h3>Settings</h3>",
        _table(("system", "setting"), [(run.name, run.setting) for run in runs]),
        *(_paragraph(f"Left out: {name}, {reason}.", "note") for name, reason in report.left_out.items()),
    ]


def _leads(report: RetrievalReport) -> list[str]:
    if report.model is None:
        return []
    rows = [
        (run, metric, f"{lead.value:+.4f}", f"{lead.low:+.4f} .. {lead.high:+.4f}", verdict(lead))
        for run, of_metric in report.differences.items()
        for metric, lead in of_metric.items()
    ]
    return ["<h2>Model minus baseline</h2>", _table(("baseline", "metric", "difference", "interval", "verdict"), rows)]


def _slices(report: RetrievalReport, plots: Mapping[str, bytes]) -> list[str]:
    runs = runs_of(report)
    if not runs:
        return []
    rows = [
        (name, run.name, _number(values["n"]), *(_slice_cell(values, cutoff) for cutoff in CUTOFFS))
        for name in runs[0].quality.slices
        for run, values in ((run, run.quality.slices[name]) for run in runs)
    ]
    columns = ("slice", "system", "n", *(f"recall@{cutoff}" for cutoff in CUTOFFS))
    told = "by slice: the model and the baselines that are best at it over all members"
    pictures = [_picture(plots, f"slices {metric}", f"{metric} {told}") for metric in SLICE_METRICS]
    return ["<h2>Slices</h2>", *pictures, _table(columns, rows)]


def _slice_cell(values: Mapping[str, float], cutoff: int) -> str:
    name = f"recall@{cutoff}"
    return f"{short(values[name])} ±{short(values[f'{name} error'])}" if name in values else "-"


def _similarity(report: RetrievalReport, plots: Mapping[str, bytes]) -> list[str]:
    if report.similarity is None:
        return []
    picture = _picture(plots, "similarity", "Cosine of member and candidate against log popularity")
    return ["<h2>Similarity against popularity</h2>", _paragraph(similarity_line(report.similarity)), picture]


def _number(value: object) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.4f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], ours: bool = False) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    lines = [f"<tr{' class=ours' if ours and not number else ''}>{row}</tr>" for number, row in enumerate(body)]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def _picture(plots: Mapping[str, bytes], name: str, caption: str) -> str:
    if name not in plots:
        return ""
    data = b64encode(plots[name]).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
