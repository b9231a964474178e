"""kill -9 at any moment, while changes are written and nights fold them in: what was acknowledged is there, whole, after it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from index.live import LiveIndex
from index.publish import current
from index.snapshot import Snapshot

ROOT = Path(__file__).parents[2]
TURN = """
import sys, time
from pathlib import Path

import faiss, numpy as np

import index.wal_writer
from index.build import build_index
from index.recipe import Recipe
from index.changes import Folded, fold
from index.live import LIVE_DIR, LiveIndex, folded_position, trim_folded
from index.publish import collect_garbage, current, publish
from index.snapshot import Snapshot
from index.writer import SnapshotWriter

index.wal_writer.SEGMENT_BYTES = 2_000
store, turn, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
DIMS = 8

def unit(number):
    vector = np.random.default_rng(number).standard_normal((1, DIMS)).astype(np.float32)
    return vector / np.linalg.norm(vector)

def night(base):
    before = folded_position(base.manifest, base.name) if base else 0
    folded = fold(store / LIVE_DIR, before)
    items = {} if base is None else {one: base.vectors[row] for row, one in enumerate(base.ids)}
    for one in folded.withdrawn:
        items.pop(one, None)
    items.update({one: put.vector for one, put in folded.upserts.items()})
    vectors = np.stack(list(items.values())) if items else unit(0)
    with SnapshotWriter(store, fingerprint="e", as_of=folded.position, extra={"live_position": str(folded.position)}) as writer:
        writer.vectors(vectors)
        writer.ids(list(items) or ["seed"])
        writer.index(build_index(vectors, Recipe(), 0), recipe="Flat")
    publish(store, writer.name)
    collect_garbage(store, keep=0)
    trim_folded(store)
    return Snapshot.open(writer.path)

path = current(store)
snapshot = night(None) if path is None else Snapshot.open(path)
with LiveIndex(snapshot, store, write=True) as live:
    print("ready", flush=True)
    for step in range(100_000):
        name = f"{turn}-{step}"
        time.sleep(pause)
        live.upsert([f"{name}-left", f"{name}-right"], [b"l", b"r"], np.repeat(unit(step), 2, axis=0), "e")
        print("put", name, flush=True)
        if step % 5 == 4:
            live.withdraw([f"{turn}-{step - 2}-left", f"{turn}-{step - 2}-right"])
            print("gone", f"{turn}-{step - 2}", flush=True)
        if step % 12 == 11:
            live.move_to(night(live.view().snapshot))
            print("night", live.view().position, flush=True)
"""


def run_and_kill(store: Path, turn: int, seconds: float) -> list[list[str]]:
    """What the process acknowledged before it was killed, this many seconds after it was ready."""
    command = [sys.executable, "-c", TURN, str(store), str(turn), "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        assert first == "ready\n", process.stderr.read()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        told, trouble = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not trouble
    return [line.split() for line in told.splitlines() if line.count(" ") == 1]


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.soak)])
def test_no_kill_loses_what_was_acknowledged(tmp_path: Path, kills: int) -> None:
    store = tmp_path / "store"
    rng = random.Random(11)
    kept: set[str] = set()
    gone: set[str] = set()
    nights = 0
    for turn in range(kills):
        for what, name in run_and_kill(store, turn, rng.uniform(0.0, 0.6)):
            nights += what == "night"
            if what == "put":
                kept.add(name)
            if what == "gone":
                gone.add(name)
        path = current(store)
        assert path is not None
        with LiveIndex(Snapshot.open(path), store) as live:
            view = live.view()
            hits = view.search(view.vector(0)[None], view.count)
            held = view.ids(hits.rows[0, : hits.counts[0]])
            lefts, rights = ({one.removesuffix(side) for one in held if one.endswith(side)} for side in ("-left", "-right"))
            assert lefts == rights, "half a batch"
            unsaid = {f"{turn}-{int(name.split('-')[1]) - 2}" for name in kept if name.startswith(f"{turn}-")}
            assert kept - gone - unsaid <= lefts and not gone & lefts
            assert len(held) == len(set(held)) and np.isfinite(hits.scores[0, : hits.counts[0]]).all()
            kept = lefts
    assert kept and nights


def test_another_process_finds_it_within_a_second(tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-c", TURN, str(store), "0", "0.5"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        path = current(store)
        assert path is not None
        with LiveIndex(Snapshot.open(path), store) as follower:
            name = process.stdout.readline().split()[1]
            acknowledged = time.monotonic()
            while follower.view().rows([f"{name}-left"])[0] < 0:
                time.sleep(0.01)
            assert time.monotonic() - acknowledged < 1.0
        process.kill()
