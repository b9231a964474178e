"""How each training group is put: the task in one of its wordings, some with a wish of the member.

Every draw depends on the seed and the step alone, so that a resumed run reads what an unbroken one would have read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ranking.learn.batches import Choice, Said
from ranking.learn.examples import Pool
from ranking.learn.wishes import TAUGHT, answers_with, drawn, words_of
from ranking.tasks import Task
from retrieval.data.schema import Items

SERVED_SHARE = 0.5
"""Share of groups that are asked in the served wording; the paraphrases share the rest. What is served must be learned first."""


@dataclass(frozen=True)
class Variety:
    """Draws for groups of `tasks`; `wishes` is the share of groups that get one."""

    items: Items
    tasks: Mapping[str, Task]
    wishes: float
    seed: int
    corrections: Mapping[str, float] = field(default_factory=dict)
    """Task -> what its thinned negatives add to a logit (`ranking.learn.examples.thinned`), where no wish decided the answer."""

    def of(self, pools: Mapping[str, Pool], chosen: Sequence[Choice], step: int) -> list[Said]:
        """How the chosen groups are put in a step."""
        rng = np.random.default_rng([self.seed, 8, step])
        return [self._said(rng, pools[name], group) for name, group in chosen]

    def _said(self, rng: np.random.Generator, pool: Pool, group: int) -> Said:
        task = self.tasks[pool.task]
        number = 0 if rng.random() < SERVED_SHARE else int(rng.integers(1, len(task.paraphrases) + 1)) if task.paraphrases else 0
        worded = task.worded(number)
        if rng.random() >= self.wishes:
            return Said(worded)
        part = pool.candidates(group)
        rows = pool.item[part].tolist()
        category, creator = ([column[row] for row in rows] for column in (self.items.category, self.items.creator))
        wishes = drawn(rng, category, creator)
        if not wishes:
            return Said(worded)
        words = words_of(wishes, TAUGHT, int(rng.integers(1 << 16)))
        label = pool.label[part]
        no, yes = (answers_with(wishes, np.full_like(label, answer), category, creator) for answer in (0, 1))
        return Said(worded, words, np.where(label == 1, yes, no), (no > 0) | (yes < 1))
