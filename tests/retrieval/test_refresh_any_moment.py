"""kill -9 at any moment of a night: the pointer names a whole snapshot, and the next night makes the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from index.publish import collect_garbage, current, list_snapshots
from index.snapshot import Snapshot
from retrieval.data.read import read_dataset
from retrieval.moments import end_of

ROOT = Path(__file__).parents[2]
NIGHTS = """
import os, sys
from pathlib import Path

import torch

import retrieval.load_members
import retrieval.refresh
from index.store import open_store
from retrieval.data.read import read_dataset
from retrieval.encoder import Encoder
from retrieval.members import MemberStore

class TitleLengths:
    fingerprint = "a" * 20
    def item_tokens(self, items, numbers):
        return [[len(item.title)] for item in items]

torch.set_num_threads(1)
retrieval.load_members.MEMBER_BATCH = 8
dataset, reader = read_dataset(Path(sys.argv[1])), Encoder.load(Path(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:
    store, as_of = line.split()
    child = os.fork()
    if child == 0:
        members = MemberStore(open_store(f"sqlite:{store}/members.sqlite"), reader.fingerprint)
        retrieval.refresh.nightly(dataset, reader, TitleLengths(), Path(store), int(as_of), members)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Loads the models once; each line of its input is a night in a process of its own, which can be killed."""


class Nights:
    """Nights in processes of their own, to be killed at any moment."""

    def __init__(self, data: Path, encoder: Path) -> None:
        command = [sys.executable, "-c", NIGHTS, str(data), str(encoder)]
        self._loaded = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._told() == "ready"

    def _told(self) -> str:
        assert self._loaded.stdout is not None
        return self._loaded.stdout.readline().strip()

    def run(self, store: Path, as_of: int, kill_after: float | None = None) -> int:
        """The exit status of one night, killed after so many seconds unless it has ended by then."""
        assert self._loaded.stdin is not None
        self._loaded.stdin.write(f"{store} {as_of}\n")
        self._loaded.stdin.flush()
        night = int(self._told())
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):
                os.kill(night, signal.SIGKILL)
        return int(self._told())

    def close(self) -> None:
        self._loaded.communicate(timeout=60)


def kill_and_resume(nights: Nights, before: Path, folder: Path, as_of: int, kills: int) -> None:
    """Kills nights at random moments, some twice over, and has the next one complete the work."""
    rng = random.Random(17)
    undisturbed = Path(shutil.copytree(before, folder / "undisturbed"))
    start = time.monotonic()
    assert nights.run(undisturbed, as_of) == 0
    length = time.monotonic() - start
    old, new = current(before), current(undisturbed)
    assert old is not None and new is not None and old.name != new.name
    killed = left = 0
    store = folder / "store"
    for turn in range(kills):
        if not store.exists():
            shutil.copytree(before, store)
        killed += nights.run(store, as_of, kill_after=rng.uniform(0, length)) == -signal.SIGKILL
        path = current(store)
        assert path is not None and path.name in (old.name, new.name)
        Snapshot.open(path).verify()
        assert not [info.problem for info in list_snapshots(store) if info.problem]
        left += len(list((store / "snapshots").iterdir())) > 1
        if turn % 3 == 2 or turn == kills - 1:
            assert nights.run(store, as_of) == 0
            path = current(store)
            assert path is not None and path.name == new.name, "another hash than that of the undisturbed night"
            assert Snapshot.open(path).manifest.files == Snapshot.open(new).manifest.files
            collect_garbage(store, keep=0)
            assert {one.name for one in (store / "snapshots").iterdir()} == {old.name, new.name}
            shutil.rmtree(store)
    assert killed >= 0.6 * kills and left, "killed too late, or never while it wrote"


@pytest.fixture(scope="module")
def nights(tiny_folder: Path, encoder_folders: tuple[Path, Path]) -> Iterator[Nights]:
    loaded = Nights(tiny_folder, encoder_folders[0])
    yield loaded
    loaded.close()


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.soak)])
def test_nights_killed_at_random_moments_are_completed_to_the_same_bytes(
    nights: Nights, tiny_folder: Path, tmp_path: Path, kills: int
) -> None:
    dataset = read_dataset(tiny_folder)
    before = tmp_path / "before"
    before.mkdir()
    assert nights.run(before, dataset.meta.cut_valid) == 0
    kill_and_resume(nights, before, tmp_path, end_of(dataset), kills)
