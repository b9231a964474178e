"""`brewline ask`: put a question to a running server and read the answer as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from index.errors import BrewlineError
from ranking.cli import tell
from ranking.cli.answer_table import answer_table, info_table
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
from ranking.cli.output import emit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ranking.serving.client import Answer
    from retrieval.data.schema import MemberView

app = typer.Typer(
    no_args_is_help=True,
    help="Ask a running server (`brewline serve`): recommend, retrieve, rank, explain, info; tell it: upsert, withdraw, record.",
    epilog="A server with TLS or tokens: `brewline ask --ca FILE [--cert FILE --key FILE] recommend ...`, or BREWLINE_CA, "
    "BREWLINE_CERT, BREWLINE_KEY; the token is read from BREWLINE_TOKEN_FILE or BREWLINE_TOKEN.",
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
Surface = Annotated[
    str,
    typer.Option(
        help="Where the answer will be shown (feed, mail): the server's journal notes it as shown. Default: nothing is noted.",
        metavar="NAME",
    ),
]
Task = Annotated[str, typer.Option(help="Which question the ranker answers; see `brewline ask info`.")]

TaskWeights = Annotated[
    list[str] | None,
    typer.Option("--weight", help="What a task counts in one final score of several; may be repeated.", metavar="TASK=NUMBER"),
]


class AskError(BrewlineError):
    """A question that cannot be put."""


@app.command()
def recommend(
    member: MemberId = "",
    k: Annotated[int, typer.Option("-k", help="How many items.", min=1)] = 10,
    fanout: Annotated[int, typer.Option(help="How many candidates are ranked (0: 2,000).", min=0)] = 0,
    task: Task = "",
    weight: TaskWeights = None,
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
    surface: Surface = "",
    address: Address = DEFAULT_ADDRESS,
    deadline_ms: Deadline = DEFAULT_DEADLINE_MS,
    as_json: AsJson = False,
) -> None:
    """Both stages: retrieve candidates, rank them, show the best.

    Without --surface no impression is written: looking at answers teaches no model.

    brewline ask recommend --member m42
    brewline ask recommend --member m42 --instruction "more about databases" -k 5
    brewline ask recommend --profile "headline=database engineer" --history p17 --history p99
    brewline ask recommend --member m42 --category coffee --block-creator "Some Shop"
    brewline ask recommend --member m42 --surface feed
    """
    from ranking.serving.client import Client

    wanted = wanted_of(category, creator, language, region, block_creator, by_connections)

    with Client(address, deadline_ms) as client:
        answer = client.recommend(
            _who(member, profile, history),
            k,
            fanout=fanout,
            task=task,
            weights=_weights(weight),
            instruction=instruction,
            exclude=exclude or (),
            wanted=wanted,
            surface=surface,
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
    weight: TaskWeights = None,
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
        who = _who(member, profile, history)
        answer = client.rank(who, items, task=task, weights=_weights(weight), instruction=instruction, readable=True)
    _show(answer, as_json=as_json, title="Ranked")


@app.command()
def explain(
    item: Annotated[str, typer.Argument(help="The item that is asked about.", metavar="ITEM_ID")],
    member: MemberId = "",
    k: Annotated[int, typer.Option("-k", help="How many items the answer had.", min=1)] = 10,
    fanout: Annotated[int, typer.Option(help="How many candidates are ranked (0: 2,000).", min=0)] = 0,
    task: Task = "",
    weight: TaskWeights = None,
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
            who,
            item,
            k,
            fanout=fanout,
            task=task,
            weights=_weights(weight),
            instruction=instruction,
            exclude=exclude or (),
            wanted=wanted,
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
    emit(asdict(told), as_json=as_json, table=lambda: info_table(told))


def _weights(given: list[str] | None) -> dict[str, float]:
    return tell.numbers(given or [], "--weight", "like=1")


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
    emit(content, as_json=as_json, table=lambda: answer_table(answer, title))
