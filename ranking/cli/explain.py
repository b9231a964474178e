"""`brewline ask explain` as a table: what became of one item at each stage of one answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ranking.cli.output import words

if TYPE_CHECKING:
    from ranking.serving.replies import Explanation


def explanation_table(told: Explanation, item: str) -> RenderableType:
    """The stages in their order, then what the models read."""
    table = Table("stage", "what became of it", title=Text("Why ") + words(item, 60), title_justify="left")
    stages = [("catalogue", _catalogue(told)), ("withheld", _withheld(told)), *_lists(told)]
    for stage, said in [*stages, ("first stage", _first(told)), (f"ranker, {told.task}", _ranked(told))]:
        table.add_row(words(stage), words(said))
    lines: list[RenderableType] = [Text(told.outcome, style="bold") + words(f": {told.detail}"), table]
    for one in told.prompts:
        lines += [Text(f"{one.model}, {one.row}, {one.tokens} tokens:", style="dim"), words(one.text)]
    lines.append(Text(f"snapshot {told.snapshot}, first stage {told.first_stage}", style="dim"))
    lines.append(Text(f"encoder {told.encoder}, ranker {told.ranker}; request {told.request_id}", style="dim"))
    return Group(*lines)


def _catalogue(told: Explanation) -> str:
    return "known" if told.known else "withdrawn" if told.withdrawn else "not known"


def _withheld(told: Explanation) -> str:
    named = {"seen by the member": told.seen, "excluded by the request": told.excluded, "filtered by the request": told.filtered}
    return ", ".join(name for name, true in named.items() if true) or "no"


def _lists(told: Explanation) -> list[tuple[str, str]]:
    rows = []
    for one in told.lists:
        adds = "" if one.adds is None else f", adds {one.adds:.5f}"
        stands = f"not among its {one.length:,}" if one.place is None else f"number {one.place + 1:,} of {one.length:,}{adds}"
        cosine = f"; cosine {told.cosine:.4f}" if one.list == "dense" and told.cosine is not None else ""
        rows.append((f"list: {one.list}", stands + cosine))
    return rows


def _first(told: Explanation) -> str:
    asked = f"{told.candidates:,} candidates, fanout {told.fanout:,}"
    if told.first_place is None:
        return f"outside: {asked}"
    score = "" if told.first_score is None else f", score {told.first_score:.4f}"
    return f"number {told.first_place + 1:,}{score}: inside, {asked}"


def _ranked(told: Explanation) -> str:
    if told.probability is None:
        return "nothing to rank"
    if told.place is None:
        return f"was not ranked; would have had probability {told.probability:.4f}"
    return f"number {told.place + 1:,}, probability {told.probability:.4f}; {told.k:,} are returned"
