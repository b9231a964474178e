"""Faults of the disk under load: a full one, a snapshot that is damaged; what was acknowledged stays."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from index.publish import current, publish
from index.snapshot import snapshots_dir
from index.store import open_store
from ranking.ranker import Ranker
from ranking.serving.client import Client, ServiceError
from ranking.serving.load import Target, closed_load
from ranking.serving.load_nights import pair_of
from ranking.serving.load_requests import RequestWish, requests_of
from ranking.serving.load_server import ServerWish, served
from ranking.serving.stack import MEMBERS_FILE, open_stack
from retrieval.data.schema import DAY, Dataset, Item
from retrieval.encoder import Encoder
from retrieval.members import MemberStore
from retrieval.moments import end_of
from retrieval.recent import Told
from retrieval.records import Entry
from retrieval.refresh import nightly

FULL_BYTES = 400_000
"""Far more than the 107,000 bytes of the night's largest file, and of a record's 50,000 more, less than what is sent then."""


@pytest.fixture
def two_nights(night: Path, copied: Path, tiny_dataset: Dataset) -> Path:
    """A store with two snapshots of the same models; the older one of the data is the newer one of the store, and not served."""
    served_now = current(copied)
    assert served_now is not None
    reader, judge = Encoder.load(night / "encoder1"), Ranker.load(night / "ranker1")
    members = MemberStore(open_store(f"sqlite:{copied / MEMBERS_FILE}"), reader.fingerprint)
    nightly(tiny_dataset, reader, judge, copied, end_of(tiny_dataset) - 3 * DAY, members)
    publish(copied, served_now.name)
    return copied


def acknowledged(what: Callable[[int], object], most: int) -> tuple[list[int], str]:
    """The numbers that were acknowledged until one was refused, and with which status."""
    done: list[int] = []
    for number in range(most):
        try:
            what(number)
        except ServiceError as error:
            return done, error.code
        done.append(number)
    return done, "OK"


def test_a_full_disk_refuses_changes_answers_questions_and_loses_nothing(night: Path, copied: Path) -> None:
    text = "roses and a hedge " * 800

    def item(name: str) -> Item:
        return Item(name, f"roses no {name}", text)

    with served(ServerWish(copied, night / "encoder1")) as server, Client(server.address, deadline_ms=30_000) as client:
        client.upsert([item("before")])
        client.record("m1", [Told("before", Entry("before", 1_705_795_200, "like"))])
        before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (FULL_BYTES, before[1]))
        put, refused = acknowledged(lambda number: client.upsert([item(f"u{number}")]), 200)
        assert put and refused == "UNAVAILABLE"
        told, refused = acknowledged(lambda number: client.record("m2", many_events(number)), 400)
        assert told and refused == "UNAVAILABLE", f"{len(told)} times told, then {refused}"
        assert len(client.retrieve("m3", 5)) == 5, "questions need no disk"
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, before)
        client.upsert([item("after")])
        client.withdraw(["before"])
        client.record("m2", many_events(1_000))
        server.check()
    stack = open_stack(copied, night / "encoder1", None, None)
    moment, _ = stack.today.now()
    assert moment.rows([*(f"u{number}" for number in put), "after"]).min() >= 0 and moment.rows(["before"])[0] == -1
    assert stack.members is not None
    assert {event.entry.item_id for number in told for event in many_events(number)} <= set(stack.members.get("m2").record.seen)
    stack.today.close()


def many_events(number: int) -> list[Told]:
    """Fifty engagements that nobody else has."""
    names = [f"{number}-{one}" for one in range(50)]
    return [Told(name, Entry(name + "x" * 400, 1_705_795_200, "like")) for name in names]


def test_a_damaged_snapshot_is_not_served_and_the_next_whole_one_is(night: Path, two_nights: Path) -> None:
    first, second = (one.snapshot for one in pair_of(ServerWish(two_nights, night / "encoder1")))
    vectors = max((path for path in (snapshots_dir(two_nights) / second).iterdir()), key=lambda path: path.stat().st_size)
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    wish = ServerWish(two_nights, night / "encoder1", options=["--swap-poll-seconds", "0.1"])
    requests = requests_of(two_nights, None, RequestWish("retrieve", k=5))
    with served(wish) as server, Client(server.address) as client:
        publish(two_nights, second)
        found = closed_load(Target(server.address, "Retrieve", requests, 20.0), 4, 2.0)
        assert found.answered.all() and found.snapshots == [first], "what is damaged is refused, and the night before goes on"
        vectors.write_bytes(whole)
        until = time.monotonic() + 30
        while client.info().snapshot != second and time.monotonic() < until:
            time.sleep(0.1)
        assert client.info().snapshot == second and len(client.retrieve("m1", 5)) == 5
