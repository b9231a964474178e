"""Groups become token ids: prefix and candidates of many members in one packed pass, drawn in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ranking.learn.examples import SAMPLED, Ints, Pool
from ranking.prefill.request import Request
from ranking.prompts import RankPrompts, relations_of
from ranking.shots_past import PastShots
from ranking.tasks import Task
from retrieval import records
from retrieval.counts import Counts
from retrieval.data.schema import Dataset, Engagement, Item, MemberView

Choice = tuple[str, int]
"""A task's name and a group of its pool."""


@dataclass(frozen=True)
class Said:
    """How one group is put this time: the task in one wording, the member's own wish, the answers float32 [n] if the wish changes
    them, and which of them [n] it decides."""

    task: Task
    wish: str = ""
    label: npt.NDArray[np.float32] | None = None
    ruled: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Batch:
    """Requests of one step; `label` float32 [n] and `tasks` of each request, candidates in the requests' order; `event` int64
    [n] as in `Pool`, SAMPLED too where a wish decided the answer: how the log came to its own is no matter there."""

    requests: list[Request]
    tasks: list[str]
    label: npt.NDArray[np.float32]
    event: Ints = field(default_factory=lambda: np.zeros(0, np.int64))


class GroupWriter:
    """Writes groups of a dataset as requests, exactly as the served ranker would write them at that moment."""

    def __init__(
        self, dataset: Dataset, prompts: RankPrompts, tasks: Mapping[str, Task], before: int, past: PastShots | None = None
    ) -> None:
        """Histories are engagements; numbers come from events strictly before `before` (seconds). Examples are those of the
        prompts, or, for groups that those must not know of, the ones of each group's moment in the `past`, never the reader's."""
        self.dataset, self.prompts, self.tasks, self._past = dataset, prompts, tasks, past
        self.counts = Counts.from_dataset(dataset, before)
        self._log = dataset.engagements
        self._order = np.argsort(self._log.member, kind="stable")
        self._bounds = np.searchsorted(self._log.member[self._order], np.arange(len(dataset.members) + 1))
        self._records: dict[int, Item] = {}
        self._bodies: dict[int, list[int]] = {}
        self._histories: dict[int, tuple[Ints, list[Engagement], list[list[int]]]] = {}

    def write(self, pools: Mapping[str, Pool], chosen: Sequence[Choice], said: Sequence[Said] | None = None) -> Batch:
        """The chosen groups as one batch: as they are served, or each as `said` puts it."""
        said = said or [Said(self.tasks[task]) for task, _ in chosen]
        parts = [pools[task].candidates(group) for task, group in chosen]
        item = np.concatenate([pools[task].item[part] for (task, _), part in zip(chosen, parts)])
        day = np.concatenate([pools[task].day[part] for (task, _), part in zip(chosen, parts)])
        label = np.concatenate(
            [pools[task].label[part] if put.label is None else put.label for (task, _), part, put in zip(chosen, parts, said)]
        )
        rows = self.item_rows(item, day)
        requests, place = [], 0
        for (task, group), put in zip(chosen, said):
            pool = pools[task]
            member, moment = int(pool.member[group]), int(pool.moment[group])
            candidates = item[place : place + (size := int(pool.start[group + 1] - pool.start[group]))]
            closed = [
                row + self.prompts.suffix(relation)
                for row, relation in zip(rows[place : place + size], self.relations(member, candidates, moment))
            ]
            requests.append(Request(self.prefix(member, moment, put.task, put.wish), closed))
            place += size
        event = np.concatenate(
            [
                pools[task].event[part] if put.ruled is None else np.where(put.ruled, SAMPLED, pools[task].event[part])
                for (task, _), part, put in zip(chosen, parts, said)
            ]
        )
        return Batch(requests, [task for task, _ in chosen], label.astype(np.float32), event)

    def item_rows(self, item: Ints, day: Ints) -> list[list[int]]:
        """Ids of items [n] with their numbers as of the start of days [n]."""
        missing = [row for row in dict.fromkeys(item.tolist()) if row not in self._bodies]
        self._bodies |= dict(zip(missing, self.prompts.bodies([self._record(row) for row in missing])))
        columns = {name: column[item] for name, column in self.dataset.items.numbers.items()}
        columns |= self.counts.at(item, day)
        return self.prompts.with_numbers([self._bodies[row] for row in item.tolist()], columns)

    def prefix(self, member: int, moment: int, task: Task, wish: str = "") -> list[int]:
        """Ids of the prefix of a member (row) at a moment (seconds), which sees nothing of the moment itself."""
        connections = self.dataset.connections_of(member, moment)
        opening = self.prompts.opening(MemberView(self.dataset.members[member], (), connections, wish), task)
        times, history, entries = self._history(member)
        end = int(np.searchsorted(times, moment))
        begin = max(0, end - records.NEWEST)  # serving decides what to show from these alone
        rows = [begin + row for row in self.prompts.layout.admitted(history[begin:end])]
        shown, words = [history[row] for row in rows], [entries[row] for row in rows]
        shots = None if self._past is None else self._past.before(task.name, moment, member)
        return self.prompts.assemble(opening, shown, words, self.prompts.examples(task, shots))

    def relations(self, member: int, item: Ints, moment: int) -> list[str]:
        """The member's relation to the creators of items [n], in words, as known before a moment."""
        edges = self.dataset.connections_of(member, moment)
        return relations_of(edges, [self.dataset.items.creator[row] for row in item]) if edges else [""] * len(item)

    def _history(self, member: int) -> tuple[Ints, list[Engagement], list[list[int]]]:
        """The member's engagements, oldest first: times, records, and ids as a prefix shows them."""
        if member not in self._histories:
            rows = self._order[self._bounds[member] : self._bounds[member + 1]]
            history = [self._engagement(int(row)) for row in rows]
            self._histories[member] = (self._log.timestamp[rows], history, self.prompts.entries(history))
        return self._histories[member]

    def _engagement(self, row: int) -> Engagement:
        log = self._log
        label = int(log.label[row])
        action = log.actions[int(log.action[row])]
        return Engagement(self._record(int(log.item[row])), int(log.timestamp[row]), action, None if label < 0 else label)

    def _record(self, row: int) -> Item:
        if row not in self._records:
            self._records[row] = self.dataset.items[row]
        return self._records[row]


class Order:
    """An endless order of groups: each round holds every group of the first task once, and of the others a share.

    `share` says how many groups of each further task a round holds, relative to the first. With a mixing `temperature` T a
    further task of n groups gets n1 (n / n1)^(1/T) of them instead, n1 being the first task's: all at T = 1, and the rarer a task
    the more of its groups, relative to their number, with a higher T. The order depends on the seed alone; `cursor` is
    the whole state.
    """

    def __init__(
        self, pools: Mapping[str, Pool], share: float, step_candidates: int, seed: int, temperature: float | None = None
    ) -> None:
        self._pools, self._share, self._least, self._seed = pools, share, step_candidates, seed
        self._temperature = temperature
        self.cursor = (0, 0)
        self._round, self._choices = -1, list[Choice]()

    def next(self) -> list[Choice]:
        """The groups of the next step: at least `step_candidates` candidates."""
        number, place = self.cursor
        chosen: list[Choice] = []
        size = 0
        while size < self._least:
            if number != self._round:
                self._round, self._choices = number, self._shuffled(number)
            if place >= len(self._choices):
                number, place = number + 1, 0
                continue
            task, group = self._choices[place]
            chosen.append((task, group))
            size += int(self._pools[task].start[group + 1] - self._pools[task].start[group])
            place += 1
        self.cursor = (number, place)
        return chosen

    def _shuffled(self, number: int) -> list[Choice]:
        rng = np.random.default_rng([self._seed, 4, number])
        first = len(next(iter(self._pools.values())))
        choices: list[Choice] = []
        for place, (task, pool) in enumerate(self._pools.items()):
            count = len(pool) if place == 0 else min(len(pool), self._wanted(len(pool), first))
            choices += [(task, group) for group in rng.permutation(len(pool))[:count].tolist()]
        return [choices[row] for row in rng.permutation(len(choices)).tolist()]

    def _wanted(self, groups: int, first: int) -> int:
        """How many of a further task's groups a round wants, there being `first` of the first task."""
        if self._temperature is None:
            return round(self._share * first)
        return max(1, round(first * (groups / first) ** (1 / self._temperature)))
