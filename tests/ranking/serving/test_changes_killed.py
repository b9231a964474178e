"""kill -9 of a server that takes changes: whatever it acknowledged is there when the next one starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ranking.serving.client import Client, ServiceError
from ranking.serving.stack import open_stack
from retrieval.data.schema import Item
from retrieval.recent import Told
from retrieval.records import Entry

ROOT = Path(__file__).parents[3]
SERVE = "import sys, typer; from ranking.cli.serve import serve; typer.run(serve)"


@pytest.mark.parametrize("rounds", [2, pytest.param(25, marks=pytest.mark.soak)])
def test_nothing_acknowledged_is_lost(night: Path, copied: Path, rounds: int) -> None:
    store = copied
    put: set[str] = set()
    leaving: set[str] = set()
    gone: set[str] = set()
    seen: set[str] = set()
    for turn in range(rounds):
        command = [sys.executable, "-c", SERVE, "--store", store, "--encoder", night / "encoder1", "--port", "0", "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True, env=environment) as server:
            assert server.stdout is not None
            address = f"127.0.0.1:{json.loads(server.stdout.readline())['port']}"
            tellers = [
                threading.Thread(target=tell, args=(address, f"{turn}-{who}", put, leaving, gone, seen)) for who in range(3)
            ]
            for teller in tellers:
                teller.start()
            enough = len(put) + 5 * (turn + 1)
            deadline = time.monotonic() + 30
            while len(put) < enough and time.monotonic() < deadline:
                time.sleep(0.005)
            server.send_signal(signal.SIGKILL)
            for teller in tellers:
                teller.join(30)
    assert len(put) > 5 * rounds and gone and seen
    stack = open_stack(store, night / "encoder1", None, None)
    moment, _ = stack.today.now()
    assert stack.members is not None
    assert moment.rows(sorted(put - leaving)).min() >= 0 and moment.rows(sorted(gone)).max() == -1
    assert seen <= set(stack.members.get("m1").record.seen)
    stack.today.close()


def tell(address: str, name: str, put: set[str], leaving: set[str], gone: set[str], seen: set[str]) -> None:
    """Sends changes one after another until nobody answers; what was acknowledged goes into the sets.

    `leaving`: a withdrawal was sent. One that was not acknowledged may have been written all the same.
    """
    with Client(address, deadline_ms=5_000) as client, suppress(ServiceError):
        for count in range(1_000):
            one = f"{name}-{count}"
            client.upsert([Item(one, f"roses no {count}")])
            put.add(one)
            if count % 3 == 0:
                leaving.add(one)
                client.withdraw([one])
                gone.add(one)
            client.record("m1", [Told(one, Entry(one, 1_705_795_200, "like"))])
            seen.add(one)
