"""Several tasks in one final score: the sum of weight times probability, divided by the sum of the weights' absolute values.

Weights are a request's own and stand in its answer, so that whoever reads an order can compute it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ranking.tasks import Task, TaskError, task_named

MOST_TASKS = 8

Floats = npt.NDArray[np.float32]
Weights = Mapping[str, float]
"""Task -> what its probability counts in the final score; a weight below 0 counts against an item."""


class WeightsError(TaskError):
    """Weights of several tasks that make no final score."""


def weights_of(pairs: Sequence[tuple[str, float]], tasks: Mapping[str, Task], task: str = "") -> dict[str, float]:
    """The weights by task name, in the order given. Raises WeightsError, and TaskError for a task that nobody knows.

    `task` is the single one that was asked for: with weights there is none.
    """
    if pairs and task:
        raise WeightsError(f"weights: task {task[:80]!r} is named too; ask for one task, or for several with weights")
    if len(pairs) > MOST_TASKS:
        raise WeightsError(f"weights: {len(pairs)} tasks, at most {MOST_TASKS} are allowed: each costs what one task costs")
    found: dict[str, float] = {}
    for place, (name, weight) in enumerate(pairs):
        if not name:
            raise WeightsError(f"weights[{place}].task: is empty; name one of {', '.join(tasks)}")
        if not math.isfinite(weight) or weight == 0:
            raise WeightsError(f"weights[{place}].weight: {weight} of {name[:80]!r}; expected a finite number other than 0")
        if name in found:
            raise WeightsError(f"weights[{place}].task: {name[:80]!r} is given twice; give each task once")
        found[task_named(tasks, name).name] = weight
    return found


def final_score(columns: Mapping[str, Floats], weights: Weights) -> Floats:
    """The final score float32 [C], -1 to 1, of the probabilities [C] of each task."""
    # Divided first: weights near the largest float must not overflow in the sum.
    most = max(abs(weight) for weight in weights.values())
    shares = {name: weight / most for name, weight in weights.items()}
    total = sum(abs(share) for share in shares.values())
    return np.asarray(sum(columns[name].astype(np.float64) * (share / total) for name, share in shares.items()), np.float32)
