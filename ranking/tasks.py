"""A task is words: what is asked about each candidate, and the two words that answer it.

The first task of a ranker is the one that is served when a request names none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from index.errors import BrewlineError
from retrieval.data.schema import IMPRESSION, Dataset, action_kind

LABEL, ENGAGE = "label", "engage"
"""Names of the task on the `label` column, and of the one for folders that have neither labels nor impressions."""
STRICT = {"extra": "forbid"}
"""Read by pydantic where a task comes out of a file: a field that nobody knows is an error."""
_LABEL_PARAPHRASES = (
    ("say which of these get it: {}", "label 1?"),
    ("each item gets 1 or 0. {}", "does it get a 1?"),
    ("tell ones from zeros: {}", "is it a one?"),
)
_ACTION_PARAPHRASES = (
    ("guess which of these the member is going to {}", "is the member going to {} it?"),
    ("tell what leads to: {}", "{}?"),
    ("say which items this person would {}", "would this person {} it?"),
)


class TaskError(BrewlineError):
    """A task that is unknown or badly written."""


@dataclass(frozen=True, slots=True)
class Wording:
    """One way of asking a task's question."""

    instruction: str
    question: str


@dataclass(frozen=True, slots=True)
class Task:
    """One question about every candidate.

    `instruction` and `question` stand at the beginning of the prompt; `positive` and `negative` are the answers, each one
    token. `action` is the action that makes the answer positive; where it is "", the `label` column does, if it is `label`.
    Only events of `surface` are asked about ("": of any). `paraphrases` ask the same in other words: training draws among
    them, serving uses the first wording alone. A `held_out` task is never trained on.
    """

    __pydantic_config__ = STRICT

    name: str
    instruction: str
    question: str
    action: str = ""
    positive: str = "yes"
    negative: str = "no"
    paraphrases: tuple[Wording, ...] = ()
    label: int = 1
    surface: str = ""
    held_out: bool = False

    @property
    def asks(self) -> Literal["label", "action", "engage"]:
        """Where the answers come from: the label column, impressions that an action followed, or engagements alone."""
        if self.action:
            return "action"
        return "engage" if self.name == ENGAGE else "label"

    def worded(self, number: int) -> Task:
        """The task in its wording of that number: 0 is the served one, the paraphrases follow."""
        if not number:
            return self
        other = self.paraphrases[number - 1]
        return replace(self, instruction=other.instruction, question=other.question)

    def facts(self) -> dict[str, Any]:
        """The task as JSON can hold it, for the model folder."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Task:
        """The task that `facts` described. Raises TaskError if a field is missing, unknown or of another kind."""
        try:
            other = tuple(Wording(**row) for row in facts.get("paraphrases", ()))
            task = cls(**{**facts, "paraphrases": other})
        except TypeError as error:
            raise TaskError(f"a task needs name, instruction, question, action, positive and negative ({error})") from error
        words = [task.name, task.instruction, task.question, task.action, task.positive, task.negative, task.surface]
        words += [text for wording in other for text in (wording.instruction, wording.question)]
        if not all(isinstance(value, str) for value in words) or not task.name:
            raise TaskError(f"a task's fields are words and its name is not empty, got {dict(facts)}")
        if task.label not in (0, 1) or not isinstance(task.held_out, bool):
            raise TaskError(f"a task's label is 0 or 1 and held_out is true or false, got {dict(facts)}")
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
        found[LABEL] = _task(LABEL, f"predict the label: {meaning}", "is the label 1?", _LABEL_PARAPHRASES, meaning)
    for action in impression_actions(dataset):
        words = action.replace("_", " ")
        asked = f"predict what the member will {words}", f"will the member {words}?"
        found.setdefault(action, _task(action, *asked, _ACTION_PARAPHRASES, words, action))
    if not found:
        asked = "predict what the member will choose", "will the member choose it?"
        found[ENGAGE] = _task(ENGAGE, *asked, _ACTION_PARAPHRASES, "choose")
    return found


def _task(name: str, instruction: str, question: str, others: Sequence[tuple[str, str]], words: str, action: str = "") -> Task:
    """The task, whose paraphrases are the patterns `others` with `words` in the place of {}."""
    said = tuple(Wording(told.replace("{}", words), asked.replace("{}", words)) for told, asked in others)
    return Task(name, instruction, question, action, paraphrases=said)


def taught_of(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """Return the tasks that training may see: all but the held-out ones."""
    return {name: task for name, task in tasks.items() if not task.held_out}


def task_named(tasks: Mapping[str, Task], name: str) -> Task:
    """Return the task of that name, the first one for "". Raises TaskError with the known names."""
    if not name and tasks:
        return next(iter(tasks.values()))
    if name not in tasks:
        raise TaskError(f'task "{name[:80]}" is unknown; this ranker knows {", ".join(tasks)}')
    return tasks[name]


def impression_actions(dataset: Dataset) -> Sequence[str]:
    """Kinds of engagement that happened to an impression of a known request, in the order of the log's actions."""
    events = dataset.events
    if IMPRESSION not in events.actions:
        return []
    shown = (events.action == events.actions.index(IMPRESSION)) & (events.request >= 0)
    if not shown.any():
        return []
    used = np.unique(events.action[dataset.is_engagement & (events.request >= 0)])
    return list(dict.fromkeys(action_kind(events.actions[row]) for row in used.tolist()))
