"""The day goes with the night: who writes the log, what it holds and what was taken out, from one stack to the next."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.durable import StoreBusy
from index.live import LIVE_DIR
from index.publish import current, publish, rollback
from index.wal import LogDamaged, segments
from ranking.serving.client import Client
from ranking.serving.stack import Stack, load_stack, open_stack
from ranking.serving.swap_load import Loader, free, load_beside, same
from ranking.serving.swap_look import look
from retrieval.data.schema import Dataset, Item
from retrieval.encoder import Encoder
from retrieval.fingerprint import MissingPart
from retrieval.moments import end_of
from retrieval.refresh import nightly

ROOT = Path(__file__).parents[3]
SERVE = "import sys, typer; from ranking.cli.serve import serve; typer.run(serve)"
NEW = Item("new", "roses and compost", "a short piece about pruning", "gardens|chess", "author 9", 1_705_000_000, {"price": 4.0})


@pytest.fixture
def store(night: Path, copied: Path, tiny_dataset: Dataset) -> Path:
    """A store with a night of the first encoder, published, and a later one of the second."""
    first = current(copied)
    assert first is not None
    nightly(tiny_dataset, Encoder.load(night / "encoder2"), None, copied, end_of(tiny_dataset) + 3_600)
    publish(copied, first.name)
    return copied


@pytest.fixture
def opened(night: Path, store: Path, tmp_path: Path) -> Iterator[Callable[[], Stack]]:
    (tmp_path / "encoder").symlink_to(night / "encoder1")
    stacks: list[Stack] = []

    def one() -> Stack:
        stacks.append(open_stack(store, tmp_path / "encoder", None, None))
        return stacks[-1]

    yield one
    for stack in stacks:
        stack.today.close()


@pytest.fixture
def beside() -> Iterator[Callable[[Stack], Stack]]:
    """Opens what is there now beside a stack."""
    stacks: list[Stack] = []

    def one(before: Stack) -> Stack:
        stacks.append(load_stack(before.origin.source, before))
        return stacks[-1]

    yield one
    for stack in stacks:
        stack.today.close()


def to_the_second(night: Path, link: Path, store: Path) -> None:
    """The second encoder and its night are what is there now."""
    link.unlink()
    link.symlink_to(night / "encoder2")
    rollback(store)


def test_the_writer_stays_the_writer_and_the_one_before_follows(
    opened: Callable[[], Stack], beside: Callable[[Stack], Stack], store: Path
) -> None:
    before, other = opened(), opened()
    assert before.today.upsert([NEW, replace(NEW, item_id="gone")], 5) == 1
    after = beside(before)
    assert after.encoder is before.encoder and after.origin.connection is before.origin.connection
    before.today.withdraw(["gone", "i4"])
    after.today.take_over(before.today)
    moment, catalog = after.today.now()
    assert moment.rows(["gone", "i4"]).tolist() == [-1, -1] and catalog.item(int(moment.rows(["new"])[0])) == NEW
    with pytest.raises(StoreBusy):
        other.today.withdraw(["i1"])
    assert after.today.withdraw(["i2"])[0] == 3, "the new one writes"
    time.sleep(0.3)
    assert before.today.now()[0].rows(["i2", "gone", "new"]).tolist() == [-1, -1, 60], "and the old one sees what it writes"
    with pytest.raises(StoreBusy):
        before.today.withdraw(["i3"])
    after.today.close()
    assert other.today.withdraw(["i1"])[0] == 4
    assert [position for position, _ in segments(store / LIVE_DIR)] == [1]


def test_a_follower_that_is_exchanged_goes_back_in_time_for_nobody(
    opened: Callable[[], Stack], beside: Callable[[Stack], Stack]
) -> None:
    writer, before = opened(), opened()
    writer.today.withdraw(["i1"])
    after = beside(before)
    writer.today.withdraw(["i2"])
    after.today.take_over(before.today)
    assert after.today.now()[0].rows(["i1", "i2"]).tolist() == [-1, -1]
    assert writer.today.withdraw(["i3"])[0] == 3, "who wrote still writes"


def test_items_of_the_day_are_encoded_beside_and_are_there_under_the_new_encoder(
    opened: Callable[[], Stack], store: Path, night: Path, tmp_path: Path
) -> None:
    before = opened()
    before.today.upsert([NEW, replace(NEW, item_id="gone"), replace(NEW, item_id="i3")], 5)
    to_the_second(night, tmp_path / "encoder", store)
    thread = Loader()
    thread.start()
    after = thread.submit(lambda: load_beside(before)).result()
    before.today.withdraw(["gone"])
    before.today.upsert([replace(NEW, item_id="late")], 6)  # after those of before were encoded
    after.today.take_over(before.today)
    moment, catalog = after.today.now()
    rows = moment.rows(["new", "i3", "late", "gone"]).tolist()
    assert min(rows[:3]) >= 60 and rows[3] == -1 and not moment.stale and moment.items == 62
    for row in rows[:3]:
        numbers = {name: np.array([value]) for name, value in catalog.numbers(row).items()}
        np.testing.assert_allclose(moment.vector(row), after.encoder.items([catalog.item(row)], numbers)[0], atol=1e-6)
    held = [before]
    thread.submit(lambda: free(held)).result()
    thread.close()
    thread.join(20)
    assert not held and after.today.withdraw(["i1"])[1] == 1
    after.today.close()


def test_a_damaged_log_leaves_the_writer_where_it_was(
    opened: Callable[[], Stack], beside: Callable[[Stack], Stack], store: Path
) -> None:
    before = opened()
    before.today.withdraw(["i1"])
    after = beside(before)
    before.today.withdraw(["i2"])
    (_, path) = segments(store / LIVE_DIR)[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 0xFF]) + whole[-19:])
    with pytest.raises(LogDamaged):
        after.today.take_over(before.today)
    assert before.today.withdraw(["i3"])[0] == 3


def test_a_copy_of_the_encoder_is_no_other_encoder_and_half_a_copy_is_none(
    opened: Callable[[], Stack], beside: Callable[[Stack], Stack], night: Path, tmp_path: Path
) -> None:
    before = opened()
    copy = Path(shutil.copytree(night / "encoder1", tmp_path / "copy"))
    (tmp_path / "encoder").unlink()
    (tmp_path / "encoder").symlink_to(copy)
    assert look(before.origin.source) != before.origin.seen
    after = beside(before)
    assert same(after, before) and after.origin.encoder is before.origin.encoder
    assert look(after.origin.source) == after.origin.seen
    (copy / "model.safetensors").unlink()
    with pytest.raises(MissingPart, match=r"model\.safetensors is missing"):
        beside(after)


def test_a_signal_makes_a_server_look_that_does_not_look_by_itself(night: Path, store: Path, tmp_path: Path) -> None:
    link = tmp_path / "encoder"
    link.symlink_to(night / "encoder1")
    command = [
        sys.executable,
        "-c",
        SERVE,
        "--store",
        store,
        "--encoder",
        link,
        "--port",
        "0",
        "--json",
        "--swap-poll-seconds",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        with Client(f"127.0.0.1:{json.loads(server.stdout.readline())['port']}", deadline_ms=30_000) as client:
            first = client.info()
            to_the_second(night, link, store)
            time.sleep(0.3)
            assert client.retrieve("m6", 5).snapshot == first.snapshot, "nobody told it to look"
            server.send_signal(signal.SIGHUP)
            end = time.monotonic() + 30
            while client.info().snapshot == first.snapshot and time.monotonic() < end:
                time.sleep(0.02)
            path = current(store)
            second = client.retrieve("m6", 5)
            assert path is not None and second.snapshot == path.name != first.snapshot and second.encoder != first.encoder
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
