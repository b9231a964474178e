"""The plots of an evaluation as PNG bytes: recall against K, slices, cosine against popularity. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from retrieval.evidence.evaluate import RetrievalReport, Run
from retrieval.evidence.similarity import Similarity

BARS = 6
"""Systems in a bar chart: the model and the best others; more cannot be told apart."""
SLICE_METRICS = ("recall@10", "recall@100")


def all_plots(report: RetrievalReport) -> dict[str, bytes]:
    """Returns name -> PNG of every plot the report has numbers for: "curves", "slices METRIC", "similarity".

    Raises ImportError without matplotlib.
    """
    import matplotlib

    runs, ours = runs_of(report), report.model is not None
    draw: dict[str, Callable[[Any], None]] = {}
    if runs:
        draw["curves"] = lambda axes: draw_curves(axes, runs, ours)
        for metric in SLICE_METRICS:
            if metric in runs[0].quality.metrics:
                draw[f"slices {metric}"] = partial(draw_slices, runs=shown_in_bars(report, metric), metric=metric, ours=ours)
    if report.similarity is not None:
        draw["similarity"] = partial(draw_similarity, found=report.similarity)
    # Names are a stranger's: a dollar sign in one must not be read as a formula.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        return {name: _png(one) for name, one in draw.items()}


def runs_of(report: RetrievalReport) -> list[Run]:
    """Returns all systems, the model first."""
    return [*([] if report.model is None else [report.model]), *report.baselines]


def shown_in_bars(report: RetrievalReport, metric: str) -> list[Run]:
    """Returns the model and the best baselines by a metric, best first."""
    best = sorted(report.baselines, key=lambda run: -run.quality.metrics[metric].value)
    return [*([] if report.model is None else [report.model]), *best][:BARS]


def draw_curves(axes: Any, runs: Sequence[Run], ours: bool) -> None:
    """Draws mean recall against K (logarithmic) of every system: live ones solid, frozen ones dashed, the model bold."""
    for number, run in enumerate(runs):
        style, width = "-" if run.knowledge == "live" else "--", 2.5 if ours and number == 0 else 1.0
        cutoffs, recall = list(run.quality.curve), list(run.quality.curve.values())
        axes.plot(cutoffs, recall, style, color=_colour(number, ours), linewidth=width, label=_label(run))
    axes.set(xscale="log", xlabel="K", ylabel="recall@K", ylim=(0, 1))
    ticks = list(runs[0].quality.curve)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def draw_slices(axes: Any, runs: Sequence[Run], metric: str, ours: bool) -> None:
    """Draws recall by slice as grouped bars, one colour per system; error bars are standard errors, empty slices left out."""
    slices = {name: values for name, values in runs[0].quality.slices.items() if values["n"]}
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        height = [run.quality.slices[name][metric] for name in slices]
        error = np.nan_to_num([run.quality.slices[name][f"{metric} error"] for name in slices])
        place = np.arange(len(slices)) + number * width
        axes.bar(place, height, width, yerr=error, color=_colour(number, ours), label=_label(run), error_kw={"ecolor": "gray"})
    named = [f"{name}\nn={int(values['n']):,}" for name, values in slices.items()]
    axes.set_xticks(np.arange(len(slices)) + 0.4 - width / 2, named)
    axes.set(ylabel=metric)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def draw_similarity(axes: Any, found: Similarity) -> None:
    """Draws cosine against log popularity as hexagons, darker where more pairs lie."""
    axes.hexbin(found.log_count, found.cosine, gridsize=40, bins="log", cmap="Blues", mincnt=1)
    axes.set(xlabel="log(1 + engagements known at that moment)", ylabel="cosine")


def _label(run: Run) -> str:
    seen = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in run.name)
    return f"{seen[:40].lstrip('_')} ({run.knowledge})"


def _colour(number: int, ours: bool) -> Any:
    """Black for the model; then the ten strong colours before their pale twins."""
    import matplotlib

    place = number - ours
    return "black" if place < 0 else matplotlib.colormaps["tab20"]((2 * place + place // 10) % 20)


def _png(draw: Callable[[Any], None]) -> bytes:
    """One picture: no window, no global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5))
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return held.getvalue()
