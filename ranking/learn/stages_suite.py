"""The generalisation suite: one ranker asked what it was not taught, after every stage the same questions.

    auc                  the first task in its served wording                        answers held back before the test cut
    paraphrase_auc       the same in each of its other wordings, on average          the same answers
    unseen_auc           a task that no stage may see                                its answers of the same members
    surface_auc          the first task on a surface that no stage learns from       all its answers between the cuts
    format               share of the whole vocabulary's probability on the two answers, where a score is read
    wish_right           share of members for whom a wish moved the items it is about the wished way (`ranking.instructions`)
    new_words_right      the same in wordings that no training draws
    contradiction_right  "more X, no X": the share for whom X fell, as the stricter word demands
    text_loss            nats per token of prefixes of members held back

Nothing of it comes from after the test cut, so that stages may be stopped by it. What a folder cannot tell is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from ranking.calibrate import auc
from ranking.instructions import LEAST, Followed, follow
from ranking.learn.batches import GroupWriter, Said
from ranking.learn.examples import GroupSettings, Pool, held_back, pools_of
from ranking.learn.questions import Ground, Questions
from ranking.learn.stages_plan import StagesPlan
from ranking.learn.stages_train import text_loss
from ranking.ranker import Ranker
from ranking.tasks import Task, TaskError
from ranking.tasks_file import task_of
from ranking.unseen import asking
from retrieval.data.schema import Dataset

FORMATTED, READ, LISTED = 1_000, 200, 40
"""Candidates whose whole distribution is looked at, members whose prefixes are read, and items of a list that wishes reorder."""
ROWS_AT_ONCE, TEXTS_AT_ONCE = 256, 16


class Suite:
    """The questions of one plan over one data set, written once."""

    def __init__(self, plan: StagesPlan, dataset: Dataset, ground: Ground, start: Ranker) -> None:
        """`start` has the words that all stages share. Raises TaskError, LabelWordError for a task that cannot be asked."""
        self.plan, self.dataset, self.ground = plan, dataset, ground
        main = start.tasks[ground.main]
        self._held = held_back(dataset, plan.seed)
        writer = ground.writer
        pools = self._window({main.name: main})
        pool = pools[main.name].only(self._held[pools[main.name].member])
        self._worded = [Questions.of(writer, pool, plan.judged, Said(main.worded(n + 1))) for n in range(len(main.paraphrases))]
        self._formatted = Questions.of(writer, pool, FORMATTED)
        self._unseen = None if plan.unseen is None else self._task(task_of(plan.unseen), start)
        self._elsewhere = self._surface(main) if plan.surface else None
        members = np.flatnonzero(self._held)[:READ].tolist()
        self._texts = [writer.prefix(member, dataset.meta.cut_test, main) for member in members]
        self._pad = start.prompts.tokens.pad

    def of(self, ranker: Ranker) -> dict[str, float]:
        """What a ranker of the same words reaches, by name."""
        asked, labels = self.ground.asked, self.ground.labels
        found = {"auc": auc(asked.scores(ranker.engine, labels), asked.label)}
        if self._worded:
            each = [auc(one.scores(ranker.engine, labels), one.label) for one in self._worded]
            found["paraphrase_auc"] = float(np.mean(each))
        if self._unseen is not None:
            task, questions = self._unseen
            other = asking(self.dataset, ranker, task)
            found["unseen_auc"] = auc(questions.scores(other.engine, other.facts.labels), questions.label)
        if self._elsewhere is not None:
            found["surface_auc"] = auc(self._elsewhere.scores(ranker.engine, labels), self._elsewhere.label)
        found["format"] = self._format(ranker)
        found |= self._followed(ranker)
        return {**found, "text_loss": self._read(ranker)}

    def _window(self, tasks: Mapping[str, Task]) -> dict[str, Pool]:
        meta = self.dataset.meta
        return pools_of(self.dataset, tasks, meta.cut_valid, meta.cut_test, replace(GroupSettings(), least=1), self.plan.seed)

    def _task(self, task: Task, start: Ranker) -> tuple[Task, Questions] | None:
        """A task's held-back questions; None where nothing answers it. Raises TaskError if its answers are learned from."""
        for other in self.ground.writer.tasks.values():
            if self._learned(other, task):
                raise TaskError(f"unseen task {task.name!r} has the answers of {other.name!r}, which is taught; mark it held_out")
        pool = self._window({task.name: task}).get(task.name)
        pool = None if pool is None else pool.only(self._held[pool.member])
        if pool is None or not len(pool):
            return None
        prompts = asking(self.dataset, start, task).prompts
        writer = GroupWriter(self.dataset, prompts, {task.name: task}, self.dataset.meta.cut_test)
        return task, Questions.of(writer, pool, self.plan.judged)

    def _learned(self, taught: Task, task: Task) -> bool:
        """Whether a taught task shows answers of another one: all surfaces are one of them, and no is the reverse of yes."""
        apart = "" not in (taught.surface, task.surface) and taught.surface != task.surface
        left_out = bool(self.plan.surface) and task.surface == self.plan.surface
        return (taught.asks, taught.action) == (task.asks, task.action) and not (apart or left_out)

    def _surface(self, main: Task) -> Questions | None:
        """The first task's questions on the surface that is not learned from."""
        pool = self._window({main.name: replace(main, surface=self.plan.surface)}).get(main.name)
        return None if pool is None else Questions.of(self.ground.writer, pool, self.plan.judged)

    def _format(self, ranker: Ranker) -> float:
        head = ranker.engine.model.get_output_embeddings().weight.detach().float()
        pair = list(self.ground.labels[self.ground.main])
        states = torch.from_numpy(self._formatted.states(ranker)).to(head.device)
        parts = [(rows @ head.T).softmax(-1)[:, pair].sum(-1) for rows in states.split(ROWS_AT_ONCE)]
        return float(torch.cat(parts).mean())

    def _followed(self, ranker: Ranker) -> dict[str, float]:
        if len({name for name in self.dataset.items.category if name}) < LEAST:
            return {}
        # What the stage taught is asked, not what the service would make of the words by rule.
        found = follow(self.dataset, ranker, self.plan.lists, LISTED, self.plan.seed, rules=False)
        by_name = {one.name: one for one in found}
        parts = {
            "wish_right": [f"{kind} X" for kind in ("more", "only", "less", "no")],
            "new_words_right": [f"{kind} X, held-out words" for kind in ("more", "only", "less", "no")],
            "contradiction_right": ["more X, no X", "more X, no X, held-out words"],
        }
        return dict(_shares({name: [by_name[one] for one in ones] for name, ones in parts.items()}))

    def _read(self, ranker: Ranker) -> float:
        total, size = 0.0, 0
        for first in range(0, len(self._texts), TEXTS_AT_ONCE):
            rows = self._texts[first : first + TEXTS_AT_ONCE]
            count = sum(map(len, rows)) - len(rows)
            with torch.no_grad():
                total += count * float(text_loss(ranker.engine.model, rows, self._pad))
            size += count
        return total / max(1, size)


def _shares(parts: Mapping[str, list[Followed]]) -> Iterator[tuple[str, float]]:
    """The mean share of right members of the conditions that had any."""
    for name, ones in parts.items():
        known = [one.right for one in ones if one.members]
        if known:
            yield name, float(np.mean(known))
