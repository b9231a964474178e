"""`brewline ask upsert|withdraw|record`: tell a running server what changed, and wait until it is kept."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from index.errors import BrewlineError
from ranking.cli.connection import DEFAULT_ADDRESS, DEFAULT_DEADLINE_MS, Address, AsJson, Deadline
from ranking.cli.output import emit, words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from retrieval.data.schema import Item

AT_ONCE = 256
ITEM = ("item_id", "title", "text", "category", "creator", "created_at", "numbers")
"""What a line of --from may say."""


class TellError(BrewlineError):
    """A change that cannot be sent."""


def upsert(
    item_id: Annotated[str, typer.Argument(help="The item; leave it out with --from.", metavar="[ITEM_ID]")] = "",
    title: Annotated[str, typer.Option(help="Its title.")] = "",
    text: Annotated[str, typer.Option(help="Its text.")] = "",
    category: Annotated[str, typer.Option(help="Its category, as in the training data.")] = "",
    creator: Annotated[str, typer.Option(help="Who made it.")] = "",
    created_at: Annotated[int | None, typer.Option(help="When it was made, in seconds since 1970.", metavar="SECONDS")] = None,
    number: Annotated[
        list[str] | None, typer.Option("--number", help="A number of the item; may be repeated.", metavar="NAME=VALUE")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help=f"JSON lines instead, of {', '.join(ITEM)} (name to value).",
            metavar="FILE",
        ),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    deadline_ms: Deadline = DEFAULT_DEADLINE_MS,
    as_json: AsJson = False,
) -> None:
    """Put an item in, or in place of what has its id: on the disk and searchable when this returns.

    What is not said of the item is unknown from then on, whatever was known before. If the answer is lost the item may be in
    or not: sending it again is harmless, unless somebody withdrew it in between.

        brewline ask upsert p17 --title "A used espresso machine" --category coffee --number price=120
        brewline ask upsert --from new-items.jsonl
    """
    from ranking.serving.client import Client
    from retrieval.data.schema import Item

    if bool(item_id) == (file is not None):
        raise TellError("nothing to put in, or two things: give ITEM_ID with its words, or --from FILE")
    one = Item(item_id, title, text, category, creator, created_at, numbers(number or []))
    items = [one] if file is None else list(_read(file))
    with Client(address, deadline_ms) as client:
        for start in range(0, len(items), AT_ONCE):
            done = client.upsert(items[start : start + AT_ONCE])
    kept = "1 item is" if len(items) == 1 else f"{len(items):,} items are"
    told = f"{kept} kept up to position {done.position} of the log, over snapshot {done.snapshot}"
    emit({"items": len(items), **asdict(done)}, as_json=as_json, table=lambda: words(told))


def withdraw(
    items: Annotated[list[str], typer.Argument(help="The items to take away.", metavar="ITEM_ID...")],
    address: Address = DEFAULT_ADDRESS,
    deadline_ms: Deadline = DEFAULT_DEADLINE_MS,
    as_json: AsJson = False,
) -> None:
    """Take items away: when this returns, no later answer holds them. They stay away until the data folder knows.

    brewline ask withdraw p17 p99
    """
    from ranking.serving.client import Client

    with Client(address, deadline_ms) as client:
        done = client.withdraw(items)
    were = f"{done.were_here:,} of {len(items):,} items were there and are gone"
    if done.were_here < 0:
        were = f"{len(items):,} items are gone; how many were there is not known, as the answer to an earlier attempt was lost"
    told = f"{were}, position {done.position} of the log"
    emit(asdict(done), as_json=as_json, table=lambda: words(told))


def record(
    items: Annotated[list[str], typer.Argument(help="What the member engaged with, oldest first.", metavar="ITEM_ID...")],
    member: Annotated[str, typer.Option("--member", help="Who did it.", metavar="ID")],
    action: Annotated[str, typer.Option(help="What was done; default: the first that the encoder was trained on.")] = "",
    timestamp: Annotated[int, typer.Option(help="When, in seconds since 1970; 0 is now.", min=0, metavar="SECONDS")] = 0,
    liked: Annotated[bool | None, typer.Option("--liked/--disliked", help="Whether the member liked it.")] = None,
    event_id: Annotated[
        str, typer.Option(help="Your own id of a single event: sent twice, it counts once. Default: a new one.", metavar="ID")
    ] = "",
    request_id: Annotated[str, typer.Option(help="The request whose answer showed the items.", metavar="ID")] = "",
    surface: Annotated[str, typer.Option(help="Where they were shown (feed, mail).", metavar="NAME")] = "",
    address: Address = DEFAULT_ADDRESS,
    deadline_ms: Deadline = DEFAULT_DEADLINE_MS,
    as_json: AsJson = False,
) -> None:
    """Add to what a member did: none of these items is recommended any more, and the next answer knows.

    brewline ask record --member m42 p17 p99
    brewline ask record --member m42 p17 --action rating:9 --liked --event-id click-8841
    brewline ask record --member m42 p17 --request-id 5f0c2a9be1d4 --surface feed
    """
    from ranking.serving.client import Client
    from retrieval.recent import Told
    from retrieval.records import Entry

    if event_id and len(items) > 1:
        raise TellError(f"--event-id names one event, {len(items)} items were given: send them one by one")
    label = None if liked is None else int(liked)
    told = [Told(event_id or uuid.uuid4().hex, Entry(item, timestamp, action, label), request_id, surface) for item in items]
    with Client(address, deadline_ms) as client:
        done = client.record(member, told)
    said = f"engagements of {member}: {done.recorded:,} kept, {done.known:,} known before"
    emit(asdict(done), as_json=as_json, table=lambda: words(said))


def numbers(given: list[str], option: str = "--number", example: str = "price=120") -> dict[str, float]:
    """The values by name of options NAME=VALUE. Raises TellError."""
    found = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise TellError(f"{option} {one!r}: expected NAME=VALUE, for example {option} {example}") from None
    return found


def _read(file: Path) -> Iterator[Item]:
    from retrieval.data.schema import Item

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TellError(f"{file} cannot be read: {error}") from error
    if not any(line.strip() for line in lines):
        raise TellError(f"{file} holds no items: expected one JSON object a line")
    for place, line in enumerate(lines, 1):
        if line.strip():
            try:
                given = json.loads(line)
                unknown = sorted(set(given) - set(ITEM)) if isinstance(given, dict) else []
                if unknown or not isinstance(given, dict):
                    raise ValueError(f"unknown {', '.join(unknown)}" if unknown else "not an object")
                yield Item(**given)
            except (ValueError, TypeError) as error:
                raise TellError(f"{file}, line {place}: no item ({error}); expected {', '.join(ITEM)}") from error
