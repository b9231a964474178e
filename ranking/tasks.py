"""A task is words: what is asked about each candidate, and the two words that answer it.

The first task of a ranker is the one that is served when a request names none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from index.errors import BrewlineError
from retrieval.data.schema import IMPRESSION, Dataset, action_kind

LABEL, ENGAGE = "label", "engage"
"""Names of the task on the `label` column, and of the one for folders that have neither labels nor impressions."""


class TaskError(BrewlineError):
    """A task that is unknown or badly written."""


@dataclass(frozen=True, slots=True)
class Task:
    """One question about every candidate.

    `instruction` and `question` stand at the beginning of the prompt; `positive` and `negative` are the answers, each one
    token. `action` is the action that makes the answer positive, "" where the `label` column does.
    """

    name: str
    instruction: str
    question: str
    action: str = ""
    positive: str = "yes"
    negative: str = "no"

    def facts(self) -> dict[str, str]:
        """The task as plain words, for the model folder."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, str]) -> Task:
        """The task that `facts` described. Raises TaskError if a field is missing, unknown or not a word."""
        try:
            task = cls(**facts)
        except TypeError as error:
            raise TaskError(f"a task needs name, instruction, question, action, positive and negative ({error})") from error
        if not all(isinstance(value, str) for value in facts.values()) or not task.name:
            raise TaskError(f"a task's fields are words and its name is not empty, got {dict(facts)}")
        return task


def tasks_of(dataset: Dataset) -> dict[str, Task]:
    """Return the tasks that a data folder can teach, by name, the main one first.

    "label" if any event has a label; one per engagement action if there are impressions with a request id, where an
    impression is positive when the same member did that to the same item in the same request; "engage" if there is neither.
    """
    events = dataset.events
    found: dict[str, Task] = {}
    if (events.label >= 0).any():
        meaning = dataset.meta.label.strip() or "1 if the member liked the item, else 0"
        found[LABEL] = Task(LABEL, f"predict the label: {meaning}", "is the label 1?")
    for action in _impression_actions(dataset):
        words = action.replace("_", " ")
        found.setdefault(action, Task(action, f"predict what the member will {words}", f"will the member {words}?", action))
    if not found:
        found[ENGAGE] = Task(ENGAGE, "predict what the member will choose", "will the member choose it?")
    return found


def task_named(tasks: Mapping[str, Task], name: str) -> Task:
    """Return the task of that name, the first one for "". Raises TaskError with the known names."""
    if not name and tasks:
        return next(iter(tasks.values()))
    if name not in tasks:
        raise TaskError(f'task "{name[:80]}" is unknown; this ranker knows {", ".join(tasks)}')
    return tasks[name]


def _impression_actions(dataset: Dataset) -> Sequence[str]:
    """Kinds of engagement that happened to an impression of a known request, in the order of the log's actions."""
    events = dataset.events
    if IMPRESSION not in events.actions:
        return []
    shown = (events.action == events.actions.index(IMPRESSION)) & (events.request >= 0)
    if not shown.any():
        return []
    used = np.unique(events.action[dataset.is_engagement & (events.request >= 0)])
    return list(dict.fromkeys(action_kind(events.actions[row]) for row in used.tolist()))
