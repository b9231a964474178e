"""Tasks written down by people: what a file may say, what is refused and how, and what the tasks then ask of a log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ranking.learn.examples import answers
from ranking.tasks import Task, TaskError, Wording, tasks_of
from ranking.tasks_file import read_tasks, task_of, taught_tasks
from retrieval.data.schema import Dataset

GOOD = """
tasks:
  - name: keep
    instruction: predict what is kept
    question: kept?
    action: like
    positive: yes
    negative: no
    paraphrases:
      - {instruction: guess what stays, question: "does it stay?"}
  - {name: later, instruction: what comes later, question: "later?", action: share, held_out: true}
"""


def written(folder: Path, text: str) -> Path:
    (folder / "tasks.yaml").write_text(text, encoding="utf-8")
    return folder / "tasks.yaml"


def test_a_file_becomes_tasks_in_its_order_and_yes_stays_a_word(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    keep, later = read_tasks(path).values()
    assert (keep.name, keep.action, keep.positive, keep.negative) == ("keep", "like", "yes", "no")
    assert keep.paraphrases == (Wording("guess what stays", "does it stay?"),) and not keep.held_out
    assert later.held_out and task_of(f"{path}#later") == later and task_of(str(path)) == keep
    assert Task.from_facts(keep.facts()) == keep


def test_the_example_file_is_one() -> None:
    tasks = read_tasks(Path(__file__).parents[2] / "examples" / "tasks.yaml")
    assert next(iter(tasks)) == "label" and tasks["share"].held_out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tasks: []", "no task in it"),
        ("- a", "describes the fields"),
        ("tasks: [{name: a, instruction: b}]", "question: Field required"),
        ("tasks: [{name: a, instruction: b, question: c, colour: d}]", "colour"),
        ("tasks: [{name: '', instruction: b, question: c}]", "name is empty"),
        ("tasks: [{name: a, instruction: ' ', question: c}]", "instruction is empty"),
        ("tasks: [{name: a, instruction: b, question: c, positive: x, negative: x}]", "both answers are 'x'"),
        ("tasks: [{name: a, instruction: b, question: c, positive: 'yes', negative: ' yes'}]", "both answers are 'yes'"),
        ("tasks: [{name: engage, instruction: b, question: c}]", "about engagements alone"),
        ("tasks: [{name: label, instruction: b, question: c, action: d}]", "is on the label column"),
        ("tasks: [{name: a, instruction: b, question: c, question: d}]", "line 1: 'question' stands twice"),
        ("tasks: []\ntasks: [{name: a, instruction: b, question: c}]", "line 2: 'tasks' stands twice"),
        ("tasks: [{name: a, instruction: b, question: c, label: 2}]", "label is 2"),
        ("tasks: [{name: a, instruction: b, question: c, action: d, label: 0}]", "without an action"),
        ("tasks: [{name: a, instruction: b, question: c, held_out: perhaps}]", "held_out"),
        ("tasks: [{name: a, instruction: b, question: c}, {name: a, instruction: d, question: e}]", "two tasks are named 'a'"),
        ("tasks: [{name: a, instruction: b, question: c, paraphrases: [{instruction: d, question: ''}]}]", "paraphrases"),
        ("tasks: !!python/object/apply:os.system [true]", "docs/tasks.md"),
        ("tasks: {a: *nothing}", "cannot be read as YAML"),
        ("[" * 5_000, "cannot be read as YAML"),
    ],
)
def test_what_is_no_task_is_refused_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(TaskError, match=f"{path}.*{says}"):
        read_tasks(path)


def test_a_missing_file_and_an_unknown_name_are_told(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read"):
        read_tasks(tmp_path / "nothing.yaml")
    with pytest.raises(TaskError, match="knows keep, later"):
        task_of(f"{written(tmp_path, GOOD)}#sooner")


def test_training_refuses_tasks_that_a_folder_cannot_teach(tiny_dataset: Dataset) -> None:
    keep = Task("keep", "a", "b", "like")
    assert list(taught_tasks(tiny_dataset, {"keep": keep, "later": Task("later", "a", "b", "share", held_out=True)}))
    for tasks, says in (
        ([replace(keep, held_out=True)], "put one that is taught first"),
        ([replace(keep, action="share")], "has after impressions: like"),
        ([keep, replace(keep, name="there", surface="moon")], "surface 'moon'"),
    ):
        with pytest.raises(TaskError, match=says):
            taught_tasks(tiny_dataset, {task.name: task for task in tasks})
    events = replace(tiny_dataset.events, label=np.full(len(tiny_dataset.events), -1, np.int8))
    with pytest.raises(TaskError, match="has none"):
        taught_tasks(replace(tiny_dataset, events=events), {"a": Task("a", "b", "c")})


def test_a_task_may_ask_for_the_other_label_or_one_surface(tiny_dataset: Dataset) -> None:
    event, label = answers(tiny_dataset, Task("disliked", "a", "b", label=0))
    np.testing.assert_array_equal(label, 1 - tiny_dataset.events.label[event])
    log = tiny_dataset.events
    surface = (np.arange(len(log)) % 2).astype(np.int16)
    two = replace(tiny_dataset, events=replace(log, surface=surface, surfaces=("feed", "mail")))
    for name in ("label", "like"):
        whole, said = answers(two, tasks_of(two)[name])
        there, of_mail = answers(two, replace(tasks_of(two)[name], surface="mail"))
        np.testing.assert_array_equal(there, whole[surface[whole] == 1])
        np.testing.assert_array_equal(of_mail, said[surface[whole] == 1])
    assert not len(answers(two, Task("x", "a", "b", surface="moon"))[0])


def test_default_tasks_are_served_in_the_words_they_always_had_and_paraphrased_beside(tiny_dataset: Dataset) -> None:
    like = tasks_of(tiny_dataset)["like"]
    assert like.worded(0) is like and like.question == "will the member like?"
    said = {(like.worded(number).instruction, like.worded(number).question) for number in range(len(like.paraphrases) + 1)}
    assert len(said) == len(like.paraphrases) + 1 >= 4
    assert all("like" in instruction + question for instruction, question in said)
    assert "{}" not in str(tasks_of(tiny_dataset))
