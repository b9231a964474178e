"""How well a ranker answers one task, be it one that it never saw: zero-shot, or with answered examples in the prompt.

The words alone are judged: no head was fitted for a task that nobody trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ranking.evaluate import Judged, RankingEvidenceError, Rows, engaged_before, judge_scores, rows_of
from ranking.learn.batches import GroupWriter
from ranking.learn.examples import GroupSettings, Pool, pools_of, sampled
from ranking.prompts import RankPrompts
from ranking.ranker import Ranker, labels_of
from ranking.scored import TASK_CANDIDATES, known_until, text_logits
from ranking.shots_past import PastShots
from ranking.tasks import Task, TaskError, task_named
from ranking.tasks_file import task_of
from retrieval.data.schema import DAY, Dataset
from retrieval.evidence.baselines import Knowledge


@dataclass(frozen=True)
class TaskJudged:
    """One task's result on `candidates` of the test window, `shots` examples in the prompts of cold members. `taught` names the
    ranker's task that was trained on the same answers ("": none, the ranker never saw them)."""

    task: Task
    taught: str
    shots: int
    calibrated: bool
    counts: Knowledge
    candidates: int
    members: int
    positive_share: float
    judged: Judged

    def as_dict(self) -> dict[str, object]:
        """The result ready for JSON."""
        facts = {"task": self.task.facts(), "taught": self.taught, "shots": self.shots, "calibrated": self.calibrated}
        size = {"candidates": self.candidates, "members": self.members, "positive_share": self.positive_share}
        return {**facts, "counts": self.counts, **size, **self.judged.as_dict()}


def named_or_read(reference: str, tasks: Mapping[str, Task]) -> Task:
    """The task that a command line means: FILE#NAME, a FILE's first one, or one of `tasks` by name. Raises TaskError."""
    if "#" in reference or Path(reference).is_file():
        return task_of(reference)
    return task_named(tasks, reference)


def judge_task(
    dataset: Dataset,
    ranker: Ranker,
    task: Task,
    counts: Knowledge,
    shots: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskJudged:
    """Returns a ranker's result on a task over a fixed sample of the test window, a group for each member and day.

    `shots` examples stand in the prompts of cold members, out of the log before the test cut (None: those that the ranker
    serves with). Raises TaskError for answers that no log holds, RankingEvidenceError where only one kind of answer occurs.
    """
    if task.asks == "engage":
        raise TaskError(f"task {task.name!r} is about engagements against drawn items; only labels and actions can be judged")
    asked = asking(dataset, ranker, task, shots)
    pool, chosen, rows = _questions(dataset, task, counts)
    writer = GroupWriter(dataset, asked.prompts, asked.tasks, known_until(dataset, counts))
    said = asked.text_probabilities(text_logits(asked, writer, pool, chosen, progress), task.name)
    return TaskJudged(
        task=task,
        taught=next((other.name for other in ranker.tasks.values() if not other.held_out and _same(other, task)), ""),
        shots=len(asked.prompts.shots.get(task.name, ())),
        calibrated=task.name in asked.facts.calibrators,
        counts=counts,
        candidates=len(rows),
        members=len(np.unique(rows.member)),
        positive_share=float(rows.label.mean()),
        judged=judge_scores(rows, said.astype(np.float64)),
    )


def asking(dataset: Dataset, ranker: Ranker, task: Task, shots: int | None = None) -> Ranker:
    """The same weights asked one task, which they need not know. Raises LabelWordError, ShotsError."""
    known = ranker.tasks.get(task.name)
    held = {task.name: task}
    examples = {name: some for name, some in ranker.prompts.shots.items() if known is not None and _same(known, task)}
    if shots is not None:
        cut = dataset.meta.cut_test
        examples = dict(PastShots(dataset, held, shots, cut).of_all(held, cut))
    own = ranker.prompts
    prompts = RankPrompts(own.tokens, own.quantizer, own.budgets, own.layout, examples)
    kept = {name: one for name, one in ranker.facts.calibrators.items() if known is not None and known == task}
    facts = replace(ranker.facts, tasks=held, labels=labels_of(own.tokens, held), calibrators=kept, shots=examples)
    return Ranker.of(ranker.engine.model, prompts, facts, ranker.fingerprint)


def _same(one: Task, other: Task) -> bool:
    """Whether two tasks have the same answers."""
    return (one.asks, one.action, one.label, one.surface) == (other.asks, other.action, other.label, other.surface)


def _questions(dataset: Dataset, task: Task, counts: Knowledge) -> tuple[Pool, list[tuple[str, int]], Rows]:
    """The test groups of a task, the sample that is asked, and its candidates as rows to judge."""
    cut, until = dataset.meta.cut_test, known_until(dataset, "live")
    pools = pools_of(dataset, {task.name: task}, cut, until, GroupSettings(least=1), 0)
    if task.name not in pools:
        raise RankingEvidenceError(f"{dataset.meta.name}: nothing after the test cut answers task {task.name!r}; choose another")
    pool = pools[task.name]
    chosen = sampled(pool, TASK_CANDIDATES)
    kept = np.concatenate([np.arange(pool.start[group], pool.start[group + 1]) for _, group in chosen])
    label = pool.label[kept].astype(np.float64)
    if label.min() == label.max():
        raise RankingEvidenceError(
            f"{dataset.meta.name}: all {len(label)} answers to task {task.name!r} in the test window are {int(label[0])}; "
            "order can only be judged where both occur"
        )
    rows = replace(rows_of(dataset, pool.event[kept]), label=label)
    if counts == "frozen":
        rows = replace(rows, history=engaged_before(dataset, rows.member, np.full(len(rows), cut)))
        pool = replace(pool, moment=np.full(len(pool), cut), day=np.full(len(pool.day), cut // DAY))
    return pool, chosen, rows
