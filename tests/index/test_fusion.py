"""Lists merged by places: the published sum, defined ties, everything that any list holds."""

from __future__ import annotations

import numpy as np
import pytest

from index.fusion import fuse
from index.hits import SearchError


def rows(*listed: int) -> np.ndarray:
    return np.array(listed, np.int64)


def test_the_score_is_the_sum_of_reciprocal_places() -> None:
    found, scores = fuse([rows(7, 3, 5), rows(5, 9), rows(3)], (1, 0.5, 0.25), 60, 10)
    expected = {7: 1 / 61, 3: 1 / 62 + 0.25 / 61, 5: 1 / 63 + 0.5 / 61, 9: 0.5 / 62}
    assert found.tolist() == sorted(expected, key=lambda row: -expected[row])
    np.testing.assert_allclose(scores, sorted(expected.values(), reverse=True), rtol=1e-6)
    assert scores.dtype == np.float32


def test_equal_scores_keep_the_first_list_then_rows() -> None:
    found, scores = fuse([rows(8, 6), rows(9, 2), rows(1, 6)], (1, 1, 1), 1, 10)
    assert found.tolist() == [6, 8, 1, 9, 2], "6 twice second; 8 leads the first list; 1 and 9 by row"
    assert scores[1] == scores[2] == scores[3]


def test_the_head_of_a_long_answer_is_the_short_one() -> None:
    rng = np.random.default_rng(0)
    lists = [rng.permutation(200)[:80] for _ in range(3)]
    everything, _ = fuse(lists, (1, 0.5, 0.5), 60, 1_000)
    assert sorted(everything.tolist()) == sorted(set(np.concatenate(lists).tolist()))
    assert fuse(lists, (1, 0.5, 0.5), 60, 7)[0].tolist() == everything[:7].tolist()


def test_empty_lists_add_nothing() -> None:
    assert fuse([rows(4, 2), rows()], (1, 1), 60, 5)[0].tolist() == [4, 2]
    assert fuse([rows(), rows()], (1, 1), 60, 5)[0].tolist() == []


@pytest.mark.parametrize(("weights", "constant"), [((1, 0), 60), ((1,), 60), ((1, np.nan), 60), ((1, 1), -1), ((1, np.inf), 60)])
def test_weights_that_mean_nothing_are_refused(weights, constant) -> None:
    with pytest.raises(SearchError, match="weight above 0"):
        fuse([rows(1), rows(2)], weights, constant, 3)
