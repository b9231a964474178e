"""The report on a ranker as one HTML page: tables and a reliability plot inside, no scripts, every word of a stranger escaped."""

from __future__ import annotations

import io
import logging
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
from rich.table import Table

from retrieval.evidence.page import NO_PLOTS, POLICY, STYLE

Floats = npt.NDArray[np.float64]
log = logging.getLogger(__name__)


def reliability_plot(curves: Mapping[str, tuple[Floats, Floats]]) -> bytes | None:
    """Returns the PNG of share of positives against mean prediction, one line for each; None without curves or matplotlib."""
    if not curves:
        return None
    if find_spec("matplotlib") is None:
        log.warning(NO_PLOTS)
        return None
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="gray", linewidth=1)
        for name, (said, happened) in curves.items():
            axes.plot(said, happened, "o-", label=name)
        axes.set(xlabel="mean prediction", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1))
        axes.legend(frameon=False)
        held = io.BytesIO()
        figure.savefig(held, format="png", dpi=120, metadata={"Software": None})
    return held.getvalue()


def ranking_page(
    dataset: str, words: Sequence[str], tables: Mapping[str, Table], picture: bytes | None, command: str = ""
) -> str:
    """Returns the page: what made it, the words, the plot and the tables by heading."""
    title = escape(f"Ranking on {dataset}: labelled test events")
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title>'
    parts = [f"<!DOCTYPE html><html lang='en'><head>{head}<style>{STYLE}</style></head><body><h1>{title}</h1>"]
    parts += [f"<p>Command: <code>{escape(command)}</code></p>"] if command else []
    parts += [f"<p>{escape(told)}</p>" for told in words if told]
    for heading, table in tables.items():
        parts += [f"<h2>{escape(heading)}</h2>", _html(table)]
    if picture is not None:
        data = b64encode(picture).decode()
        parts += ["<h2>Reliability</h2>", f"<img alt='Share of positives against prediction' src='data:image/png;base64,{data}'>"]
    return "\n".join([*parts, "</body></html>\n"])


def _html(table: Table) -> str:
    """A table of plain words as HTML."""
    names = "".join(f"<th>{escape(str(column.header))}</th>" for column in table.columns)
    rows = zip(*[[str(cell) for cell in column.cells] for column in table.columns])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{names}</tr>{body}</table>"
