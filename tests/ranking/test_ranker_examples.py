"""The ranker's training groups know nothing that happened at or after their end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ranking.learn.examples import GroupSettings, pools_of
from ranking.tasks import tasks_of
from retrieval.data.schema import Dataset


def engagements_only(dataset: Dataset) -> Dataset:
    events = dataset.engagements
    return replace(dataset, events=replace(events, label=np.full(len(events), -1, np.int8)))


@pytest.mark.parametrize("make", [lambda dataset: dataset, engagements_only], ids=["impressions", "engagements only"])
def test_cutting_the_log_at_the_end_changes_no_group(make, tiny_dataset: Dataset) -> None:  # type: ignore[no-untyped-def]
    dataset: Dataset = make(tiny_dataset)
    until, tasks = dataset.meta.cut_valid + 40_000, tasks_of(dataset)
    cut = replace(dataset, events=dataset.events.before(until))
    whole = pools_of(dataset, tasks, None, until, GroupSettings(), seed=1)
    known_then = pools_of(cut, tasks, None, until, GroupSettings(), seed=1)
    assert whole and whole.keys() == known_then.keys()
    for name, pool in whole.items():
        for column in ("member", "moment", "start", "item", "day", "event", "label"):
            np.testing.assert_array_equal(getattr(pool, column), getattr(known_then[name], column), err_msg=f"{name} {column}")
