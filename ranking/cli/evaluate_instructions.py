"""`brewline evaluate instructions`: whether a member's own words steer a ranker's order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranking.cli.evaluate_inputs import AsJson, Data

if TYPE_CHECKING:
    from rich.table import Table

    from ranking.instructions import Followed


def instructions(
    data: Data,
    ranker: Annotated[Path, typer.Option("--ranker", help="The ranker folder.", show_default=False)],
    members: Annotated[int, typer.Option(help="How many members are asked.", min=2)] = 100,
    listed: Annotated[int, typer.Option("--items", help="Random items of the catalogue in each list.", min=10)] = 60,
    seed: Annotated[int, typer.Option(help="Decides members, items and wordings.")] = 0,
    rules: Annotated[
        bool, typer.Option("--rules/--words-alone", help="As served, or what the ranker makes of the words without the rules.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """How far the items of a category rise when a member asks for more of it, for none of it, or for both, as of the test cut.

    In words that training used, in words that it never saw, and against the member's own past; with 95 % intervals over members.
    As served, plain wishes are obeyed by rule (docs/tasks.md); `--words-alone` asks what the ranker itself has learned.
    A ranker with a head is measured with it, without retrieval's cosine.

    Example: `brewline evaluate instructions WORLD --ranker models/ranker`
    """
    from ranking.cli.output import emit, progress_bar
    from ranking.instructions import follow
    from ranking.ranker import Ranker
    from retrieval.data.read import read_dataset
    from retrieval.provenance import check_provenance

    dataset, loaded = read_dataset(data), Ranker.load(ranker)
    check_provenance(ranker, loaded.facts.training, dataset)
    with progress_bar("ask") as bar:
        found = follow(dataset, loaded, members, listed, seed, bar, rules=rules)
    content = {
        "dataset": dataset.meta.name,
        "ranker": loaded.fingerprint,
        "task": next(iter(loaded.tasks)),
        "items": listed,
        "rules": rules,
    }
    emit({**content, "conditions": [one.as_dict() for one in found]}, as_json=as_json, table=lambda: _table(found))


def _table(found: Sequence[Followed]) -> Table:
    from rich.table import Table

    table = Table(title="Rise of the items that the instruction is about (1 = from the bottom of the list to its top)")
    for column in ("instruction", "wished", "members", "rise", "95 %", "right", "others' order kept"):
        table.add_column(column, justify="left" if column in ("instruction", "wished") else "right")
    for one in found:
        interval = f"{one.rise.low:+.3f} .. {one.rise.high:+.3f}"
        cells = (f"{one.rise.value:+.3f}", interval, f"{one.right:.0%}", f"{one.order_kept:.2f}")
        table.add_row(one.name, one.wished, str(one.members), *cells)
    return table
