"""A server is told to end while it looks for, loads or exchanges a night: it ends, and until then it takes changes."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from index.durable import StoreBusy, write_durably
from index.publish import current
from index.serving import scan_crew
from index.snapshot import snapshots_dir
from ranking.serving.client import Client
from ranking.serving.current import Current
from ranking.serving.stack import open_stack
from ranking.serving.swap import Watcher
from ranking.serving.swap_load import Loader
from ranking.serving.today import Today
from ranking.serving.worker import Worker
from retrieval.data.schema import Dataset
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import nightly

ROOT = Path(__file__).parents[3]
SERVE = """
import os, signal, threading, typer
from ranking.cli.serve import serve

def both():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGHUP)  # Python changes threads in neither, so the event loop meets both signals in one turn
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=both, daemon=True).start()
typer.run(serve)
"""


@contextmanager
def served(store: Path, encoder: Path) -> Iterator[subprocess.Popen[str]]:
    """A real server that looks for a new night when it is told to, or after a minute; it is dead after the block."""
    options = ["--store", store, "--encoder", encoder, "--port", "0", "--json", "--swap-poll-seconds", "60"]
    command = [sys.executable, "-c", SERVE, *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            port = json.loads(server.stdout.readline())["port"]
            with Client(f"127.0.0.1:{port}", deadline_ms=30_000) as client:
                assert client.info().items == 60
            yield server
        finally:
            server.kill()


def test_two_signals_in_one_moment_end_a_server(night: Path, copied: Path) -> None:
    with served(copied, night / "encoder1") as server:
        assert server.stdin is not None
        server.stdin.write("\n")
        server.stdin.flush()
        assert server.wait(30) == 0


def test_a_load_that_never_ends_does_not_keep_a_server(night: Path, copied: Path) -> None:
    stuck = snapshots_dir(copied) / "20240122-000000000000"
    stuck.mkdir()
    os.mkfifo(stuck / "MANIFEST.json")
    with served(copied, night / "encoder1") as server:
        write_durably(copied / "CURRENT", f"{stuck.name}\n".encode())
        server.send_signal(signal.SIGHUP)
        held = opened_by_a_reader(stuck / "MANIFEST.json")
        try:
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            os.close(held)


def opened_by_a_reader(fifo: Path) -> int:
    """The writing end, as soon as somebody waits at the other one."""
    end = time.monotonic() + 30
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO and time.monotonic() < end
            time.sleep(0.01)


def test_a_stop_in_the_midst_of_an_exchange_takes_the_log_from_nobody(
    night: Path, copied: Path, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, other = (open_stack(copied, night / "encoder1", None, None) for _ in range(2))
    assert before.today.withdraw(["i1"])[0] == 1
    first = current(copied)
    assert first is not None
    nightly(tiny_dataset, Encoder.load(night / "encoder1"), None, copied, end_of(tiny_dataset) + 3_600)
    amid, go_on = threading.Event(), threading.Event()

    def slow(today: Today, other: Today, take_over: Callable[[Today, Today], None] = Today.take_over) -> None:
        take_over(today, other)
        amid.set()
        go_on.wait(30)

    monkeypatch.setattr(Today, "take_over", slow)

    async def main() -> None:
        worker, served_now, asked = Worker(), Current(before), asyncio.Event()
        watcher = Watcher(served_now, worker, 0.0, asked)
        watcher.start()
        asked.set()
        assert await asyncio.to_thread(amid.wait, 60)
        await watcher.stop()
        go_on.set()
        await worker.submit(lambda: None)
        with pytest.raises(StoreBusy):
            other.today.withdraw(["i3"])
        # What the server accepted before it was told to end is answered by the stack that is there.
        assert (await worker.submit(lambda: served_now.stack.today.withdraw(["i2"])))[0] == 2
        assert served_now.stack.snapshot.name != first.name
        await asyncio.to_thread(worker.close)
        served_now.stack.today.close()
        other.today.close()

    asyncio.run(main())
    before.today.close()


def whose(_: int) -> tuple[str, int, int]:
    time.sleep(0.05)  # so that no thread takes the share of another
    number = threading.get_native_id()
    return threading.current_thread().name, os.getpriority(os.PRIO_PROCESS, number), torch.get_num_threads()


@pytest.mark.skipif(sys.platform != "linux", reason="a priority is the whole process's elsewhere")
def test_scans_of_a_night_that_was_loaded_beside_have_all_cores_and_the_usual_priority() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    scan_crew.cache_clear()
    thread = Loader()
    try:
        thread.start()
        crew = thread.submit(scan_crew).result(20)
        assert thread.submit(lambda: (torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, 0))).result(20) == (1, 15)
        found = set(crew.each(whose, list(range(3))))
        assert crew.threads == 3 and len(found) == 3
        assert {one[1:] for one in found} == {(os.getpriority(os.PRIO_PROCESS, os.getpid()), 1)}
        assert torch.get_num_threads() == 3
    finally:
        thread.close()
        thread.join(20)
        scan_crew.cache_clear()
        torch.set_num_threads(usual)
