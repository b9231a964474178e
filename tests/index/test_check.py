from __future__ import annotations

import os

import numpy as np
import pytest

from index.check import GateFailed, GateSettings, require_gates, run_gates

SETTINGS = GateSettings(recall_k=10)


def failed(results) -> list[str]:
    return [one.name for one in results if not one.passed]


def test_a_good_snapshot_passes_every_gate(make_snapshot, unit) -> None:
    today, yesterday = make_snapshot(400, recipe="IVF4,Flat"), make_snapshot(390, seed=1)
    results = run_gates(today, yesterday, SETTINGS, queries=unit(20, 8, 9))
    require_gates(results)
    assert [one.name for one in results] == ["checksums", "count", "finite", "norms", "ids", "self-retrieval", "recall"]
    assert "members" in results[-1].seen and "390" in results[1].expected
    require_gates(run_gates(today, None))


@pytest.mark.parametrize(("count", "fine"), [(19, False), (20, True), (80, True), (81, False)])
def test_the_count_stays_near_yesterdays(make_snapshot, count: int, fine: bool) -> None:
    results = run_gates(make_snapshot(count), make_snapshot(40, seed=1), SETTINGS)
    assert failed(results) == ([] if fine else ["count"])


def test_an_empty_snapshot_never_passes(make_snapshot) -> None:
    empty = make_snapshot(vectors=np.zeros((0, 8), np.float32))
    for previous in (None, make_snapshot()):
        assert "count" in failed(run_gates(empty, previous, SETTINGS))


def test_norms_nan_and_duplicates_are_seen(make_snapshot, unit) -> None:
    vectors = unit(40, 8)
    assert failed(run_gates(make_snapshot(vectors=vectors * 1.01), None, SETTINGS)) == ["norms"]
    twice = run_gates(make_snapshot(vectors=vectors, ids=["a", "b"] * 20), None, SETTINGS)
    assert failed(twice) == ["ids"] and "'a', 'b'" in twice[4].seen
    broken = vectors.copy()
    broken[5, 2] = np.nan
    results = run_gates(make_snapshot(vectors=broken, indexed=vectors), None, SETTINGS)
    assert failed(results) == ["finite", "self-retrieval", "recall"]
    with pytest.raises(GateFailed, match=r"3 of 7 gates.*1 vectors with NaN.*not run"):
        require_gates(results)


def test_an_index_over_other_vectors_is_found(make_snapshot, unit) -> None:
    results = run_gates(make_snapshot(vectors=unit(200, 8), indexed=unit(200, 8, 1)), None, SETTINGS)
    assert failed(results) == ["self-retrieval", "recall"]


def test_equal_vectors_may_stand_for_each_other(make_snapshot, unit) -> None:
    require_gates(run_gates(make_snapshot(vectors=np.repeat(unit(10, 8), 4, axis=0)), None, SETTINGS))


def test_a_recall_below_the_bar_fails(make_snapshot) -> None:
    snapshot = make_snapshot(400, recipe="IVF16,Flat")
    snapshot.manifest.build["nprobe"] = 1  # type: ignore[index]
    assert failed(run_gates(snapshot, None, SETTINGS)) == ["recall"]


def test_a_torn_file_stops_the_later_gates(make_snapshot) -> None:
    snapshot = make_snapshot()
    os.truncate(snapshot.path / "index.faiss", 10)
    results = run_gates(snapshot, None, SETTINGS)
    assert failed(results) == ["checksums", "finite", "norms", "ids", "self-retrieval", "recall"]
    with pytest.raises(GateFailed, match=r"index\.faiss has 10 bytes"):
        require_gates(results)
