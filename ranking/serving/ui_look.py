"""What the page may look up beside the contract's calls: ids of members, one member in words, items by their title. All bounded.

Called from the page's own threads, so nothing here touches the models, or asks the day for its present moment: what was shown
last is good enough to choose from, and the answer itself is made by the contract's calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from index.keyvalue import KeyValueStore
from ranking.serving.answers import NO_MEMBERS
from ranking.serving.messages import MAX_IDS
from ranking.serving.stack import Stack
from retrieval.catalog import Catalog
from retrieval.data.schema import Connection, Engagement, Item
from retrieval.members import RECORD, UnknownMember
from retrieval.records import view_of

MOST_FOUND = 20
LOOK_S = 0.3
"""Seconds that a search may look: a store of millions is not read through for somebody who types."""
TOGETHER = 50_000
"""Titles that are compared at once."""
NEWEST_LIVE = 1_000
CASED = 0x1_F000
"""No letter beyond it has a case."""

Json = dict[str, object]


def find_members(store: KeyValueStore, part: str) -> Json:
    """At most MOST_FOUND ids that hold `part` (of any case), and whether all ids were looked at. Raises StoreError."""
    wanted, until = part.casefold(), time.monotonic() + LOOK_S
    found: list[str] = []
    for one in store.ids(RECORD):
        if wanted in one.casefold():
            found.append(one)
        if len(found) > MOST_FOUND or time.monotonic() > until:
            return {"ids": found[:MOST_FOUND], "all": False}
    return {"ids": found, "all": True}


def member_card(stack: Stack, member_id: str) -> Json:
    """What the member store knows of a member, in words; `hidden` are ids of the history that have no words to be shown with.

    Raises UnknownMember, MemberRecordError, StoreError.
    """
    if stack.members is None:
        raise UnknownMember(NO_MEMBERS)
    record = stack.members.get(member_id).record
    view = view_of(record, stack.today.shown[1])
    shown = {done.item.item_id for done in view.history}
    hidden = [one for one in dict.fromkeys(reversed(record.seen)) if one not in shown]
    return {
        "id": member_id,
        "profile": dict(record.member.profile),
        "numbers": dict(record.member.numbers),
        "history": [_engagement(done) for done in view.history],
        "connections": [_connection(edge) for edge in record.connections],
        "hidden": hidden[:MAX_IDS],
    }


def find_items(stack: Stack, words: str) -> Json:
    """At most MOST_FOUND items whose title holds every word (of any case), and whether all titles were looked at.

    The item of that very id is the first, the newest changes come before the night's.
    """
    view, catalog = stack.today.shown
    wanted, until = words.casefold().split(), time.monotonic() + LOOK_S
    found: dict[str, Item] = {}
    rows = [row for row in catalog.rows([words.strip()]).tolist() if row >= 0]
    live = range(view.count - 1, max(view.first_live, view.count - NEWEST_LIVE) - 1, -1)
    rows += [row for row in live if _holds(catalog.title(row), wanted)]
    whole = True
    if wanted:
        for row in _night(catalog, wanted):
            if row is not None:
                rows.append(row)
            if len(rows) > 4 * MOST_FOUND or time.monotonic() > until:
                whole = False
                break
    for row in rows:
        item = catalog.item(row)
        if int(catalog.rows([item.item_id])[0]) == row:  # neither withdrawn nor replaced since
            found.setdefault(item.item_id, item)
    return {"items": [_item(item) for item in islice(found.values(), MOST_FOUND)], "all": whole and len(found) <= MOST_FOUND}


def _night(catalog: Catalog, wanted: list[str]) -> Iterator[int | None]:
    """The rows of the night whose title holds every word; None after each part of the column, so that the caller may stop."""
    titles = catalog.columns.raw["title"]
    longest, odd = max(wanted, key=len), _odd_letters()
    for start in range(0, len(titles), TOGETHER):
        part = titles.slice(start, TOGETHER)
        near = pc.or_(pc.match_substring(part, longest, ignore_case=True), pc.match_substring_regex(part, odd))
        for row in pc.indices_nonzero(near).cast(pa.int64()).to_pylist():
            if _holds(catalog.title(start + row), wanted):
                yield start + row
        yield None


@cache
def _odd_letters() -> str:
    """A pattern of the letters that folding turns into others than their small ones ("ß" into "ss"): what a title with one of
    them holds is not to be seen before it is folded."""
    return "[" + "".join(one for one in map(chr, range(CASED)) if one.casefold() != one.lower() or len(one.lower()) > 1) + "]"


def _holds(title: str, wanted: list[str]) -> bool:
    folded = title.casefold()
    return bool(wanted) and all(word in folded for word in wanted)


def _item(item: Item) -> Json:
    return {"item_id": item.item_id, "title": item.title, "category": item.category, "creator": item.creator}


def _engagement(done: Engagement) -> Json:
    return {**_item(done.item), "action": done.action, "timestamp": done.timestamp, "liked": done.label}


def _connection(edge: Connection) -> Json:
    return {"other_id": edge.other_id, "kind": edge.kind, "since": edge.since}
