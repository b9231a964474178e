"""Planted faults: each is stopped by its own gate, nothing is published, and no flipped byte goes unseen."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from index.check import GateFailed, GateSettings, require_gates, run_gates
from index.manifest import SnapshotTorn
from index.publish import current, publish
from index.snapshot import RUN_FILE, Snapshot

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
