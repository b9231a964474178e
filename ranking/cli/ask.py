"""`brewline ask`: put a question to a running server and read the answer as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from index.errors import BrewlineError
from ranking.cli import tell
from ranking.cli.connection import (
    DEFAULT_ADDRESS,
    DEFAULT_DEADLINE_MS,
    Address,
    AsJson,
    Block,
    ByConnections,
    Category,
    Creator,
    Deadline,
    Language,
    Region,
    wanted_of,
)
from ranking.cli.explain import explanation_table
from ranking.cli.output import emit, words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ranking.serving.client import Answer, ServerInfo
    from retrieval.data.schema import MemberView

app = typer.Typer(
    no_args_is_help=True,
    help="Ask a running server (`brewline serve`): recommend, retrieve, rank, explain, info; tell it: upsert, withdraw, record.",
)
app.command()(tell.upsert)
app.command()(tell.withdraw)
app.command()(tell.record)

MemberId = Annotated[str, typer.Option("--member", help="A member that the store knows.", metavar="ID")]
Profile = Annotated[
    list[str] | None,
    typer.Option("--profile", help="A profile field of an unknown member; may be repeated.", metavar="NAME=WORDS"),
]
History = Annotated[
    list[str] | None,
    typer.Option("--history", help="An item that an unknown member engaged with; oldest first.", metavar="ITEM_ID"),
]
Instruction = Annotated[str, typer.Option(help="The member's own wish, in plain words.")]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="An item that must not come back; may be repeated.", metavar="ITEM_ID")
]
Task = Annotated[str, typer.Option(help="Which question the ranker answers; see `brewline ask info`.")]


class AskError(BrewlineError):
    """A question that cannot be put."""


@app.command()
def recommend(
    member: MemberId = "",
    k: Annotated[int, typer.Option("-k", help="How many items.", min=1)] = 10,
    fanout: Annotated[int, typer.Option(help="How many candidates are ranked (0: 2,000).", min=0)] = 0,
    task: Task = "",
    instruction: Instruction = "",
    profile: Profile = None,
    history: History = None,
    exclude: Exclude = None,
    category: Category = None,
    creator: Creator = None,
    language: Language = None,
    region: Region = None,
    block_creator: Block = None,
    by_connections: ByConnections = False,
    address: Address = DEFAULT_ADDRESS,
    deadline_ms: Deadline = DEFAULT_DEADLINE_MS,
    as_json: AsJson = False,
) -> None:
    """Both stages: retrieve candidates, rank them, show the best.

    brewline ask recommend --member m42
    brewline ask recommend --member m42 --instruction "more about databases" -k 5
    brewline ask recommend --profile "headline=database engineer" --history p17 --history p99
    brewline ask recommend --member m42 --category coffee --block-creator "Some Shop"
    """
    from ranking.serving.client import Client

    wanted = wanted_of(category, creator, language, region, block_creator, by_connections)

    with Client(address, deadline_ms) as client:
        answer = client.recommend(
            _who(member, profile, history),
            k,
            fanout=fanout,
            task=task,
            instruction=instruction,
            exclude=exclude or (),
            wanted=wanted,
            readable=True,
        )
    _show(answer, as_json=as_json, title="Recommended")


@app.command()
def retrieve(
    member: MemberId = "",
    k: Annotated[int, typer.Option("-k", help="How many items.", min=1)] = 10,
    instruction: Instruction = "",
    profile: Profile = None,
    history: History = None,
    exclude: Exclude = None,
    category: Category = None,
    creator: Creator = None,
    language: Language = None,
    region: Region = None,
    block_creator: Block = None,
    by_connections: ByConnections = False,
    address: Address = DEFAULT_ADDRESS,
    deadline_ms: Deadline = DEFAULT_DEADLINE_MS,
    as_json: AsJson = False,
) -> None:
    """Only the first stage: the items nearest to the member.

    brewline ask retrieve --member m42 -k 20
    """
    from ranking.serving.client import Client

    wanted, who = wanted_of(category, creator, language, region, block_creator, by_connections), _who(member, profile, history)
    with Client(address, deadline_ms) as client:
        answer = client.retrieve(who, k, instruction=instruction, exclude=exclude or (), wanted=wanted, readable=True)
    _show(answer, as_json=as_json, title="Retrieved")


@app.command()
def rank(
    items: Annotated[list[str], typer.Argument(help="The items to put in order.", metavar="ITEM_ID...")],
    member: MemberId = "",
    task: Task = "",
    instruction: Instruction = "",
    profile: Profile = None,
    history: History = None,
    address: Address = DEFAULT_ADDRESS,
    deadline_ms: Deadline = DEFAULT_DEADLINE_MS,
    as_json: AsJson = False,
) -> None:
    """Only the second stage: the given items, the most probable first.

    brewline ask rank --member m42 p17 p99 p3
    """
    from ranking.serving.client import Client

    with Client(address, deadline_ms) as client:
        answer = client.rank(_who(member, profile, history), items, task=task, instruction=instruction, readable=True)
    _show(answer, as_json=as_json, title="Ranked")


@app.command()
def explain(
    item: Annotated[str, typer.Argument(help="The item that is asked about.", metavar="ITEM_ID")],
    member: MemberId = "",
    k: Annotated[int, typer.Option("-k", help="How many items the answer had.", min=1)] = 10,
    fanout: Annotated[int, typer.Option(help="How many candidates are ranked (0: 2,000).", min=0)] = 0,
    task: Task = "",
    instruction: Instruction = "",
    profile: Profile = None,
    history: History = None,
    exclude: Exclude = None,
    category: Category = None,
    creator: Creator = None,
    language: Language = None,
    region: Region = None,
    block_creator: Block = None,
    by_connections: ByConnections = False,
    address: Address = DEFAULT_ADDRESS,
    deadline_ms: Deadline = DEFAULT_DEADLINE_MS,
    as_json: AsJson = False,
) -> None:
    """Why an item is or is not in the answer of `recommend` to the same options: its place at every stage, and the prompts.

    brewline ask explain p17 --member m42
    brewline ask explain p17 --member m42 --fanout 200 --category coffee
    """
    from ranking.serving.client import Client

    wanted, who = wanted_of(category, creator, language, region, block_creator, by_connections), _who(member, profile, history)
    with Client(address, deadline_ms) as client:
        told = client.explain(
            who, item, k, fanout=fanout, task=task, instruction=instruction, exclude=exclude or (), wanted=wanted
        )
    emit(asdict(told), as_json=as_json, table=lambda: explanation_table(told, item))


@app.command()
def info(address: Address = DEFAULT_ADDRESS, deadline_ms: Deadline = DEFAULT_DEADLINE_MS, as_json: AsJson = False) -> None:
    """What the server serves: snapshot, models, fingerprints, tasks.

    brewline ask info --address 127.0.0.1:50051
    """
    from ranking.serving.client import Client

    with Client(address, deadline_ms) as client:
        told = client.info()
    emit(asdict(told), as_json=as_json, table=lambda: _info_table(told))


def _who(member: str, profile: Sequence[str] | None, history: Sequence[str] | None) -> str | MemberView:
    """The member by id, or the one that --profile and --history describe. Raises AskError."""
    from retrieval.data.schema import Engagement, Item, Member, MemberView

    if not profile and not history:
        if not member:
            raise AskError("nobody asks: give --member ID, or describe a member with --profile NAME=WORDS and --history ITEM_ID")
        return member
    fields: dict[str, str] = {}
    for field in profile or ():
        name, equals, text = field.partition("=")
        if not equals or not name.strip():
            raise AskError(f'--profile {field!r}: expected NAME=WORDS, for example --profile "headline=database engineer"')
        fields[name.strip()] = text
    done = tuple(Engagement(Item(item_id), 0, "") for item_id in history or ())
    return MemberView(Member(member, fields), done)


def _show(answer: Answer, *, as_json: bool, title: str) -> None:
    content = {name: value for name, value in vars(answer).items() if name != "rows"}
    content |= {"degraded": answer.degraded.name, "items": [asdict(row) for row in answer.rows]}
    emit(content, as_json=as_json, table=lambda: _answer_table(answer, title))


def _answer_table(answer: Answer, title: str) -> RenderableType:
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
    if answer.degraded:
        lines.append(Text(f"degraded to {answer.degraded.name}: {answer.degraded_detail}", style="bold yellow"))
    lines.append(Text(_stages(answer.times), style="dim"))
    ranker = f", ranker {answer.ranker}" if answer.ranker else ""
    asked = f", task {answer.task}" if answer.task else ""
    lines.append(Text(f"{answer.candidates:,} candidates{asked}; snapshot {answer.snapshot}", style="dim"))
    lines.append(Text(f"encoder {answer.encoder}{ranker}; request {answer.request_id}", style="dim"))
    return Group(*lines)


def _stages(times: Mapping[str, int]) -> str:
    return "  ".join(f"{name.removesuffix('_us')} {micros / 1000:.1f} ms" for name, micros in times.items())


def _info_table(told: ServerInfo) -> Table:
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
