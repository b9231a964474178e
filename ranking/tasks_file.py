"""Tasks that people write down: a YAML file of instructions and questions, so that a new task needs no code.

    tasks:
      - name: share
        instruction: predict what the member will share
        question: will the member share?
        action: share

docs/tasks.md describes every field. Scalars are read as words, so that `positive: yes` is the word "yes".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from ranking.tasks import ENGAGE, LABEL, STRICT, Task, TaskError, impression_actions, task_named
from retrieval.data.schema import Dataset
from retrieval.yaml_keys import repeated_key

LONGEST = 1 << 20
"""Bytes of a file beyond which it is no list of tasks."""


@dataclass(frozen=True)
class _File:
    __pydantic_config__ = STRICT

    tasks: list[Task]


def read_tasks(path: Path) -> dict[str, Task]:
    """The tasks of a file by name, in its order. Raises TaskError with the file, what was seen and what was expected."""
    try:
        if path.stat().st_size > LONGEST:
            raise TaskError(f"{path}: more than {LONGEST:,} bytes; expected a list of tasks")
        text = path.read_text(encoding="utf-8")
        # BaseLoader makes words, lists and mappings only: no objects, and no `yes` that turns into True.
        repeated = repeated_key(yaml.compose(text, Loader=yaml.BaseLoader))
        if repeated:
            raise TaskError(f"{path}: {repeated} stands twice in one mapping; which of the two is meant?")
        found = yaml.load(text, Loader=yaml.BaseLoader)
        tasks = TypeAdapter(_File).validate_python(found).tasks
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise TaskError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}); docs/tasks.md shows a file") from error
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise TaskError(f"{path}: {said}; docs/tasks.md describes the fields") from error
    if not tasks:
        raise TaskError(f"{path}: no task in it; expected at least one under `tasks:`")
    for place, task in enumerate(tasks):
        _check(task, f"{path}: tasks[{place}] {task.name!r}")
        if task.name in {other.name for other in tasks[:place]}:
            raise TaskError(f"{path}: two tasks are named {task.name!r}; a name must be one task's own")
    return {task.name: task for task in tasks}


def task_of(reference: str) -> Task:
    """The task that FILE#NAME names; FILE alone is its first one. Raises TaskError."""
    path, _, name = reference.partition("#")
    return task_named(read_tasks(Path(path)), name)


def taught_tasks(dataset: Dataset, tasks: Mapping[str, Task]) -> Mapping[str, Task]:
    """The same tasks, if a ranker can be trained on them with this folder. Raises TaskError saying which one cannot, and why.

    A held-out task may ask what this folder does not hold; the first task is the one that is served, so it is trained on.
    """
    first = next(iter(tasks.values()))
    if first.held_out:
        raise TaskError(f"the first task, {first.name!r}, is held out, but it is served unasked; put one that is taught first")
    known = list(impression_actions(dataset))
    for task in tasks.values():
        if task.held_out:
            continue
        if task.asks == "action" and task.action not in known:
            there = ", ".join(known) or "none"
            raise TaskError(f"task {task.name!r} asks about {task.action!r}; {dataset.meta.name} has after impressions: {there}")
        if task.asks == "label" and not (dataset.events.label >= 0).any():
            raise TaskError(f"task {task.name!r} names no action, so it asks about labels, and {dataset.meta.name} has none")
        if task.surface and task.surface not in dataset.events.surfaces:
            there = ", ".join(dataset.events.surfaces) or "none"
            raise TaskError(f"task {task.name!r} asks about surface {task.surface!r}; surfaces in {dataset.meta.name}: {there}")
    return tasks


def _check(task: Task, where: str) -> None:
    texts = {"name": task.name, "instruction": task.instruction, "question": task.question}
    texts |= {"positive": task.positive, "negative": task.negative}
    for place, other in enumerate(task.paraphrases):
        texts |= {f"paraphrases[{place}].instruction": other.instruction, f"paraphrases[{place}].question": other.question}
    for field, text in texts.items():
        if not text.strip():
            raise TaskError(f"{where}: {field} is empty; expected words")
    if task.positive.strip() == task.negative.strip():
        raise TaskError(f"{where}: both answers are {task.positive!r}; expected two different words")
    if task.name == LABEL and task.action:
        raise TaskError(f"{where}: the task of that name is on the label column; leave `action` out, or give another name")
    if task.name == ENGAGE and not task.action:
        raise TaskError(f"{where}: without an action it would ask about engagements alone; give an `action`, or another name")
    if task.label not in (0, 1) or (task.action and task.label != 1):
        raise TaskError(f"{where}: label is {task.label}; expected 1, or 0 in a task without an action")
