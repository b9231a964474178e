"""What the workers of one server are made of: the hand-over of changes, the parent, its command lines and its pages."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from google.protobuf.message import Message
from prometheus_client import generate_latest

from index.changes import ChangeRefused
from index.durable import StoreBusy
from ranking.cli import serve
from ranking.cli.serve_workers import CannotShare, _command, serve_workers
from ranking.cli.top_look import Look, _samples, compared
from ranking.serving import recommender_pb2 as pb
from ranking.serving.status import Draining, Handed, Late, Overloaded, message_of, status_of
from ranking.serving.workers import One, WorkerFailed, Workers, share_of_cores
from ranking.serving.workers_pages import _Merged
from ranking.serving.workers_peers import Change, Peers

SAID = pb.UpsertItemsResponse(position=7, request_id="r1")
SERVES = """trap 'exit 0' TERM; echo '{"worker": "%s"}'; while :; do sleep .05; done"""


def asked(seconds: float = math.inf) -> Change:
    return Change("UpsertItems", b"raw", "shop", "r1", time.monotonic() + seconds)


async def busy(*_: Change) -> Message:
    raise StoreBusy("another process writes")


def between(folder: Path, neighbour: Callable[[Change], Awaitable[Message]], seconds: float = 30.0) -> Message:
    """What worker 0 answers to a change when somebody else writes and worker 1 does this."""

    async def run() -> Message:
        one, other = Peers(folder / "0"), Peers(folder / "1")
        await one.start(busy)
        await other.start(neighbour)
        try:
            return await one.change(asked(seconds), pb.UpsertItemsResponse, busy)
        finally:
            await one.stop()
            await other.stop()

    return asyncio.run(run())


def test_a_change_goes_to_the_worker_that_writes(tmp_path: Path) -> None:
    taken: list[Change] = []

    async def take(change: Change) -> Message:
        taken.append(change)
        return SAID

    assert between(tmp_path, take) == SAID
    assert [(one.method, one.raw, one.caller, one.request_id) for one in taken] == [("UpsertItems", b"raw", "shop", "r1")]
    assert 20 < taken[0].left_s < 30


def test_a_neighbours_refusal_is_the_callers_own(tmp_path: Path) -> None:
    def refusing(error: Exception) -> Callable[[Change], Awaitable[Message]]:
        async def take(_: Change) -> Message:
            raise error

        return take

    with pytest.raises(Handed, match="no id") as caught:
        between(tmp_path, refusing(ChangeRefused("no id")))
    assert status_of(caught.value).name == "INVALID_ARGUMENT"
    with pytest.raises(Overloaded, match="too many") as full:
        between(tmp_path, refusing(Overloaded("too many", 1.5)))
    assert full.value.retry_s == 1.5
    with pytest.raises(Handed) as bug:
        between(tmp_path, refusing(ZeroDivisionError("secret")))
    assert status_of(bug.value).name == "INTERNAL" and message_of(bug.value, "r1") == message_of(ZeroDivisionError(), "r1")
    for elsewhere in (StoreBusy("not here either"), Draining("going down")):
        with pytest.raises(StoreBusy, match="another process writes"):
            between(tmp_path, refusing(elsewhere))


def test_a_neighbour_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    async def slow(_: Change) -> Message:
        await asyncio.sleep(60)
        return SAID

    began = time.monotonic()
    with pytest.raises(Late):
        between(tmp_path, slow, seconds=0.3)
    assert time.monotonic() - began < 30


def test_a_neighbour_that_dies_leaves_it_open(tmp_path: Path) -> None:
    async def run() -> None:
        async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.close()

        server = await asyncio.start_unix_server(die, tmp_path / "1")
        with pytest.raises(Handed, match="kept or not") as caught:
            await Peers(tmp_path / "0").change(asked(), pb.UpsertItemsResponse, busy)
        assert status_of(caught.value).name == "UNAVAILABLE"
        server.close()  # its socket stays behind, as that of a killed worker does
        with pytest.raises(StoreBusy):
            await Peers(tmp_path / "0").change(asked(), pb.UpsertItemsResponse, busy)

    asyncio.run(run())


def shells(*scripts: str) -> Workers:
    return Workers([["sh", "-c", script] for script in scripts], {"PATH": "/usr/bin:/bin"}, 1.0)


def test_a_worker_that_dies_is_started_again_and_all_end_together(tmp_path: Path) -> None:
    dies_once = f'if test -e {tmp_path}/lived; then {SERVES % 0}; fi; echo \'{{"worker": "0"}}\'; touch {tmp_path}/lived; exit 3'

    async def run() -> tuple[Workers, list[object]]:
        workers, stop, told = shells(dies_once, SERVES % 1), asyncio.Event(), []
        task = asyncio.create_task(workers.run(told.append, stop))
        async with asyncio.timeout(60):
            while not (workers.all[0].restarts and all(one.facts for one in workers.all)):
                await asyncio.sleep(0.05)
        stop.set()
        await task
        return workers, told

    workers, told = asyncio.run(run())
    assert len(told) == 1 and [one.restarts for one in workers.all] == [1, 0]
    assert [one.facts for one in workers.all] == [None, None]


def test_a_worker_that_cannot_begin_ends_all() -> None:
    async def run(workers: Workers) -> None:
        await workers.run(print, asyncio.Event())

    workers = shells("exit 2", SERVES % 1)
    with pytest.raises(WorkerFailed, match=r"worker 0 ended \(status 2\)"):
        asyncio.run(run(workers))
    assert workers.all[1].process is not None and workers.all[1].process.returncode is not None


def test_cores_are_divided_unless_somebody_said_how() -> None:
    assert share_of_cores(10_000, {})["OMP_NUM_THREADS"] == "1"
    assert int(share_of_cores(1, {})["OMP_NUM_THREADS"]) >= 1
    assert share_of_cores(2, {"OMP_NUM_THREADS": "9"}) == {"OMP_NUM_THREADS": "9"}


def context_of(*words: str) -> typer.Context:
    app = typer.Typer()
    app.command()(serve.serve)
    needed = ["--store", "s", "--encoder", "e", "--workers", "2"]
    return typer.main.get_command(app).make_context("serve", [*needed, *words])


def command_of(context: typer.Context, place: int) -> Sequence[str]:
    return _command(context, Path("/tmp/x"), place, 70)


def test_a_worker_is_told_what_was_typed_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BREWLINE_MEMBERS", "redis://user:secret@host/0")
    context = context_of("--hybrid", "--most-waiting", "9", "--metrics-port", "5", "--ui", "--json")
    for place in (0, 1):
        words = command_of(context, place)
        assert "secret" not in " ".join(words) and "--workers" not in words
        assert ("--ui" in words) == (place == 0), "one page, and its port is taken once"
        pairs = dict(pairwise(words))
        told = {"--worker": f"/tmp/x/{place}", "--port": "70", "--metrics-port": "0", "--most-waiting": "9", "--store": "s"}
        assert told.items() <= pairs.items() and "--hybrid" in words


def test_a_store_in_memory_is_refused() -> None:
    with pytest.raises(CannotShare, match="each process's own"):
        serve_workers(context_of("--members", "sqlite::memory:"))


def test_pages_of_workers_are_one_page() -> None:
    page = '# HELP calls_total Calls.\n# TYPE calls_total counter\ncalls_total{code="OK"} %d\n'
    extra = '# TYPE brewline_serving_info gauge\nbrewline_serving_info{snapshot="s"} 1\n'
    items = '# TYPE brewline_items gauge\nbrewline_items{which="all"} 60\n# TYPE brewline_queue_length gauge\n'
    pages = {str(place): page % (place + 3) + extra + items + "brewline_queue_length 2\n" for place in range(2)}
    workers = [One("0", ["x"]), One("1", ["x"], restarts=4), One("2", ["x"])]
    text = generate_latest(_Merged({**pages, "2": None}, workers)).decode()
    told = _samples(text)
    assert {one.labels["worker"]: one.value for one in told["calls_total"]} == {"0": 3, "1": 4}
    assert text.count("# TYPE calls_total counter") == 1 and text.count("# HELP calls_total") == 1
    assert {one.labels["worker"]: one.value for one in told["brewline_worker_up"]} == {"0": 1, "1": 1, "2": 0}
    assert {one.labels["worker"]: one.value for one in told["brewline_worker_restarts_total"]} == {"0": 0, "1": 4, "2": 0}
    seen = compared(Look(0.0, told), Look(1.0, told))
    assert json.loads(json.dumps(seen["items"])) == {"all": 60}, "one store, whoever tells of it"
    assert seen["queue"] == {"length": 4, "oldest_seconds": None}
