"""What every command of `brewline evaluate` asks for, and how a data folder is read for it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranking.cli.out_folder import out_folder

if TYPE_CHECKING:
    from retrieval.data.schema import Dataset
    from retrieval.data.world import Truth


class CountsChoice(StrEnum):
    """What the numbers in prompts may know: up to the day before the query, or up to the test cut."""

    live = "live"
    frozen = "frozen"


Data = Annotated[Path, typer.Argument(help="The data folder.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for report.html, metrics.json and the scores.", show_default=False, callback=out_folder),
]
Counts = Annotated[CountsChoice, typer.Option(help="live: numbers as of each day's start; frozen: as of the test cut.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


ToldReaders = Annotated[
    bool,
    typer.Option(
        "--told",
        help="In a synthetic world, also readers who are told a part of its truth: how far its log could take anyone. A minute.",
    ),
]


class NotAsked(Exception):
    """One half of the comparison has no questions in this folder; the other half may."""


def read_with_truth(data: Path, *, told: bool = False) -> tuple[Dataset, Truth | None]:
    """Returns the data set and, where it is a synthetic world, what is true of it.

    Raises DataError for a malformed folder, EvidenceError if the truth is that of another world, or if there is none and
    somebody is to be `told`.
    """
    from retrieval.data.read import read_dataset
    from retrieval.data.world import read_truth
    from retrieval.evidence.protocol import EvidenceError

    dataset = read_dataset(data)
    if not (data / "truth").is_dir():
        if told:
            raise EvidenceError(f"{data}: --told needs a synthetic world (`brewline data world`), this folder has no truth")
        return dataset, None
    truth = read_truth(data)
    sizes = (len(truth.theta_first), len(truth.phi))
    if sizes != (len(dataset.members), len(dataset.items)):
        raise EvidenceError(
            f"{data}: the truth knows {sizes[0]} members and {sizes[1]} items, the data {len(dataset.members)} and "
            f"{len(dataset.items)}. Make the world again, or remove its folder truth."
        )
    return dataset, truth
