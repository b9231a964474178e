"""Several ranked lists become one by the places in them: reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

A row's score is the sum over the lists that hold it of weight / (constant + place), places counted from 1. Places alone count,
so lists whose scores have nothing in common (a cosine, a sum of word weights, a number of clicks) need no calibration.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from index.hits import Rows, SearchError, Vectors, check_k

NOWHERE = int(np.iinfo(np.int64).max)


def fuse(lists: Sequence[Rows], weights: Sequence[float], constant: float, k: int) -> tuple[Rows, Vectors]:
    """The best k rows of all lists and their scores float32 are returned, best first; fewer only if the lists hold fewer.

    Each list holds rows int64, best first and each once. Rows of equal score come in the order of the first list, those that it
    does not hold after them, by row. Raises SearchError for a weight or constant that is no number above 0.
    """
    k = check_k(k)
    if len(lists) != len(weights) or not all(0 < number < np.inf for number in (*weights, constant)):
        raise SearchError(
            f"{len(lists)} lists cannot be merged with weights {list(weights)} and constant {constant}: "
            "expected one weight above 0 for each and a constant above 0"
        )
    rows, which = np.unique(np.concatenate([np.zeros(0, np.int64), *lists]), return_inverse=True)
    scores, first = np.zeros(len(rows)), np.full(len(rows), NOWHERE)
    start = 0
    for number, (listed, weight) in enumerate(zip(lists, weights)):
        here = which[start : start + len(listed)]
        place = np.arange(1, len(listed) + 1)
        scores[here] += weight / (constant + place)
        if number == 0:
            first[here] = place
        start += len(listed)
    # Compared as the float32 that is handed out: otherwise rows of equal score would stand in an order nobody can see.
    answered = scores.astype(np.float32)
    best = np.lexsort((rows, first, -answered))[:k]
    return rows[best], answered[best]
