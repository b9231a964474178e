"""What the workers of one server are made of: the parent, its command lines."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from ranking.cli import serve
from ranking.cli.serve_workers import CannotShare, _command, _first_number, serve_workers
from ranking.serving.address import CannotListen, bound
from ranking.serving.workers import Facts, WorkerFailed, Workers, share_of_cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="--workers needs Linux")
WAIT_S = 120.0
"""Longer than anything here takes on a busy machine."""
SERVES = """trap 'exit 0' TERM; echo '{"worker": "%s"}'; while :; do echo; sleep .05; done"""


def shells(*scripts: str) -> Workers:
    return Workers([["sh", "-c", script] for script in scripts], {"PATH": "/usr/bin:/bin"}, 1.0)


@asynccontextmanager
async def kept(workers: Workers, ready: Callable[[Facts], None] = print) -> AsyncIterator[Callable[..., Awaitable[None]]]:
    """The workers run, and end with the block; to be told is how to wait until something holds."""
    stop = asyncio.Event()
    task = asyncio.create_task(workers.run(ready, stop))

    async def until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                assert not task.done(), task.result()
                await asyncio.sleep(0.05)

    try:
        yield until
    finally:
        stop.set()
        await task


def test_a_worker_that_dies_is_started_again_and_all_end_together(tmp_path: Path) -> None:
    dies_once = f'if test -e {tmp_path}/lived; then {SERVES % 0}; fi; echo \'{{"worker": "0"}}\'; touch {tmp_path}/lived; exit 3'

    async def run() -> tuple[Workers, list[Facts]]:
        told: list[Facts] = []
        workers = shells(dies_once, SERVES % 1)
        async with kept(workers, told.append) as until:
            await until(lambda: bool(workers.all[0].restarts and all(one.facts for one in workers.all)))
        return workers, told

    workers, told = asyncio.run(run())
    assert len(told) == 1 and [one.restarts for one in workers.all] == [1, 0]
    assert [one.facts for one in workers.all] == [None, None]


def test_lives_that_cannot_begin_or_babble_are_deaths_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker ends and takes its program along; when that is back it says something else once, then it serves."""
    monkeypatch.setattr("ranking.serving.workers.PAUSE_S", 0.01)
    program, said = tmp_path / "program", tmp_path / "said"

    def put(script: str) -> None:
        (tmp_path / "new").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "new").chmod(0o700)
        (tmp_path / "new").rename(program)

    async def run() -> Workers:
        put(f"echo '{{}}'; rm {program}; exit 3")
        workers = Workers([[str(program)], ["sh", "-c", SERVES % 1]], {"PATH": "/usr/bin:/bin"}, 1.0)
        one = workers.all[0]
        async with kept(workers) as until:
            await until(lambda: one.restarts >= 2)
            put(f"if test -e {said}; then {SERVES % 0}; fi; touch {said}; echo babble; exec sleep 600")
            await until(lambda: one.facts == {"worker": "0"})
        return workers

    workers = asyncio.run(run())
    assert said.exists() and workers.all[0].restarts >= 3 and workers.all[1].restarts == 0


def test_a_worker_that_hangs_is_killed_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It deafens itself to SIGTERM, answers, says once more that it lives, and then nothing."""
    monkeypatch.setattr("ranking.serving.workers.SILENT_S", 5.0)
    hangs = f"touch {tmp_path}/hung; trap '' TERM; echo '{{}}'; echo; exec sleep 600"
    first = f"if test -e {tmp_path}/hung; then {SERVES % 0}; fi; {hangs}"

    async def run() -> Workers:
        workers = shells(first, SERVES % 1)
        async with kept(workers) as until:
            await until(lambda: workers.all[0].facts == {"worker": "0"})
        return workers

    assert [one.restarts for one in asyncio.run(run()).all] == [1, 0]


def test_a_parent_that_stood_still_does_not_take_its_workers_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped for longer than a worker may be silent: what was said meanwhile lies in the pipe."""
    monkeypatch.setattr("ranking.serving.workers.SILENT_S", 5.0)

    async def run() -> Workers:
        workers = shells(SERVES % 0)
        async with kept(workers) as until:
            await until(lambda: bool(workers.all[0].facts))
            time.sleep(7.0)
            await asyncio.sleep(3.0)
        return workers

    assert asyncio.run(run()).all[0].restarts == 0


def test_to_look_is_told_to_a_worker_once_it_can_hear_it(tmp_path: Path) -> None:
    heard = [tmp_path / f"heard{place}" for place in range(2)]
    scripts = [f"trap 'touch {heard[place]}' HUP; {SERVES % place}" for place in range(2)]
    loads = f"until test -e {tmp_path}/go; do sleep .05; done"

    async def run() -> None:
        workers = shells(f"{loads}; {scripts[0]}", scripts[1])
        async with kept(workers) as until:
            await until(lambda: bool(workers.all[0].process and workers.all[1].facts))
            workers.look()
            await until(heard[1].exists)
            (tmp_path / "go").touch()
            await until(heard[0].exists)
            heard[0].unlink()
            workers.look()
            await until(heard[0].exists)
            assert [one.restarts for one in workers.all] == [0, 0]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sh", "-c", "exit 2"], r"\(status 2\)"),
        (["sh", "-c", "echo babble; exec sleep 600"], "something else than that it answers"),
        (["sh", "-c", "echo 7; exec sleep 600"], "no JSON object"),
        (["/nowhere/brewline"], "could not be started"),
    ],
)
def test_a_worker_that_cannot_begin_ends_all(command: list[str], said: str) -> None:
    async def run(workers: Workers) -> None:
        await workers.run(print, asyncio.Event())

    workers = Workers([command, ["sh", "-c", SERVES % 1]], {"PATH": "/usr/bin:/bin"}, 1.0)
    with pytest.raises(WorkerFailed, match=rf"worker 0 ended .*{said}"):
        asyncio.run(run(workers))
    assert all(one.process is None or one.process.returncode is not None for one in workers.all)


def test_an_announcement_that_fails_ends_all() -> None:
    def broken(_: Facts) -> None:
        raise BrokenPipeError("nobody reads it")

    async def run(workers: Workers) -> None:
        await asyncio.wait_for(workers.run(broken, asyncio.Event()), WAIT_S)

    workers = shells(SERVES % 0, SERVES % 1)
    with pytest.raises(BrokenPipeError):
        asyncio.run(run(workers))
    assert all(one.process is not None and one.process.returncode is not None for one in workers.all)


def test_nobody_else_gets_the_port_while_no_worker_listens() -> None:
    with bound("127.0.0.1", 0, shared=True) as held:
        port = held.getsockname()[1]
        with pytest.raises((CannotListen, OSError)), bound("127.0.0.1", port) as other:
            other.listen()
        with bound("127.0.0.1", port, shared=True) as one, bound("127.0.0.1", port, shared=True) as another:
            one.listen()
            another.listen()


def test_cores_are_divided_unless_somebody_said_how() -> None:
    assert share_of_cores(10_000, {})["OMP_NUM_THREADS"] == "1"
    assert int(share_of_cores(1, {})["OMP_NUM_THREADS"]) >= 1
    for given in ("9", "4,2"):
        assert share_of_cores(2, {"OMP_NUM_THREADS": given}) == {"OMP_NUM_THREADS": given}
    assert share_of_cores(10_000, {"OMP_NUM_THREADS": " "}) == {"OMP_NUM_THREADS": "1"}
    assert _first_number("4,2") == 4
    for wrong in ("many", "0", ",2"):
        with pytest.raises(CannotShare, match="OMP_NUM_THREADS"):
            _first_number(wrong)


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


def test_modules_come_from_the_current_folder_only_where_the_parents_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = [one for one in sys.path if one]
    for first, safe in (([], True), ([str(Path.cwd())], False), ([""], False)):
        monkeypatch.setattr(sys, "path", [*first, *elsewhere])
        assert (command_of(context_of(), 0)[1] == "-P") is safe


def test_a_store_in_memory_is_refused() -> None:
    with pytest.raises(CannotShare, match="each process's own"):
        serve_workers(context_of("--members", "sqlite::memory:"))
