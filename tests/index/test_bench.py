from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from index.bench import Missing, Ready, Setting, Wishes, made_items, made_queries, measure
from index.bench_peers import METHODS, MethodError, methods_named
from index.exact import exact_search
from index.hits import Vectors


def test_the_generator_is_the_law_that_was_published() -> None:
    items, near, far = made_items(5_000, 16), made_queries(50, 16, 0), made_queries(50, 16, 1)
    assert (items == made_items(5_000, 16)).all() and np.allclose(np.linalg.norm(items, axis=1), 1, atol=1e-5)
    offset = far - near
    assert np.allclose(offset, offset[0], atol=1e-6) and np.linalg.norm(offset[0]) == pytest.approx(1, abs=1e-5)
    assert not np.isin(near[:, 0], items[:, 0]).any()


def test_recall_is_measured_and_half_an_answer_has_half() -> None:
    items, queries = made_items(2_000, 8), made_queries(8, 8, 0)

    def method(vectors: Vectors) -> Iterator[Ready | Missing]:
        def whole(asked: Vectors, k: int) -> np.ndarray:
            return exact_search(vectors, asked, k).rows

        def half(asked: Vectors, k: int) -> np.ndarray:
            return np.where(np.arange(k) % 2 == 0, whole(asked, k), -1)

        yield Ready("mine", 1.5, [Setting("whole", whole, 10), Setting("half", half, 5)])
        yield Missing("other", "not here")

    rows = list(measure(items, queries, [method], Wishes(k=40, batch=3, judged=8, seconds=0), lambda *_: None))
    assert [(row.method, row.setting) for row in rows] == [("mine", "whole"), ("mine", "half"), ("other", "absent")]
    assert rows[0].recall_mean == 1 and rows[1].recall_mean == 0.5 and rows[1].recall_p5 == 0.5
    assert rows[0].build_seconds == 1.5 and rows[1].bytes == 5 and rows[0].calls >= 3
    assert rows[0].p50_ms and rows[0].p99_ms and rows[0].p50_ms <= rows[0].p99_ms and rows[0].qps and rows[0].qps > 0
    assert rows[2].note == "not here" and rows[2].p50_ms is None


def test_ours_and_faiss_flat_find_everything() -> None:
    items, queries = made_items(3_000, 8), made_queries(6, 8, 1)
    rows = list(measure(items, queries, methods_named(["ours", "faiss-flat", "torch"]), Wishes(50, 2, 6, 0), lambda *_: None))
    full = {row.setting: row.recall_mean for row in rows if "lists" not in row.setting}
    assert len(full) == 3 and set(full.values()) == {1.0}
    assert all(row.recall_mean and row.recall_mean > 0.5 for row in rows)


def test_an_absent_library_has_a_row() -> None:
    rows = list(measure(made_items(200, 4), made_queries(2, 4, 0), methods_named(["scann"]), Wishes(5, 1, 2, 0), lambda *_: None))
    assert rows and (rows[0].note == "scann is not installed" or rows[0].recall_mean is not None)


@pytest.mark.parametrize("names", [[], ["ours", "magic"]])
def test_unknown_methods_are_refused(names: list[str]) -> None:
    with pytest.raises(MethodError, match="ours, faiss"):
        methods_named(names)
    assert "ours" in METHODS
