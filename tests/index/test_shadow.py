"""The recall of what is served, seen off the request's path: it is numpy's, it drops rather than waits."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from index.exact import exact_search, overlap
from index.filters import RowSet
from index.live import LiveIndex
from index.search import Searcher
from index.shadow import Seen, Shadow, ShadowError


def test_the_recall_of_an_approximate_index_is_seen(make_snapshot, store, unit) -> None:
    vectors, queries = unit(2_000, 8), unit(12, 8, 9)
    snapshot, shadow = make_snapshot(vectors=vectors, recipe="IVF32,Flat"), Shadow(1.0)
    with LiveIndex(snapshot, store, write=True, shadow=shadow) as live:
        live.withdraw([f"item-{row}" for row in range(100)])
        live.upsert(["new", "newer"], [b"", b""], unit(2, 8, 5), "encoder-one")
        view = live.view()
        searcher = view.searcher
        assert isinstance(searcher, Searcher)
        searcher.nprobe = 2
        allow, excluded = RowSet.where(np.arange(2_000) % 5 > 0), [np.array([201, 2_001])]
        recalls = []
        everything = np.concatenate([vectors, unit(2, 8, 5)])
        left_out = [np.union1d(np.union1d(np.arange(100), np.arange(0, 2_000, 5)), excluded[0])]
        for query in queries:
            hits = view.search(query[None], 300, excluded, allow=allow, allow_live=RowSet.every(2))
            truth = exact_search(everything, query[None], 300, left_out)
            recalls.append(float(overlap(everything, query[None], hits, truth)[0]))
    shadow.drain()
    seen = shadow.seen()
    assert seen == Seen(pytest.approx(np.mean(recalls)), 12, 0, 0) and 0.05 < np.mean(recalls) < 0.95
    shadow.close()


def test_an_exact_index_has_recall_one_and_a_batch_is_one_comparison(make_snapshot, store, unit) -> None:
    shadow = Shadow(1.0)
    with LiveIndex(make_snapshot(60), store, shadow=shadow) as live:
        live.view().search(unit(5, 8, 9), 20)
        live.view().search(unit(2, 8, 9), 90, [np.arange(60)] * 2)
    shadow.drain()
    shadow.close()
    assert shadow.seen() == Seen(1.0, 2, 0, 0)


def test_a_request_never_waits_and_failures_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    shadow, go = Shadow(1.0, waiting=2), threading.Event()

    def broken() -> float:
        raise OSError("the disk is gone")

    def slow() -> float:
        go.wait()
        return 0.5

    shadow.offer(slow)
    for _ in range(50):
        shadow.offer(broken)
    go.set()
    shadow.drain()
    shadow.close()
    seen = shadow.seen()
    assert seen.recall == 0.5 and seen.compared == 1 and 1 <= seen.failed <= 3 and seen.failed + seen.dropped == 50
    assert "the disk is gone" in caplog.text


def test_closing_drops_what_waits_and_ends_with_the_comparison_under_way() -> None:
    shadow, begun, go = Shadow(1.0), threading.Event(), threading.Event()

    def slow() -> float:
        begun.set()
        go.wait()
        return 0.5

    shadow.offer(slow)
    assert begun.wait(20)
    for _ in range(5):
        shadow.offer(lambda: 1.0)
    closing = threading.Thread(target=shadow.close)
    closing.start()
    while shadow.seen().dropped < 5:
        closing.join(0.01)
        assert closing.is_alive()
    go.set()
    closing.join(20)
    shadow.close()
    assert not closing.is_alive() and shadow.seen() == Seen(0.5, 1, 5, 0)


def test_the_share_and_the_window() -> None:
    assert [Shadow(0.0).pick(3), Shadow(1.0).pick(0)] == [None, None]
    shadow = Shadow(0.1, window=2)
    assert 60 < sum(shadow.pick(1) is not None for _ in range(1_000)) < 140
    assert {Shadow(1.0, seed=seed).pick(3) for seed in range(30)} == {0, 1, 2}
    for recall in (0.0, 1.0, 0.5):
        shadow.offer(lambda recall=recall: recall)
        shadow.drain()
    assert shadow.seen().recall == 0.75
    shadow.close()
    Shadow(0.5).close()
    with pytest.raises(ShadowError, match="0 to 1"):
        Shadow(1.01)
