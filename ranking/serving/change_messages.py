"""Changes and filters on the wire, turned into our own records; limits checked, nothing unknown let through."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from google.protobuf.unknown_fields import UnknownFieldSet

from ranking.serving import recommender_pb2 as pb
from ranking.serving.messages import MAX_IDS, MAX_NAME, BadRequest, at_most, id_of, item_of, read_ids, words_of
from retrieval.attributes import EVERYTHING, Wanted
from retrieval.data.schema import DAY, Item, action_kind
from retrieval.recent import Told
from retrieval.records import Entry

MAX_PUT, MAX_EVENTS, MAX_VALUES, MAX_NUMBERS, MAX_REQUEST = 256, 1_000, 1_024, 64, 64


def read_wanted(message: pb.Filter) -> Wanted:
    """What a filter lets in. Raises BadRequest, also for a condition of a newer contract: it must not be passed over."""
    if not message.ByteSize():  # what this server does not know has a size too
        return EVERYTHING
    if len(UnknownFieldSet(message)):
        raise BadRequest("filter: holds a field that this server does not know, and no answer may ignore it; ask a newer server")
    return Wanted(
        categories=_values("categories", message.categories),
        creators=_values("creators", message.creators),
        languages=_values("languages", message.languages),
        regions=_values("regions", message.regions),
        blocked_creators=_values("blocked_creators", message.blocked_creators),
        by_connections=message.by_connections,
    )


def wanted_message(wanted: Wanted) -> pb.Filter:
    """What a client sends to be answered with what is wanted only."""
    return pb.Filter(
        categories=sorted(wanted.categories),
        creators=sorted(wanted.creators),
        languages=sorted(wanted.languages),
        regions=sorted(wanted.regions),
        blocked_creators=sorted(wanted.blocked_creators),
        by_connections=wanted.by_connections,
    )


def read_items(records: Sequence[pb.ItemRecord], numbers: Collection[str]) -> list[Item]:
    """The items to put in; `numbers` names those that an item may have. Raises BadRequest."""
    _some("items", len(records), MAX_PUT)
    items = [_read_item(record, f"items[{place}]", numbers) for place, record in enumerate(records)]
    _once("items", (item.item_id for item in items))
    return items


def item_message(item: Item) -> pb.ItemRecord:
    """What a client sends to put an item in. Raises BadRequest for facets: the contract has no place for them."""
    if item.facets:
        raise BadRequest(
            f"items: {item.item_id[:80]!r} has {', '.join(item.facets)}, which can only be given at night; leave facets out, and "
            "until then no condition on them lets it through"
        )
    words = pb.ItemWords(
        title=item.title, text=item.text, category=item.category, creator=item.creator, created_at=item.created_at
    )
    numbers = [pb.ItemNumber(name=name, value=value) for name, value in item.numbers.items()]
    return pb.ItemRecord(item_id=item.item_id, words=words, numbers=numbers)


def read_withdrawn(ids: pb.Ids) -> list[str]:
    """The ids to take away. Raises BadRequest."""
    found = read_ids(ids, "items")
    _some("items", len(found), MAX_IDS)
    for place, one in enumerate(found):
        id_of(one, f"items[{place}]")
    _once("items", found)
    return found


def read_events(request: pb.RecordEngagementsRequest, actions: Sequence[str], now: int) -> list[Told]:
    """What the member did; `actions` are the kinds that the encoder knows, `now` is seconds. Raises BadRequest."""
    id_of(request.member_id, "member_id")
    _some("events", len(request.events), MAX_EVENTS)
    return [_read_event(event, f"events[{place}]", actions, now) for place, event in enumerate(request.events)]


def event_message(told: Told) -> pb.MemberEvent:
    """What a client sends to have an engagement remembered."""
    entry = told.entry
    event = pb.MemberEvent(event_id=told.event_id, item_id=entry.item_id, action=entry.action, timestamp=entry.timestamp)
    event.request_id, event.surface = told.request_id, told.surface
    if entry.label is not None:
        event.liked = bool(entry.label)
    return event


def _read_event(event: pb.MemberEvent, where: str, actions: Sequence[str], now: int) -> Told:
    if not event.event_id:
        raise BadRequest(f"{where}.event_id: is empty; without one, sending it again would count it twice")
    words_of(f"{where}.event_id", event.event_id, MAX_NAME)
    action = words_of(f"{where}.action", event.action, MAX_NAME) or next(iter(actions), "")
    if actions and action_kind(action) not in actions:
        raise BadRequest(f"{where}.action: {action!r} is none that the encoder was trained on; it knows {', '.join(actions)}")
    if not 0 <= event.timestamp <= now + DAY:
        raise BadRequest(f"{where}.timestamp: {event.timestamp} is not a time between 1970 and tomorrow in seconds")
    label = int(event.liked) if event.HasField("liked") else None
    entry = Entry(id_of(event.item_id, f"{where}.item_id"), event.timestamp or now, action, label)
    request_id = words_of(f"{where}.request_id", event.request_id, MAX_REQUEST)
    return Told(event.event_id, entry, request_id, words_of(f"{where}.surface", event.surface, MAX_NAME))


def _read_item(record: pb.ItemRecord, where: str, known: Collection[str]) -> Item:
    item = item_of(id_of(record.item_id, f"{where}.item_id"), record.words, where)
    if not (item.title or item.text or item.category or item.creator):
        raise BadRequest(f"{where}.words: are all empty; an item that says nothing cannot be read")
    at_most(f"{where}.numbers", len(record.numbers), MAX_NUMBERS)
    numbers = {number.name: number.value for number in record.numbers}
    _once(f"{where}.numbers", (number.name for number in record.numbers))
    for name, value in numbers.items():
        if name not in known:
            raise BadRequest(
                f"{where}.numbers: {name[:80]!r} is none of the items' numbers; they have {', '.join(known) or 'none'}"
            )
        if not math.isfinite(value):
            raise BadRequest(f"{where}.numbers: {name} is {value}; leave it out if it is unknown")
    return Item(item.item_id, item.title, item.text, item.category, item.creator, item.created_at, numbers)


def _values(name: str, values: Sequence[str]) -> frozenset[str]:
    at_most(f"filter.{name}", len(values), MAX_VALUES)
    return frozenset(id_of(value, f"filter.{name}[{place}]") for place, value in enumerate(values))


def _some(where: str, count: int, most: int) -> None:
    if not count:
        raise BadRequest(f"{where}: none are given; fill in at least one")
    at_most(where, count, most)


def _once(where: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BadRequest(f"{where}: {name[:80]!r} is given twice; which one is meant?")
        seen.add(name)
