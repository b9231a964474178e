"""A server whose machine is odd while it serves, as one process sees it: its clock jumps, its disk is slow, or hangs.

`odd_machine.c` is preloaded into the server and stands between it and libc; the server's code is what it always is.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from index.store import open_store
from ranking.serving.client import Client, ServiceError
from ranking.serving.load import CODES, Measured, Target
from ranking.serving.load_requests import RequestWish, requests_of
from ranking.serving.stack import MEMBERS_FILE, open_stack
from retrieval.data.exported_journal import JOURNAL_DIR, Shown, read_journal
from retrieval.data.refusals import Refusals
from retrieval.data.schema import DAY, Item
from retrieval.recent import Told, acknowledged
from retrieval.records import Entry

Loaded = Callable[..., AbstractContextManager[Callable[[], Measured]]]
SOURCE = Path(__file__).with_name("odd_machine.c")
HOUR, FOR_EVER_S = 3_600, 3_600.0
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="NO cc ON A LINUX HERE: JUMPING CLOCKS, SLOW DISKS WERE NOT TESTED",
)


class Machine:
    """What a server's process believes of its clock and of the disk below one folder."""

    def __init__(self, control: Path) -> None:
        self._control = control
        control.write_bytes(bytes(16))

    def jump(self, seconds: int) -> None:
        """The clock of the calendar is that many seconds off the true one."""
        self._write(0, seconds)

    def slow(self, seconds: float) -> None:
        """Each read, write and sync of a file takes so much longer from now on; those that wait are done when it is 0."""
        self._write(8, round(seconds * 1e6))

    def _write(self, place: int, number: int) -> None:
        with self._control.open("r+b") as file:
            file.seek(place)
            file.write(struct.pack("=q", number))


class Server:
    """A server of a store with its journal, on a machine that can be made odd."""

    def __init__(self, ready: dict[str, str], process: subprocess.Popen[str], machine: Machine) -> None:
        self.address, self.metrics = f"127.0.0.1:{ready['port']}", ready["metrics"]
        self.process, self.machine = process, machine

    def healthy(self, timeout: float = 60.0) -> int:
        """What the health service says."""
        with grpc.insecure_channel(self.address) as channel:
            return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout).status)

    def meter(self, name: str) -> float:
        """The value of a meter without labels."""
        with urllib.request.urlopen(f"{self.metrics}/metrics", timeout=60) as page:
            (value,) = [line.rpartition(" ")[2] for line in page.read().decode().splitlines() if line.startswith(f"{name} ")]
        return float(value)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled `odd_machine.c`."""
    path = tmp_path_factory.mktemp("odd") / "odd_machine.so"
    done = subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", path, SOURCE, "-ldl"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def server(library: Path, night: Path, copied: Path, tmp_path: Path) -> Iterator[Server]:
    """Serves the copied night with its ranker; the test may kill it."""
    machine = Machine(tmp_path / "odd")
    models = ("--encoder", night / "encoder1", "--ranker", night / "ranker1")
    words = ("serve", "--store", copied, *models, "--port", 0, "--metrics-port", 0, "--json")
    odd = {"LD_PRELOAD": str(library), "ODD_MACHINE": str(tmp_path / "odd"), "ODD_FOLDER": str(copied)}
    with subprocess.Popen(
        [sys.executable, "-m", "ranking.cli.main", *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **odd},
    ) as process:
        try:
            assert process.stdout is not None
            yield Server(json.loads(process.stdout.readline()), process, machine)
        finally:
            machine.slow(0)
            process.kill()


@contextmanager
def perhaps_refused() -> Iterator[None]:
    """A server that is busy may say so, also five times."""
    try:
        yield
    except ServiceError as error:
        assert error.code == "RESOURCE_EXHAUSTED", error


def event(name: str, at: int = 0) -> list[Told]:
    return [Told(name, Entry("i1", at, "like"))]


def test_nothing_waits_for_or_believes_a_clock_that_jumps(server: Server, night: Path, copied: Path, loaded: Loaded) -> None:
    """Two days on, an hour back, and true again, each while members are encoded together."""
    target = Target(server.address, "Retrieve", requests_of(copied, None, RequestWish("retrieve-cold", k=5)), 60.0)
    asked: list[int] = []
    with Client(server.address) as client:
        for turn, jump in enumerate((2 * DAY, -HOUR, 0)):
            with loaded(target, 3.0, callers=3, begun=4) as result:
                server.machine.jump(jump)
                jumped = time.monotonic()
                asked.append(int(time.time()) + jump)
                answer = client.recommend(f"m{turn}", 5, surface="feed")
                assert len(answer) == 5 and answer.degraded.name == "NONE" and 0 < answer.times["total_us"] < 60_000_000
                told = [client.record("m7", event(f"e{one}")).recorded for one in (turn, 0)]
                assert told == [1, 0], "an event counts once, whatever day it is taken for"
                client.upsert([Item(f"u{turn}", "roses and a hedge")])
                assert f"u{turn}" in client.retrieve("m2", 200).ids
                assert server.healthy() == SERVING and 0 < client.info().uptime_seconds < HOUR
                assert abs(server.meter("brewline_clock_jump_seconds") - jump) < 5, "who looks is told"
            found = result()
            assert found.answered.all() and not found.degraded.any() and (found.total_ms <= found.ms).all()
            assert (found.started + found.at > jumped).any(), "the clock jumped under load"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    refusals = Refusals()
    records = list(read_journal(copied / JOURNAL_DIR, refusals))
    shown = {one.member: one.at for one in records if isinstance(one, Shown)}
    assert not len(refusals) and [shown[f"m{turn}"] - at in range(60) for turn, at in enumerate(asked)] == [True] * 3
    kept(night, copied, [f"u{turn}" for turn in range(3)], [f"e{turn}" for turn in range(3)])


def test_a_slow_disk_refuses_in_time_and_loses_nothing_acknowledged(
    server: Server, night: Path, copied: Path, loaded: Loaded
) -> None:
    """Each read, write and sync below the store takes 200 ms; in the end the server is killed in the middle of that."""
    target = Target(server.address, "Retrieve", requests_of(copied, None, RequestWish("retrieve", k=5)), 5.0)
    put: list[str] = []
    told: list[str] = []
    with loaded(target, 8.0, callers=3, begun=4) as result, Client(server.address, 30_000) as client:
        server.machine.slow(0.2)
        until = time.monotonic() + 6.0
        while time.monotonic() < until:
            with perhaps_refused():
                client.upsert([Item(f"u{len(put)}", "roses and a hedge")])
                put.append(f"u{len(put)}")
                assert client.record("m7", event(f"e{len(told)}")).recorded == 1
                told.append(f"e{len(told)}")
                assert len(client.recommend(f"m{len(told)}", 5, surface="feed")) == 5
        assert server.healthy() == SERVING
    found = result()
    assert {CODES[code] for code in found.code.tolist()} <= {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert found.answered.any() and put and told
    server.process.kill()
    kept(night, copied, put, told)


def test_a_disk_that_hangs_is_unhealthy_until_it_is_mended(server: Server, night: Path, copied: Path) -> None:
    with Client(server.address, 20_000) as client:
        client.upsert([Item("before", "roses")])
        server.machine.slow(FOR_EVER_S)
        with pytest.raises(ServiceError) as caught:
            client.upsert([Item("lost", "roses")], deadline_ms=1_000)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        assert server.healthy() == NOT_SERVING, "one thread answers, and it waits for the disk"
        with pytest.raises(ServiceError) as caught:
            client.retrieve("m1", 5, deadline_ms=1_000)
        assert caught.value.code in ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
        server.machine.slow(0)
        until = time.monotonic() + 60
        while server.healthy() != SERVING and time.monotonic() < until:
            time.sleep(0.2)
        assert len(client.retrieve("m1", 5)) == 5
        client.upsert([Item("after", "roses")])
    server.process.kill()
    kept(night, copied, ["before", "after"], [])


def kept(night: Path, store: Path, put: list[str], told: list[str]) -> None:
    """What was acknowledged is there for whoever opens the store next."""
    stack = open_stack(store, night / "encoder1", None, None)
    assert stack.today.now()[0].rows(put).min() >= 0
    stack.today.close()
    members = open_store(f"sqlite:{store / MEMBERS_FILE}")
    assert set(told) <= {one.event for one in acknowledged(members, Refusals())}
    members.close()
