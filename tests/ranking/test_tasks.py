"""Which questions a folder can teach, and that their answers are read off the log correctly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ranking.learn.examples import answers
from ranking.tasks import ENGAGE, LABEL, Task, TaskError, task_named, tasks_of
from retrieval.data.schema import Dataset


def without_labels(dataset: Dataset) -> Dataset:
    return replace(dataset, events=replace(dataset.events, label=np.full(len(dataset.events), -1, np.int8)))


def test_labels_and_impressions_make_tasks_the_label_first(tiny_dataset: Dataset) -> None:
    tasks = tasks_of(tiny_dataset)
    assert list(tasks) == [LABEL, "like"]
    assert tiny_dataset.meta.label in tasks[LABEL].instruction
    assert tasks["like"].action == "like" and "like" in tasks["like"].question


def test_a_folder_without_labels_keeps_the_actions_and_one_without_either_asks_who_engages(tiny_dataset: Dataset) -> None:
    unlabelled = without_labels(tiny_dataset)
    assert list(tasks_of(unlabelled)) == ["like"]
    likes = unlabelled.events.take(unlabelled.is_engagement)
    assert list(tasks_of(replace(unlabelled, events=likes))) == [ENGAGE]
    no_requests = replace(unlabelled.events, request=np.full(len(unlabelled.events), -1, np.int32))
    assert list(tasks_of(replace(unlabelled, events=no_requests))) == [ENGAGE]


def test_an_impression_is_positive_if_the_member_did_it_in_that_request(tiny_dataset: Dataset) -> None:
    log = tiny_dataset.events
    event, label = answers(tiny_dataset, tasks_of(tiny_dataset)["like"])
    assert set(log.action[event]) == {log.actions.index("impression")}
    # In this shop the impression's own label says the same.
    np.testing.assert_array_equal(label, log.label[event])
    assert 0 < label.mean() < 1


def test_a_like_in_another_request_does_not_count(tiny_dataset: Dataset) -> None:
    log = tiny_dataset.events
    like = log.actions.index("like")
    moved = log.request.copy()
    moved[log.action == like] += 1
    _, label = answers(replace(tiny_dataset, events=replace(log, request=moved)), tasks_of(tiny_dataset)["like"])
    assert label.sum() == 0


def test_task_facts_round_trip_and_bad_ones_are_refused() -> None:
    task = Task("save", "predict what is kept", "will they keep it?", "save")
    assert Task.from_facts(task.facts()) == task
    for facts in (
        {"name": "save"},
        {**task.facts(), "extra": "x"},
        {**task.facts(), "name": ""},
        {**task.facts(), "question": 3},
    ):
        with pytest.raises(TaskError):
            Task.from_facts(facts)  # type: ignore[arg-type]


def test_a_task_is_found_by_name_and_the_first_by_default() -> None:
    tasks = {name: Task(name, "", "") for name in ("a", "b")}
    assert task_named(tasks, "").name == "a"
    assert task_named(tasks, "b").name == "b"
    with pytest.raises(TaskError, match="knows a, b"):
        task_named(tasks, "c")
