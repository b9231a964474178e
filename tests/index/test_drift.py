"""What yesterday answered and tonight answers too, by ids, and the gate that an operator may put on it."""

from __future__ import annotations

import numpy as np
import pytest

from index.drift import Drift, drift, drift_gate


def test_the_overlap_is_that_of_the_ids(make_snapshot, unit) -> None:
    vectors, queries = unit(50, 8), unit(4, 8, 9)
    ids = [f"item-{row}" for row in range(50)]
    before = make_snapshot(vectors=vectors)
    turned = np.random.default_rng(0).permutation(50)
    same = make_snapshot(vectors=vectors[turned], ids=[ids[row] for row in turned])
    assert drift(before, same, queries, 10) == Drift(10, 1.0, 1.0, 4)
    assert drift(before, same, queries) == Drift(50, 1.0, 1.0, 4), "no deeper than either has items"
    half = make_snapshot(vectors=vectors[:25], ids=ids[:25])
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    seen = drift(before, half, queries, 10)
    kept = (best < 25).mean(axis=1)
    assert seen is not None and seen.mean == pytest.approx(kept.mean()) and seen.p5 == pytest.approx(np.quantile(kept, 0.05))
    strangers = make_snapshot(vectors=vectors, ids=[f"other-{row}" for row in range(50)])
    assert drift(before, strangers, queries, 10) == Drift(10, 0.0, 0.0, 4)


def test_what_cannot_be_compared_is_not(make_snapshot, unit) -> None:
    one, queries = make_snapshot(30), unit(2, 8)
    other = make_snapshot(30, fingerprint="encoder-two")
    for before, asked in ((None, queries), (other, queries), (one, None), (one, queries[:0])):
        assert drift(before, one, asked) is None


def test_the_gate_is_off_unless_asked_for() -> None:
    seen = Drift(10, 0.4, 0.1, 3)
    assert drift_gate(None, 0.5) == drift_gate(seen, 0) == []
    assert [gate.passed for least in (0.4, 0.41) for gate in drift_gate(seen, least)] == [True, False]
