"""What a chain of compressions is taught and judged on: one data set, one way of writing it, the same groups for every model.

    taught      every event before the test cut but those of the members that the teacher's refit held back in its newest days
    held back   those events, one group for each member and day: calibrators and gates
    test        the groups after the test cut, as fresh as served ones: the table, and nothing else

Legend: n candidates, D hidden dims.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from index.errors import BrewlineError
from ranking.calibrate import ENOUGH
from ranking.learn.batches import Batch, GroupWriter, Said
from ranking.learn.examples import GroupSettings, Pool, held_back, pools_of, taught
from ranking.learn.loop import Labels, answers, layers_of
from ranking.learn.positions import Answers, Places, PositionSettings, at_mean_place, known_shifts, places_of
from ranking.learn.validate import sampled
from ranking.prefill.request import Request
from ranking.ranker import Ranker
from ranking.shots_past import PastShots
from ranking.tasks import taught_of
from retrieval.data.schema import Dataset
from retrieval.learn.checkpoint import DATA, dataset_digest

GROUPS_PER_PASS = 32
TIMED = 2_000
"""Candidates that the speed of a model is measured on."""
MEMBERS = 2
"""What is judged is drawn by member, and fitted on other members than it is judged on."""

Raw = npt.NDArray[np.float32]


class NothingToJudge(BrewlineError):
    """A data folder has too few held-out answers to compare two models."""


class Scoring(Protocol):
    """What scores requests: the torch engine or an exported one."""

    label_ids: tuple[int, ...]

    def score(self, requests: Sequence[Request]) -> list[Raw]:
        """Logits float32 [N, labels] of each request's N items."""


@dataclass(frozen=True)
class Questions:
    """Groups of one task as a ranker is asked them, the answers int8 [n], members and events int64 [n]."""

    task: str
    requests: list[Request]
    label: npt.NDArray[np.int8]
    member: npt.NDArray[np.int64]
    event: npt.NDArray[np.int64]

    @classmethod
    def of(cls, writer: GroupWriter, pool: Pool, candidates: int, said: Said | None = None) -> Questions:
        """About that many candidates' groups of a pool, always the same ones, as they are served or as `said` puts them."""
        chosen = sampled(pool, candidates)
        batch = writer.write({pool.task: pool}, chosen, None if said is None else [said] * len(chosen))
        member = np.repeat([pool.member[group] for _, group in chosen], [len(one.items) for one in batch.requests])
        return cls(pool.task, batch.requests, batch.label.astype(np.int8), member.astype(np.int64), batch.event)

    @property
    def rarer(self) -> int:
        """How many answers there are of the rarer kind."""
        positives = int(self.label.sum(dtype=int))
        return min(positives, len(self.label) - positives)

    def scores(self, engine: Scoring, labels: Labels) -> Raw:
        """z_yes - z_no float32 [n]."""
        yes, no = (engine.label_ids.index(token) for token in labels[self.task])
        parts = []
        for first in range(0, len(self.requests), GROUPS_PER_PASS):
            logits = np.concatenate(engine.score(self.requests[first : first + GROUPS_PER_PASS]))
            parts.append(logits[:, yes] - logits[:, no])
        return np.concatenate(parts)

    def states(self, ranker: Ranker) -> Raw:
        """The states float32 [n, D] that the head of a model reads."""
        layers, found = layers_of(ranker.engine.model), []
        for first in range(0, len(self.requests), GROUPS_PER_PASS):
            some = self.requests[first : first + GROUPS_PER_PASS]
            with torch.no_grad():
                batch = Batch(some, [self.task] * len(some), np.zeros(0, np.float32))
                found.append(answers(layers, ranker.facts.labels, batch)[0].cpu().numpy())
        return np.concatenate(found)

    def items_per_second(self, engine: Scoring) -> float:
        """The speed of an engine that keeps no prefixes, on about TIMED candidates after a first request."""
        sizes = np.cumsum([len(one.items) for one in self.requests])
        some = self.requests[: int(np.searchsorted(sizes, TIMED)) + 1]
        engine.score(some[:1])
        began = time.perf_counter()
        engine.score(some)
        return sum(len(one.items) for one in some) / (time.perf_counter() - began)


@dataclass(frozen=True)
class Ground:
    """The parts of a data set as the module says; `held` by task, `main` the first task's name; `places` where the teacher took
    positions out (`ranking.learn.positions`), and by task what they add to the logits of the held-back candidates; `shots` is
    the most examples that stand before a group."""

    digest: str
    main: str
    labels: Labels
    writer: GroupWriter
    pools: Mapping[str, Pool]
    held: Mapping[str, Questions]
    test: Questions
    places: Places | None = None
    shifts: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    shots: int = 0

    @property
    def identity(self) -> dict[str, object]:
        """What decides the groups. Folders that do not name `shots` had none, or had them drawn from what came later."""
        return {DATA: self.digest, **({"shots": self.shots} if self.shots else {})}

    def expected(self, task: str, raw: Raw) -> Answers:
        """The held-back answers of a task that a calibrator of these raw scores [n] is fitted on: those at the mean place."""
        held = self.held[task]
        return at_mean_place(raw, held.label, self.shifts[task]) if task in self.shifts else held.label

    @property
    def asked(self) -> Questions:
        """The held-back groups of the main task."""
        return self.held[self.main]


def ground_of(dataset: Dataset, teacher: Ranker, judged: int) -> Ground:
    """The ground that a teacher's facts and a data set decide; `judged` candidates at most of each part that judges.

    Raises NothingToJudge where there is nothing to learn from, or one of the parts that judge is too thin.
    """
    training, meta = teacher.facts.training, dataset.meta
    try:
        seed = int(training["settings"]["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise NothingToJudge(
            f"the teacher does not say which members it held back (training.settings.seed: {error}); train it again"
        ) from error
    tasks, main = taught_of(teacher.tasks), next(iter(teacher.tasks))
    held = held_back(dataset, seed)
    count = max(map(len, teacher.prompts.shots.values()), default=0)
    writer = GroupWriter(dataset, teacher.prompts, tasks, meta.cut_test, PastShots(dataset, tasks, count, meta.cut_test))
    pools = taught(dataset, pools_of(dataset, tasks, None, meta.cut_test, GroupSettings(), seed), held)
    fresh = replace(GroupSettings(), least=1)
    window = pools_of(dataset, tasks, meta.cut_valid, meta.cut_test, fresh, seed)
    window = {name: pool.only(held[pool.member]) for name, pool in window.items()}
    asked = {name: Questions.of(writer, pool, judged) for name, pool in window.items() if len(pool)}
    end = int(dataset.events.timestamp.max(initial=meta.cut_test)) + 1  # a folder may have no events at all
    after = pools_of(dataset, {main: tasks[main]}, meta.cut_test, end, fresh, seed)
    test = {name: Questions.of(GroupWriter(dataset, teacher.prompts, tasks, end), pool, judged) for name, pool in after.items()}
    _check_parts(meta.name, {"held back between the cuts": asked.get(main), "after the test cut": test.get(main)})
    if main not in pools:
        raise NothingToJudge(f"{meta.name}: no answers to {main!r} that were not held back; a student could not learn it")
    known = training.get("positions")
    places = places_of(dataset, pools, tasks, PositionSettings(ridge=float(known["ridge"]))) if known else None
    shifts = {name: known_shifts(dataset, training, tasks[name], one.event) for name, one in asked.items()} if known else {}
    return Ground(dataset_digest(dataset), main, teacher.facts.labels, writer, pools, asked, test[main], places, shifts, count)


def _check_parts(name: str, parts: Mapping[str, Questions | None]) -> None:
    """Raises NothingToJudge unless every part has enough answers of both kinds, and members enough."""
    seen = {part: (one.rarer, len(np.unique(one.member))) if one else (0, 0) for part, one in parts.items()}
    if any(rarer < ENOUGH or members < MEMBERS for rarer, members in seen.values()):
        told = ", ".join(
            f"{rarer} answers of the rarer kind among {members} members {part}" for part, (rarer, members) in seen.items()
        )
        raise NothingToJudge(
            f"{name}: {told} (at least {ENOUGH} among {MEMBERS} in each); a step could not be judged. "
            "Move the cuts, or bring more events"
        )
