"""The ranker's training groups know nothing that happened at or after their end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ranking.learn.examples import SAMPLED, GroupSettings, pools_of, teaches
from ranking.learn.start import RankerPlan, start
from ranking.learn.train import train_ranker
from ranking.tasks import tasks_of
from retrieval.counts import appeared
from retrieval.data.schema import DAY, MISSING_TIME, Dataset
from retrieval.learn.sessions import with_sessions
from retrieval.llama import Size


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


def test_what_was_not_chosen_existed_by_that_day(tiny_dataset: Dataset) -> None:
    bare = replace(engagements_only(tiny_dataset), connections=None)
    unknown = np.arange(len(bare.items)) % 3 == 0
    created = np.where(unknown, MISSING_TIME, bare.items.created_at)
    bare = replace(bare, items=replace(bare.items, created_at=created))
    cut = int(bare.meta.cut_test) - 9 * DAY  # early enough that some items are still to come
    pool = pools_of(bare, tasks_of(bare), None, cut, GroupSettings(), 0)["engage"]
    drawn = pool.event == SAMPLED
    item, day = pool.item[drawn], pool.day[drawn]
    log = bare.events.before(cut)
    for row in np.unique(item).tolist():
        first = log.timestamp[log.item == row].min(initial=np.iinfo(np.int64).max)
        came = first if unknown[row] else min(first, int(created[row]))
        assert day[item == row].min() >= came // DAY
    late = np.flatnonzero(appeared(replace(bare, events=log)) // DAY > cut // DAY)
    assert len(late) and not np.isin(late, item).any()
    assert len(np.unique(item)) > 30


def test_a_catalogue_alone_has_all_of_its_items_on_every_made_up_day(tiny_dataset: Dataset) -> None:
    nothing = replace(tiny_dataset, events=tiny_dataset.events.take(np.zeros(0, np.int64)), connections=None)
    made, _ = with_sessions(nothing, 0)
    pool = pools_of(made, tasks_of(made), None, made.meta.cut_test, GroupSettings(), 0)["engage"]
    drawn = (pool.event == SAMPLED) & (pool.day == pool.day.min())
    assert len(np.unique(pool.item[drawn])) > 50


def test_labels_alone_are_trained_on(tiny_dataset: Dataset, tmp_path: Path) -> None:
    labels = replace(tiny_dataset, meta=replace(tiny_dataset.meta, retrieval_actions=("bought",)))
    assert not len(labels.engagements) and teaches(labels, labels.meta.cut_test)
    size = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400)
    report = train_ranker(labels, tmp_path / "ranker", RankerPlan(steps=1, minutes=None, size=size))
    assert report.tasks == ["label"] and report.validation["label"]["positives"] > 20 and report.note == ""


def test_labels_of_later_are_no_task_yet(tiny_dataset: Dataset) -> None:
    log, cut = tiny_dataset.events, tiny_dataset.meta.cut_valid
    hidden = replace(
        log, label=np.where(log.timestamp < cut, -1, log.label).astype(np.int8), request=np.full_like(log.request, -1)
    )
    late = replace(tiny_dataset, events=hidden)
    size = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400)
    assert list(start(late, cut, RankerPlan(steps=1, size=size), 1).writer.tasks) == ["engage"]
    assert "label" in start(late, late.meta.cut_test, RankerPlan(steps=1, size=size), 1).writer.tasks
