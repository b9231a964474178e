"""A member comes back as they were put, knows only the past, and never lends a vector to a changed record or another encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.store import KeyValueStore, open_store
from retrieval.data.schema import DAY, Connection, Dataset, Member, action_kind
from retrieval.members import MAGIC, RECORD, VECTOR, MemberStore, UnknownMember
from retrieval.members import _digest as members_digest
from retrieval.recent import MOST, RECENT, RECENT_DAYS, Told, append, decode_told, stranger
from retrieval.records import (
    NEWEST,
    Entry,
    ItemWords,
    MemberRecord,
    MemberRecordError,
    decode_record,
    encode_record,
    records_of,
    view_digest,
    view_of,
)

WEIRD = MemberRecord(
    Member("m:{1}\n🦆", {"role": "<|item|> \x00", "b": "é", "a": ""}, {"age": 3.5}),
    (Entry("i1", 5, "like", 1), Entry("i2", 6, "rating:3", 0), Entry("gone", 7, "", None)),
    (Connection("author 1", "works with", None), Connection("x", "follows", 9)),
    11,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyValueStore]:
    found = open_store(f"sqlite:{tmp_path / 'members.sqlite'}")
    yield found
    found.close()


def vectors(n: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32)


def test_a_record_comes_back_whole_and_in_order(store: KeyValueStore) -> None:
    MemberStore(store, "f").put([WEIRD])
    found = MemberStore(store, "other encoder").get("m:{1}\n🦆")
    assert found.record == WEIRD
    assert list(found.record.member.profile) == ["role", "b", "a"]
    assert found.record.seen == ["i1", "i2", "gone"]
    assert found.vector is None


def test_an_unknown_member_is_an_error_that_helps(store: KeyValueStore) -> None:
    with pytest.raises(UnknownMember, match=r"'nobody'.*describe the member"):
        MemberStore(store, "f").get("nobody")


def test_a_vector_belongs_to_one_encoder_and_one_record(store: KeyValueStore) -> None:
    members = MemberStore(store, "f")
    (vector,) = vectors(1)
    members.put([WEIRD])
    members.put_vectors([WEIRD], [b"v" * 16], vector[None])
    np.testing.assert_array_equal(members.get(WEIRD.member.member_id).vector, vector)
    assert MemberStore(store, "g").get(WEIRD.member.member_id).vector is None
    changed = replace(WEIRD, history=(*WEIRD.history, Entry("i9", 12, "like", 1)))
    members.put([changed])
    assert members.get(WEIRD.member.member_id).vector is None
    assert members.vectors([changed], [b"v" * 16])[0] is not None
    assert members.vectors([changed], [b"w" * 16]) == [None]


def test_a_record_that_only_got_older_keeps_its_vector(store: KeyValueStore) -> None:
    members = MemberStore(store, "f")
    members.put([WEIRD])
    members.put_vectors([WEIRD], [b"v" * 16], vectors(1))
    members.put([replace(WEIRD, as_of=12_345)])
    known = members.get(WEIRD.member.member_id)
    assert known.record.as_of == 12_345 and known.vector is not None
    members.put([replace(WEIRD, as_of=12_345, connections=WEIRD.connections[:1])])
    assert members.get(WEIRD.member.member_id).vector is None


@pytest.mark.parametrize("stored", [b"", b"{", b"[]", b'{"format":99}', b'{"format":1}', b"\x80\x04K\x01."])
def test_damaged_records_are_named(store: KeyValueStore, stored: bytes) -> None:
    store.put_many(RECORD, {"m1": stored})
    with pytest.raises(MemberRecordError, match="'m1'"):
        MemberStore(store, "f").get("m1")


@pytest.mark.parametrize("stored", [b"", b"BLV1short", b"BLV1" + b"d" * 32 + b"\x00\x00\xc0\x7f", b"BLV2" + b"d" * 36])
def test_a_damaged_vector_is_named_to_a_server_and_none_to_a_night(
    store: KeyValueStore, stored: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    members = MemberStore(store, "f")
    members.put([WEIRD])
    store.put_many(VECTOR, {WEIRD.member.member_id: stored}, "f")
    with pytest.raises(MemberRecordError, match="vector"):
        members.get(WEIRD.member.member_id)
    assert members.vectors([WEIRD], [b"d" * 16]) == [None]
    assert "1 vectors of members are damaged and made anew" in caplog.text


def test_records_know_engagements_strictly_before_the_moment(tiny_dataset: Dataset) -> None:
    moment = int(tiny_dataset.engagements.timestamp[len(tiny_dataset.engagements) // 2])
    records = list(records_of(tiny_dataset, moment))
    assert [record.member.member_id for record in records] == tiny_dataset.members.member_id
    entries = [entry for record in records for entry in record.history]
    assert len(entries) == int((tiny_dataset.engagements.timestamp < moment).sum()) > 0
    assert {action_kind(entry.action) for entry in entries} == {"like"}
    for record in records:
        times = [entry.timestamp for entry in record.history]
        assert times == sorted(times) and max(times, default=0) < moment


def test_a_view_shows_the_newest_known_items_in_order(tiny_dataset: Dataset) -> None:
    words = ItemWords(tiny_dataset.items)
    long = tuple(Entry(f"i{n % 60}", n, "like", 1) for n in range(NEWEST + 10))
    view = view_of(MemberRecord(Member("m"), (*long, Entry("withdrawn", 10**6, "like", 1))), words, "a wish")
    assert [done.timestamp for done in view.history] == list(range(11, NEWEST + 10))
    assert view.history[0].item == tiny_dataset.items[11 % 60]
    assert view.instruction == "a wish"


def test_a_view_digest_changes_with_every_word(tiny_dataset: Dataset) -> None:
    words = ItemWords(tiny_dataset.items)
    record = next(record for record in records_of(tiny_dataset, 1 << 40) if record.history)
    before = view_digest(view_of(record, words))
    assert before == view_digest(view_of(decode_record(encode_record(record), record.member.member_id), words))
    titles = [f"{title}!" for title in tiny_dataset.items.title]
    assert before != view_digest(view_of(record, ItemWords(replace(tiny_dataset.items, title=titles))))
    assert before != view_digest(view_of(replace(record, history=record.history[1:]), words))
    assert before != view_digest(view_of(replace(record, connections=()), words))


def liked(event: str, at: int) -> Told:
    return Told(event, Entry("i1", at, "like"))


def test_the_id_of_an_event_that_the_night_took_over_is_known_for_its_days(store: KeyValueStore) -> None:
    night = replace(stranger("m"), history=(Entry("i1", 5, "like"),))
    assert append(store, stranger("m"), [liked("a", 5)], now=10) == 1
    assert append(store, night, [liked("b", 11)], now=20) == 1, "and a is forgotten"
    (stored,) = store.get_many(RECENT, ["m"])
    assert [one.event_id for one in decode_told(stored, "m")] == ["b"]
    assert append(store, night, [liked("a", 30)], now=30) == 0, "sent again without a time, which is then another"
    last = 20 + RECENT_DAYS * DAY
    assert append(store, night, [liked("c", 40), liked("a", 40)], now=last - 1) == 1
    assert append(store, night, [liked("a", 50)], now=last) == 1


def test_more_than_is_kept_of_a_member_still_counts_once(store: KeyValueStore) -> None:
    told = [liked(f"e{n}", n) for n in range(MOST + 5)]
    assert append(store, stranger("m"), told[:MOST], now=1) == MOST
    assert append(store, stranger("m"), told[MOST:], now=2) == 5
    assert append(store, stranger("m"), told[:5], now=3) == 0
    (stored,) = store.get_many(RECENT, ["m"])
    assert len(decode_told(stored, "m")) == MOST


def test_ids_alone_are_no_member(store: KeyValueStore) -> None:
    store.put_many(RECENT, {"m": b'[["a",99]]'})
    with pytest.raises(UnknownMember):
        MemberStore(store, "f").get("m")
    for damaged in (b'[["a"]]', b'[["a","soon"]]', b"[[]]", b"[5]"):
        store.put_many(RECENT, {"m": damaged})
        with pytest.raises(MemberRecordError, match="since the night"):
            MemberStore(store, "f").get("m")


def test_a_member_whom_a_right_vector_describes_is_known_as_the_whole_record_says(store: KeyValueStore) -> None:
    """The short way makes no entry until it is asked to; what it says is what the long way says."""
    members, who = MemberStore(store, "f"), WEIRD.member.member_id
    members.put([WEIRD])
    for vector in (False, True):
        if vector:
            members.put_vectors([WEIRD], [b"v" * 16], vectors(1))
        found = members.get(who)
        assert (found.vector is not None) == vector
        assert (found.member, found.connections, found.seen) == (WEIRD.member, WEIRD.connections, WEIRD.seen)
        assert found.record == WEIRD and found.record is found.record and found.seen == WEIRD.seen
    members.tell(who, [Told("e1", Entry("later", 9, "like", 1))])
    told = members.get(who)
    assert told.vector is None and told.seen == [*WEIRD.seen, "later"] and told.record.seen == told.seen
    members.put([replace(WEIRD, member=Member(who, {"role": ',"as_of":11}'}))])
    assert MemberStore(store, "f").get(who).member.profile == {"role": ',"as_of":11}'}, "words that look like the last field"


@pytest.mark.parametrize("history", [b"[1]", b'[["i1"]]', b"null"])
def test_a_damaged_history_is_named_where_no_vector_vouches_for_it(store: KeyValueStore, history: bytes) -> None:
    kept = b'{"format":1,"profile":[],"numbers":[],"history":' + history + b',"connections":[],"as_of":1}'
    store.put_many(RECORD, {"m": kept})
    with pytest.raises(MemberRecordError, match="cannot be read"):
        MemberStore(store, "f").get("m")


@pytest.mark.parametrize(
    "parts", [b'"history":[1],"connections":[]', b'"history":[[]],"connections":[]', b'"history":[],"connections":[7]']
)
def test_a_part_that_is_none_is_named_also_where_a_vector_vouches_for_it(store: KeyValueStore, parts: bytes) -> None:
    kept = b'{"format":1,"profile":[],"numbers":[],' + parts + b',"as_of":1}'
    store.put_many(RECORD, {"m": kept})
    value = MAGIC + members_digest(kept) + b"v" * 16 + np.ones(4, "<f4").tobytes()
    store.put_many(VECTOR, {"m": value}, "f")
    found = MemberStore(store, "f").get("m")
    assert found.vector is not None
    with pytest.raises(MemberRecordError, match="cannot be read"):
        assert [found.seen, found.connections]


@pytest.mark.parametrize("end", [b"null}", b'"x"}', b'5,"history":[]}', b"5", b"}"])
def test_only_a_date_at_the_end_is_left_out_of_what_a_vector_is_bound_to(end: bytes) -> None:
    kept = b'{"format":1,"history":[],"as_of":'
    assert members_digest(kept + end) != members_digest(kept + b"5}") == members_digest(kept + b"-77}")
