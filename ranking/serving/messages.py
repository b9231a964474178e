"""The wire and our own records, each turned into the other: limits checked on the way in, arrays packed on the way out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from ranking.pipeline import Ranked
from ranking.serving import recommender_pb2 as pb
from retrieval.catalog import Catalog, UnknownItem
from retrieval.data.schema import Connection, Engagement, Item, Member, MemberView

MAX_ID, MAX_NAME, MAX_WORDS, MAX_INSTRUCTION = 512, 128, 16_384, 2_048
MAX_PROFILE, MAX_HISTORY, MAX_CONNECTIONS = 64, 2_048, 1_024
MAX_K, MAX_FANOUT, MAX_IDS = 10_000, 20_000, 20_000
DEFAULT_K, DEFAULT_FANOUT = 10, 2_000


class BadRequest(BrewlineError):
    """A request that does not fit the contract; the message begins with the field's path."""


@dataclass(frozen=True)
class Sizes:
    """How many items to return, out of how many."""

    k: int
    fanout: int


def recommend_sizes(request: pb.RecommendRequest) -> Sizes:
    """The sizes of a Recommend with its defaults filled in. Raises BadRequest."""
    k = _within("k", request.k or DEFAULT_K, MAX_K)
    fanout = _within("fanout", request.fanout or max(DEFAULT_FANOUT, k), MAX_FANOUT)
    if fanout < k:
        raise BadRequest(f"fanout: {fanout} candidates cannot fill k = {k}; give a fanout of at least k, or none")
    return Sizes(k, fanout)


def retrieve_size(request: pb.RetrieveRequest) -> int:
    """The size of a Retrieve with its default filled in. Raises BadRequest."""
    return _within("k", request.k or DEFAULT_FANOUT, MAX_FANOUT)


def read_instruction(text: str) -> str:
    """The member's own wish, of an allowed length. Raises BadRequest."""
    return words_of("instruction", text, MAX_INSTRUCTION)


def read_ids(ids: pb.Ids, field: str) -> list[str]:
    """The ids of either form, in order. Raises BadRequest if both are filled or the packed form is not well made."""
    if ids.plain and (ids.packed or ids.ends):
        raise BadRequest(f"{field}: plain and packed are both filled; fill one of them")
    found = list(ids.plain) if ids.plain else unpack_ids(ids, field)
    if len(found) > MAX_IDS:
        raise BadRequest(f"{field}: {len(found):,} ids, at most {MAX_IDS:,} are allowed")
    return found


def unpack_ids(ids: pb.Ids, field: str = "ids") -> list[str]:
    """The ids of the packed form. Raises BadRequest with what does not fit."""
    if not (ids.packed or ids.ends):
        return []
    if len(ids.ends) % 4:
        raise BadRequest(f"{field}.ends: {len(ids.ends)} bytes are no whole number of uint32")
    ends = np.frombuffer(ids.ends, "<u4").astype(np.int64)
    bounds = np.concatenate([[0], ends])
    if bounds[-1] != len(ids.packed) or (np.diff(bounds) < 0).any():
        raise BadRequest(f"{field}.ends: must rise and end at {len(ids.packed)}, the length of packed")
    try:
        return [ids.packed[start:end].decode() for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist())]
    except UnicodeDecodeError as error:
        raise BadRequest(f"{field}.packed: an id is not UTF-8 ({error.reason})") from error


def pack_ids(ids: Sequence[str]) -> pb.Ids:
    """The packed form of ids: UTF-8 end to end, and uint32 ends."""
    message = pb.Ids()
    _fill_ids(message, ids)
    return message


def _fill_ids(message: pb.Ids, ids: Sequence[str]) -> None:
    text = "".join(ids)
    message.packed = text.encode()
    # Where nothing but ASCII is there, and that is nearly always, letters are bytes.
    lengths = map(len, ids) if text.isascii() else (len(one.encode()) for one in ids)
    message.ends = np.cumsum(np.fromiter(lengths, np.int64, len(ids))).astype("<u4").tobytes()


def read_description(message: pb.Member, instruction: str, catalog: Catalog, action: str) -> MemberView:
    """The member that a request describes; `action` stands for an engagement's that is not named.

    Raises BadRequest; UnknownItem for an item whose words neither the request nor the catalogue holds.
    """
    described = message.description
    at_most("member.description.profile", len(described.profile), MAX_PROFILE)
    at_most("member.description.history", len(described.history), MAX_HISTORY)
    at_most("member.description.connections", len(described.connections), MAX_CONNECTIONS)
    words: dict[str, str] = {}
    numbers: dict[str, float] = {}
    for place, field in enumerate(described.profile):
        _read_field(field, f"member.description.profile[{place}]", words, numbers)
    history = _read_history(described.history, catalog, action)
    connections = tuple(_read_connection(edge, place) for place, edge in enumerate(described.connections))
    member = Member(words_of("member.id", message.id, MAX_ID), words, numbers)
    return MemberView(member, history, connections, instruction)


def _read_field(field: pb.ProfileField, where: str, words: dict[str, str], numbers: dict[str, float]) -> None:
    name = words_of(f"{where}.name", field.name, MAX_NAME)
    if not name or name in words or name in numbers:
        raise BadRequest(f"{where}.name: {name!r} is {'given twice' if name else 'empty'}; each field needs a name of its own")
    which = field.WhichOneof("value")
    if which == "words":
        words[name] = words_of(f"{where}.words", field.words, MAX_WORDS)
    elif which == "number":
        if not math.isfinite(field.number):
            raise BadRequest(f"{where}.number: {field.number} is not finite; leave the value out if it is unknown")
        numbers[name] = field.number


def _read_history(entries: Sequence[pb.Engagement], catalog: Catalog, action: str) -> tuple[Engagement, ...]:
    ids = [id_of(entry.item_id, f"member.description.history[{place}].item_id") for place, entry in enumerate(entries)]
    done = []
    for place, (entry, row) in enumerate(zip(entries, catalog.rows(ids).tolist())):
        where = f"member.description.history[{place}]"
        if row < 0 and not entry.HasField("words"):
            raise UnknownItem(f"{where}: item {entry.item_id[:80]!r} is not in the catalogue; send its words with it")
        item = catalog.item(row) if row >= 0 else item_of(entry.item_id, entry.words, where)
        label = int(entry.liked) if entry.HasField("liked") else None
        did = words_of(f"{where}.action", entry.action, MAX_NAME) or action
        done.append(Engagement(item, entry.timestamp, did, label))
    return tuple(sorted(done, key=lambda one: one.timestamp))


def item_of(item_id: str, words: pb.ItemWords, where: str) -> Item:
    """An item in the words of a request. Raises BadRequest for a text that is too long."""
    names = ("title", "text", "category", "creator")
    title, text, category, creator = (words_of(f"{where}.words.{name}", getattr(words, name), MAX_WORDS) for name in names)
    created = words.created_at if words.HasField("created_at") else None
    return Item(item_id, title, text, category, creator, created)


def _read_connection(edge: pb.Connection, place: int) -> Connection:
    where = f"member.description.connections[{place}]"
    since = edge.since if edge.HasField("since") else None
    return Connection(id_of(edge.other_id, f"{where}.other_id"), words_of(f"{where}.kind", edge.kind, MAX_NAME), since)


def member_message(member: str | MemberView) -> pb.Member:
    """What a client sends: an id to look up, or a view in full, with every word that it holds."""
    if isinstance(member, str):
        return pb.Member(id=member)
    who = member.member
    fields = [pb.ProfileField(name=name, words=words) for name, words in who.profile.items()]
    fields += [pb.ProfileField(name=name, number=number) for name, number in who.numbers.items()]
    edges = [pb.Connection(other_id=edge.other_id, kind=edge.kind, since=edge.since) for edge in member.connections]
    history = [_engagement_message(done) for done in member.history]
    return pb.Member(id=who.member_id, description=pb.Description(profile=fields, history=history, connections=edges))


def _engagement_message(done: Engagement) -> pb.Engagement:
    item = done.item
    message = pb.Engagement(item_id=item.item_id, action=done.action, timestamp=done.timestamp)
    if done.label is not None:
        message.liked = bool(done.label)
    if item.title or item.text:
        message.words.CopyFrom(
            pb.ItemWords(
                title=item.title, text=item.text, category=item.category, creator=item.creator, created_at=item.created_at
            )
        )
    return message


def fill_results(message: pb.Results, ranked: Ranked, catalog: Catalog, *, readable: bool) -> None:
    """The message is the answer's table in packed form, and with `readable` also row by row.

    Filled where it stands in its answer: a message that is put into another one is written out and read again.
    """
    message.count = len(ranked)
    _fill_ids(message.ids, ranked.ids)
    message.scores, message.probabilities = _floats(ranked.scores), _floats(ranked.probabilities)
    message.places = ranked.places.astype("<u4").tobytes()
    if readable:
        message.items.extend(_result_item(ranked, place, catalog) for place in range(len(ranked)))


def _result_item(ranked: Ranked, place: int, catalog: Catalog) -> pb.ResultItem:
    item = catalog.item(int(ranked.rows[place]))
    return pb.ResultItem(
        item_id=ranked.ids[place],
        title=item.title,
        category=item.category,
        creator=item.creator,
        score=None if ranked.scores is None else float(ranked.scores[place]),
        probability=None if ranked.probabilities is None else float(ranked.probabilities[place]),
        place=int(ranked.places[place]),
    )


def _floats(column: npt.NDArray[np.float32] | None) -> bytes:
    return b"" if column is None else column.astype("<f4").tobytes()


def id_of(text: str, where: str) -> str:
    """An id of an allowed length. Raises BadRequest."""
    if not text:
        raise BadRequest(f"{where}: is empty; an id is needed")
    return words_of(where, text, MAX_ID)


def words_of(where: str, text: str, limit: int) -> str:
    """A text of at most `limit` bytes. Raises BadRequest."""
    size = len(text.encode())
    if size > limit:
        raise BadRequest(f"{where}: {size:,} bytes, at most {limit:,} are allowed")
    return text


def at_most(where: str, count: int, limit: int) -> None:
    """Nothing happens if so many entries are allowed. Raises BadRequest."""
    if count > limit:
        raise BadRequest(f"{where}: {count:,} entries, at most {limit:,} are allowed")


def _within(where: str, value: int, limit: int) -> int:
    if value > limit:
        raise BadRequest(f"{where}: {value:,}, at most {limit:,} is allowed")
    return value
