"""The answers of a server as people read them. Words of items come from strangers, so none of them is read as markup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ranking.cli.output import words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ranking.serving.client import Answer, ServerInfo


def answer_table(answer: Answer, title: str) -> RenderableType:
    """Its rows, what it lacks, where the time went, and who made it."""
    table = Table("", "item", "title", "category", title=title, title_justify="left")
    scored, ranked = answer.scores is not None, answer.probabilities is not None
    if scored:
        table.add_column("score", justify="right")
    if ranked:
        table.add_column("probability", justify="right")
        table.add_column("was" if scored else "given", justify="right")
    for place, row in enumerate(answer.rows, 1):
        cells = [Text(str(place)), words(row.item_id), words(row.title), words(row.category)]
        cells += [Text(f"{row.score:.4f}")] if scored else []
        cells += [Text(f"{row.probability:.4f}"), Text(str(row.place + 1))] if ranked else []
        table.add_row(*cells)
    lines: list[RenderableType] = [table]
    if not answer.rows:
        lines.append(
            Text("nothing is left: all candidates are excluded, already known, or kept out by the filter", style="bold yellow")
        )
    if answer.degraded:
        lines.append(Text(f"degraded to {answer.degraded.name}: {answer.degraded_detail}", style="bold yellow"))
    if answer.wishes:
        said = ", ".join(f'"{one.said}" ({one.items:,} of the candidates)' for one in answer.wishes)
        lines.append(Text(f"obeyed: {said}", style="bold"))
    lines.append(Text(_stages(answer.times), style="dim"))
    ranker = f", ranker {answer.ranker}" if answer.ranker else ""
    formula = " + ".join(f"{weight:g} {task}" for task, weight in answer.weights.items())
    asked = f", final score of {formula}" if formula else f", task {answer.task}" if answer.task else ""
    lines.append(Text(f"{answer.candidates:,} candidates{asked}; snapshot {answer.snapshot}", style="dim"))
    lines.append(Text(f"encoder {answer.encoder}{ranker}; request {answer.request_id}", style="dim"))
    return Group(*lines)


def _stages(times: Mapping[str, int]) -> str:
    return "  ".join(f"{name.removesuffix('_us')} {micros / 1000:.1f} ms" for name, micros in times.items())


def info_table(told: ServerInfo) -> Table:
    """What a server serves, one fact a row."""
    from retrieval.moments import moment_words

    table = Table("fact", "value", title="Serving", title_justify="left", show_header=False)
    table.add_row("snapshot", f"{told.snapshot}, {told.items:,} items of {told.dims} dims, index {told.index}")
    table.add_row("as of", moment_words(told.as_of))
    table.add_row("since then", f"{told.live_items:,} of the items were put in, up to position {told.live_position} of the log")
    table.add_row("encoder", told.encoder)
    table.add_row("ranker", f"{told.ranker}, attention {told.attention}" if told.ranker else "none: only retrieval")
    table.add_row("tasks", words(", ".join(told.tasks) or "none"))
    table.add_row("version", f"{told.version}, up {told.uptime_seconds:,.0f} s, {told.requests:,} requests")
    return table
