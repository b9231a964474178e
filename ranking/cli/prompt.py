"""`brewline prompt show`: what a model is really given for one record, token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from index.errors import BrewlineError
from ranking.cli.output import emit, words

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from retrieval.data.schema import Dataset, MemberView
    from retrieval.tokens import Tokens

app = typer.Typer(no_args_is_help=True, help="Look at prompts: the exact text, tokens and lengths of one record.")


class PromptError(BrewlineError):
    """The record that was asked for cannot be shown."""


@dataclass(frozen=True)
class Shown:
    """One record as a model reads it. Without a model there are no ids and no budget."""

    kind: str
    id: str
    as_of: int
    model: str
    fingerprint: str
    text: str
    characters: int
    ids: Sequence[int] = ()
    tokens: Sequence[str] = ()
    length: int | None = None
    budget: int | None = None


@dataclass(frozen=True)
class Asked:
    """What the command line asked for: one record of a folder at a time (seconds UTC)."""

    dataset: Dataset
    row: int
    as_of: int
    kind: str
    instruction: str
    task: str

    @property
    def id(self) -> str:
        """The id of the record."""
        ids = self.dataset.items.item_id if self.kind == "item" else self.dataset.members.member_id
        return ids[self.row]


@app.command()
def show(
    data: Annotated[Path, typer.Argument(help="A data folder.", metavar="DATA")],
    item: Annotated[str | None, typer.Option(help="Show this item.", metavar="ID")] = None,
    member: Annotated[str | None, typer.Option(help="Show this member.", metavar="ID")] = None,
    encoder: Annotated[Path | None, typer.Option(help="As this encoder reads it.", metavar="DIR")] = None,
    ranker: Annotated[Path | None, typer.Option(help="As this ranker reads it.", metavar="DIR")] = None,
    as_of: Annotated[str, typer.Option(help="now, end, seconds, or an ISO time: counts and history before it.")] = "now",
    task: Annotated[str, typer.Option(help="The ranker's task; its first one if not named.")] = "",
    instruction: Annotated[str, typer.Option(help="The member's own wish, for the ranker.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Print the text, tokens and lengths of one record. Without a model: the words alone, no numbers and no tokens."""
    from retrieval.data.read import read_dataset
    from retrieval.moments import read_as_of

    if (item is None) == (member is None):
        raise PromptError("name one record: --item ID or --member ID")
    if encoder is not None and ranker is not None:
        raise PromptError("name one model: --encoder DIR or --ranker DIR")
    dataset = read_dataset(data)
    kind, wanted = ("item", item) if item is not None else ("member", member)
    rows = dataset.items.row_of if kind == "item" else dataset.members.row_of
    row = rows.get(wanted or "", -1)
    if row < 0:
        raise PromptError(f"{data} has no {kind} {wanted!r}; it has {len(rows):,}, the first ones {', '.join(islice(rows, 3))}")
    asked = Asked(dataset, row, read_as_of(as_of, dataset, time.time()), kind, instruction, task)
    if encoder is not None:
        shown = as_encoder(asked, encoder)
    elif ranker is not None:
        shown = as_ranker(asked, ranker)
    else:
        shown = as_words(asked)
    emit(vars(shown), as_json=as_json, table=lambda: _table(shown))


def as_encoder(asked: Asked, folder: Path) -> Shown:
    """The record as the encoder of a folder reads it."""
    from retrieval.encoder import Encoder

    encoder = Encoder.load(folder)
    writer = encoder.writer
    if asked.kind == "item":
        ids, budget = writer.items([asked.dataset.items[asked.row]], _numbers(asked))[0], writer.budgets.item
    else:
        ids, budget = writer.members([_view(asked)])[0], writer.budgets.member
    return _shown(asked, writer.tokens, ids, budget, "encoder", encoder.fingerprint)


def as_ranker(asked: Asked, folder: Path) -> Shown:
    """The record as the ranker of a folder reads it: a member is the prefix, an item one candidate with its answer token."""
    from ranking.ranker import Ranker

    ranker = Ranker.load(folder)
    prompts = ranker.prompts
    if asked.kind == "item":
        ids = ranker.item_tokens([asked.dataset.items[asked.row]], _numbers(asked))[0] + prompts.suffix()
        budget = prompts.budgets.item + len(prompts.suffix())
    else:
        ids, budget = ranker.prefix(_view(asked), asked.task), prompts.budgets.prefix
    return _shown(asked, prompts.tokens, ids, budget, "ranker", ranker.fingerprint)


def as_words(asked: Asked) -> Shown:
    """The record in words, before any tokenizer and without numbers: their buckets belong to a model."""
    from retrieval.prompts import HISTORY, Part, entry_prompt, item_prompt, member_prompt, render

    if asked.kind == "item":
        text = render(item_prompt(asked.dataset.items[asked.row], ()))
    else:
        view = _view(asked)
        entries = [part for engagement in view.history for part in entry_prompt(engagement, with_action=True)]
        text = render((*member_prompt(view.member, view.connections), Part(HISTORY, ""), *entries))
    return Shown(asked.kind, asked.id, asked.as_of, "", "", text, len(text))


def _shown(asked: Asked, tokens: Tokens, ids: list[int], budget: int, model: str, fingerprint: str) -> Shown:
    text = tokens.text(ids)
    names = [tokens.tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    return Shown(asked.kind, asked.id, asked.as_of, model, fingerprint, text, len(text), ids, names, len(ids), budget)


def _numbers(asked: Asked) -> dict[str, npt.NDArray[np.float64]]:
    from retrieval.counts import Counts

    counts = Counts.from_dataset(asked.dataset, before=asked.as_of).as_of(asked.as_of)
    return {name: column[asked.row : asked.row + 1] for name, column in counts.items()}


def _view(asked: Asked) -> MemberView:
    from retrieval.records import ItemWords, records_of, view_of

    record = next(islice(records_of(asked.dataset, asked.as_of), asked.row, None))
    return view_of(record, ItemWords(asked.dataset.items), asked.instruction)


def _table(shown: Shown) -> RenderableType:
    from retrieval.moments import moment_words

    reader = f"{shown.model} {shown.fingerprint}" if shown.model else "words only: name --encoder or --ranker for tokens"
    lines: list[RenderableType] = [
        Text(f"{shown.kind} {words(shown.id)} as of {moment_words(shown.as_of)}, {reader}", style="bold"),
        words(shown.text),
        Text(f"{shown.characters} characters", style="dim"),
    ]
    if shown.length is not None:
        pieces = Text(" ").join(words(token, style="cyan" if token.startswith("<|") else "") for token in shown.tokens)
        full = " (full: what did not fit was cut)" if shown.length == shown.budget else ""
        lines += [Text(), pieces, Text(f"{shown.length} tokens of at most {shown.budget}{full}", style="dim")]
    return Group(*lines)
