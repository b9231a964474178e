"""Several tasks in one score: the formula, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from ranking.tasks import Task, TaskError
from ranking.tasks_weighted import MOST_TASKS, WeightsError, final_score, weights_of

TASKS = {name: Task(name, "", "") for name in ("like", "share", "hide", *map(str, range(9)))}
HALF = np.array([0.5, 0.25, 1.0], np.float32)


def test_the_final_score_is_the_published_formula() -> None:
    columns = {"like": HALF, "share": np.array([0.1, 0.9, 0.0], np.float32), "hide": np.array([0.0, 1.0, 1.0], np.float32)}
    weights = {"like": 1.0, "share": 2.0, "hide": -3.0}
    wanted = (columns["like"] + 2 * columns["share"] - 3 * columns["hide"]) / 6
    np.testing.assert_allclose(final_score(columns, weights), wanted, atol=1e-7)
    np.testing.assert_array_equal(final_score({"like": HALF}, {"like": 7.0}), HALF)
    np.testing.assert_array_equal(final_score({"like": HALF}, {"like": -0.1}), -HALF)
    np.testing.assert_allclose(final_score(columns, {name: 5e307 * value for name, value in weights.items()}), wanted, atol=1e-7)


@pytest.mark.parametrize(
    ("pairs", "task", "says"),
    [
        ([("like", 1.0)], "share", "ask for one task"),
        ([("like", 0.0)], "", r"weights\[0\].weight: 0.0"),
        ([("like", 1.0), ("share", float("nan"))], "", r"weights\[1\].weight: nan"),
        ([("like", float("inf"))], "", "finite"),
        ([("like", 1.0), ("like", 2.0)], "", "given twice"),
        ([("", 1.0)], "", "is empty"),
        ([(str(number), 1.0) for number in range(MOST_TASKS + 1)], "", "at most 8"),
        ([("fly", 1.0)], "", '"fly" is unknown'),
    ],
)
def test_weights_that_make_no_score_are_refused(pairs: list[tuple[str, float]], task: str, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        weights_of(pairs, TASKS, task)


def test_weights_keep_their_order() -> None:
    assert list(weights_of([("share", 1), ("like", -2.5)], TASKS).items()) == [("share", 1), ("like", -2.5)]
    assert weights_of([], TASKS, "like") == {} and issubclass(WeightsError, TaskError)
