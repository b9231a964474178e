"""Planted faults: each is stopped by its own gate, nothing is published, no flipped byte goes unseen, no change is skipped."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import index.wal_writer
from index.check import GateFailed, GateSettings, require_gates, run_gates
from index.live import LIVE_DIR, LiveIndex
from index.live_view import LiveTable
from index.manifest import SnapshotTorn
from index.publish import current, publish
from index.snapshot import RUN_FILE, Snapshot
from index.wal import LogBroken, LogDamaged, segments

SETTINGS = GateSettings(recall_k=10)


def flip(path: Path, rng: random.Random) -> Callable[[], int]:
    """One byte of the file is another one; the call that is returned puts it back."""
    content = path.read_bytes()
    place = rng.randrange(len(content))
    path.write_bytes(content[:place] + bytes([content[place] ^ rng.randrange(1, 256)]) + content[place + 1 :])
    return partial(path.write_bytes, content)


def with_vectors(change: Callable[[np.ndarray], object], *, indexed: bool = False) -> Callable[..., Snapshot]:
    """Writes a snapshot whose vectors are changed; its index holds them too, or (`indexed`) the right ones."""

    def plant(make_snapshot, unit) -> Snapshot:
        right = unit(200, 8)
        wrong = right.copy()
        change(wrong)
        return make_snapshot(vectors=wrong, indexed=right if indexed else None)

    return plant


def with_files(change: Callable[[Path], object]) -> Callable[..., Snapshot]:
    """Writes a good snapshot and does something to its folder."""

    def plant(make_snapshot, _unit) -> Snapshot:
        snapshot = make_snapshot(200)
        change(snapshot.path)
        return snapshot

    return plant


def put(vectors: np.ndarray, row: int, value: object) -> None:
    vectors[row] = value


def slow(make_snapshot, _unit) -> Snapshot:
    snapshot = make_snapshot(400, recipe="IVF16,Flat")
    snapshot.manifest.build["nprobe"] = 1
    return snapshot


ROLLED = np.random.default_rng(0).permutation(200)
FAULTS: dict[str, tuple[str, Callable[..., Snapshot]]] = {
    "half of the items are gone": ("count", lambda make, unit: make(vectors=unit(99, 8))),
    "three times the items": ("count", lambda make, unit: make(vectors=unit(601, 8))),
    "no items at all": ("count", lambda make, _: make(vectors=np.zeros((0, 8), np.float32))),
    "a vector holds NaN": ("finite", with_vectors(lambda vectors: put(vectors, 5, np.nan), indexed=True)),
    "a vector holds infinity": ("finite", with_vectors(lambda vectors: put(vectors, 5, np.inf), indexed=True)),
    "a vector was never filled": ("norms", with_vectors(lambda vectors: put(vectors, 5, 0.0))),
    "vectors were not normalised": ("norms", with_vectors(lambda vectors: vectors.__imul__(3.0))),
    "two rows have one id": ("ids", lambda make, unit: make(vectors=unit(200, 8), ids=["twice", *map(str, range(198)), "twice"])),
    "the index is of another night": ("self-retrieval", lambda make, unit: make(vectors=unit(200, 8), indexed=unit(200, 8, 1))),
    "the index has the rows in another order": (
        "self-retrieval",
        lambda make, unit: make(vectors=unit(200, 8), indexed=unit(200, 8)[ROLLED]),
    ),
    "too few lists are visited": ("recall", slow),
    "a file was cut short": ("checksums", with_files(lambda path: os.truncate(path / "index.faiss", 10))),
    "a file is missing": ("checksums", with_files(lambda path: (path / "catalog.arrow").unlink())),
    "one bit of the vectors flipped": ("checksums", with_files(lambda path: flip(path / "vectors.npy", random.Random(1)))),
    "one bit of the words flipped": ("checksums", with_files(lambda path: flip(path / "catalog.arrow", random.Random(2)))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_stopped_by_its_gate(make_snapshot, unit, store: Path, fault: str) -> None:
    gate, plant = FAULTS[fault]
    yesterday = make_snapshot(200, seed=9, as_of=1_699_900_000)
    require_gates(run_gates(make_snapshot(200, seed=8), yesterday, SETTINGS))
    publish(store, yesterday.name)
    results = run_gates(plant(make_snapshot, unit), yesterday, SETTINGS)
    assert gate in [one.name for one in results if not one.passed]
    with pytest.raises(GateFailed, match=gate):
        require_gates(results)
    assert current(store) == yesterday.path


@pytest.mark.parametrize("recipe", ["Flat", "IVF4,Flat"])
@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.soak)])
def test_flipped_bytes_are_seen_in_every_file(make_snapshot, recipe: str, count: int) -> None:
    """RUN.json alone is not vouched for: it holds times and durations, and nothing reads them but people."""
    path, rng = make_snapshot(300, recipe=recipe).path, random.Random(3)
    files = sorted(one for one in path.iterdir() if one.name != RUN_FILE)
    for _ in range(count):
        chosen = rng.choice(files)
        restore = flip(chosen, rng)
        with pytest.raises(SnapshotTorn, match=chosen.name):
            Snapshot.open(path).verify()
        restore()
    Snapshot.open(path)


def gone(live: LiveIndex, count: int) -> list[bool]:
    return [row < 0 for row in live.view().rows([f"item-{row}" for row in range(count)])]


def test_a_follower_that_met_damage_skips_nothing_when_it_is_mended(make_snapshot, store: Path, monkeypatch) -> None:
    monkeypatch.setattr("index.live.FOLLOW_S", 0.0)
    snapshot = make_snapshot()
    with LiveIndex(snapshot, store, write=True) as live, LiveIndex(snapshot, store) as follower:
        for row in range(3):
            live.withdraw([f"item-{row}"])
        path = segments(store / LIVE_DIR)[0][1]
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        for _ in range(2):
            with pytest.raises(LogDamaged):
                follower.view()
        path.write_bytes(content)
        assert gone(follower, 4) == [True, True, True, False] == gone(live, 4)


def test_nobody_who_waited_with_a_change_that_failed_is_told_that_it_was_taken(make_snapshot, store: Path, monkeypatch) -> None:
    snapshot = make_snapshot()
    told: list[object] = []
    frames = iter([MemoryError("no room")])

    def failing(position: int, payload: bytes, real=index.wal_writer.framed) -> bytes:
        for error in frames:
            raise error
        return real(position, payload)

    def change(live: LiveIndex, row: int) -> None:
        try:
            told.append(live.withdraw([f"item-{row}"]))
        except (MemoryError, LogBroken) as error:
            told.append(type(error))

    monkeypatch.setattr("index.wal_writer.framed", failing)
    with LiveIndex(snapshot, store, write=True) as live:
        threads = [threading.Thread(target=change, args=(live, row)) for row in range(3)]
        with live._lock:
            for thread in threads:
                thread.start()
            while live._queued < 3:
                threads[0].join(0.01)
        for thread in threads:
            thread.join()
        change(live, 3)
        assert told.count(MemoryError) == 1 and told.count(LogBroken) == 3 and not any(gone(live, 4))
    with LiveIndex(snapshot, store, write=True) as live:
        assert live.withdraw(["item-1"]) == 1 and gone(live, 4) == [False, True, False, False]


def test_a_change_on_the_disk_that_did_not_reach_the_table_is_the_last(make_snapshot, store: Path, monkeypatch) -> None:
    """A later change would show a moment without it."""
    snapshot = make_snapshot()

    def full(_table: LiveTable, _batches: object) -> None:
        raise MemoryError("no room")

    with LiveIndex(snapshot, store, write=True) as live:
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(LiveTable, "take", full)
            live.withdraw(["item-0"])
        with pytest.raises(LogBroken, match="open it anew"):
            live.withdraw(["item-1"])
    with LiveIndex(snapshot, store) as live:
        assert gone(live, 2) == [True, False]


def test_a_store_that_cannot_be_written_says_so(make_snapshot, store: Path) -> None:
    snapshot = make_snapshot()
    (store / "LOCK").unlink()
    (store / "LOCK").symlink_to(store / "nowhere" / "LOCK")
    with pytest.raises(LogBroken, match="cannot be written"):
        LiveIndex(snapshot, store, write=True)


def test_no_position_means_two_changes_when_a_log_is_begun_anew_after_a_rollback(make_snapshot, store: Path) -> None:
    old, new = make_snapshot(), make_snapshot(seed=1, extra={"live_position": "3"})
    with LiveIndex(new, store, write=True) as live:
        assert live.withdraw(["item-9"]) == 4
    shutil.move(store / LIVE_DIR, store / "damaged")
    with LiveIndex(old, store, write=True) as live:
        assert [live.withdraw([f"item-{row}"]) for row in range(5)] == [4, 5, 6, 7, 8]
    for snapshot in (old, new):
        for write in (True, False):
            with LiveIndex(snapshot, store, write=write) as live:
                assert all(gone(live, 5)) and live.view().position == 8
