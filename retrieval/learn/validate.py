"""The validation run of an encoder: learning rate and length are chosen on what lies between the cuts, from what lies before.

Of all steps `VALIDATION_SHARE` go here, of these `TRIAL_SHARE` to the trials of learning rates. Everything but the number of
steps that fit into some minutes follows from data, plan and seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import Encoder, Pooling
from retrieval.evidence.protocol import EvidenceError, Queries, last_after_cut, member_views
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.choose import Progress, Trials, try_rates
from retrieval.learn.clock import clock_of
from retrieval.learn.loop import SPEED_STEPS, seconds_per_step
from retrieval.learn.ranks import Ranks
from retrieval.learn.start import EncoderPlan, start
from retrieval.learn.train import Trainer
from retrieval.learn.whole import whole_views
from retrieval.records import NEWEST
from retrieval.writer import Writer

VALIDATION_SHARE = 0.35
"""Share of all steps that goes to trials and validation run; the refit gets the rest."""
VALIDATION_QUERIES = 400
VALIDATION_DAYS = 3
LOOKS = (0.6, 1.0)
"""Shares of the validation run at which recall is read."""
WORTH = 0.02
"""Recall by which another rate or an earlier look must be better to be taken: with VALIDATION_QUERIES queries less is noise."""
RATES = (0.5, 1.0, 2.0)
"""Learning rates that are tried, as multiples of the default."""
TRIAL_SHARE = 0.2
"""Share of the validation steps that goes to the trials together: a quarter of what is left to the run itself."""
TRIAL_LEAST = 20
"""Steps below which a trial would tell nothing about a rate: then the default is taken untried."""
LEAST_STEPS = 10

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Decision:
    """What the refit is to be: `trials` learning rate -> Recall@100, `validation` steps of the validation run -> Recall@100 (both
    empty where nothing was asked or tried)."""

    steps: int
    learning_rate: float
    trials: dict[float, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)


def decide(
    dataset: Dataset, plan: EncoderPlan, identity: Mapping[str, object], report: Progress
) -> tuple[Decision, Trainer | None]:
    """The decision, and the trainer at the end of the validation run (None if the data asks nothing between the cuts)."""
    if plan.steps is None and plan.minutes is None:
        raise TrainingError("neither steps nor minutes were given; say how long to train")
    if not plan.validation:
        assert plan.steps is not None
        return Decision(plan.steps, plan.rate), None
    queries = validation_queries(dataset)
    if queries is None:
        return Decision(int(Ranks.here().agreed(plan.steps or _affordable(dataset, plan, None, None, 0.0))), plan.rate), None
    clock = clock_of(plan.clock)
    began = clock()
    first = start(dataset, dataset.meta.cut_valid, plan, 1, identity)
    prepared = clock() - began
    exam = Exam(dataset, first.sampler.writer, queries, plan.loop.pooling)
    affordable = plan.steps or _affordable(dataset, plan, first, exam, prepared + clock() - began)
    steps = int(first.ranks.agreed(affordable))
    total = max(1, round(steps * VALIDATION_SHARE / (1 - VALIDATION_SHARE)))
    rate, trials, spent = plan.rate, dict[float, float](), 0
    if plan.learning_rate is None and plan.base is None:
        how = Trials(RATES, TRIAL_SHARE, TRIAL_LEAST, WORTH)
        rate, trials, spent = try_rates(first, total, rate, how, lambda one: exam.recall(one.model, last_day=True), report)
    trainer = first.again(total - spent, rate)
    found: dict[int, float] = {}
    for look in LOOKS if plan.steps is None else LOOKS[-1:]:
        until = max(1, round(look * trainer.steps))
        trainer.run(until, lambda done, of: report("validate", done, of))
        found[until] = exam.recall(trainer.model)
    best = max(found, key=lambda step: found[step])
    if found[best] > found[trainer.steps] + WORTH:
        steps = max(1, round(best * steps / trainer.steps))
    return Decision(steps, rate, trials, found), trainer


class Exam:
    """Questions of some days, written out as id rows once: a look at recall then costs the encoding alone.

    The rows belong to one writer; the weights may change from look to look.
    """

    def __init__(self, dataset: Dataset, writer: Writer, queries: Queries, pooling: Pooling = "mean") -> None:
        self.queries, self._pooling = queries, pooling
        self._writer = writer
        self._days: list[tuple[Ints, list[list[int]], list[list[int]]]] = []
        counts = Counts.from_dataset(dataset, dataset.meta.cut_test)
        records = [dataset.items[row] for row in range(len(dataset.items))]
        for day in np.unique(queries.day).tolist():
            asked = np.flatnonzero(queries.day == day)
            mine = queries.take(asked)
            views = whole_views(dataset, mine) if writer.whole else member_views(dataset, mine, newest=NEWEST)
            self._days.append((asked, writer.items(records, counts.as_of(day * DAY)), writer.members(views)))

    @property
    def days(self) -> int:
        """How many days ask."""
        return len(self._days)

    def recall(self, model: PreTrainedModel, *, last_day: bool = False) -> float:
        """Mean Recall@100 with live counts over the queries (of the last day only), whole catalogue, history excluded.

        Equal scores (and no numbers) count against the target: weights that a rate has wrecked must not look good.
        Of several processes the first decides.
        """
        encoder = Encoder(model, self._writer, "", {"pooling": self._pooling})
        recalls: list[float] = []
        for asked, items, members in self._days[-1:] if last_day else self._days:
            scores = encoder.embed(members) @ encoder.embed(items).T
            for row, query in enumerate(asked.tolist()):
                scores[row, self.queries.excluded[query]] = -np.inf
                own = scores[row, self.queries.targets[query]]
                recalls.append(float((scores.shape[1] - (scores[row] < own[:, None]).sum(1) <= 100).mean()))
        return Ranks.here().agreed(float(np.mean(recalls)))


def validation_queries(dataset: Dataset) -> Queries | None:
    """Queries of a few days of the validation window; None where it asks nothing or nothing comes before it."""
    if not (dataset.engagements.timestamp < dataset.meta.cut_valid).any():
        return None
    try:
        queries = last_after_cut(dataset, "valid")
    except EvidenceError:
        return None
    days = np.unique(queries.day)
    kept = days[np.linspace(0, len(days) - 1, min(VALIDATION_DAYS, len(days))).round().astype(int)]
    return queries.take(np.flatnonzero(np.isin(queries.day, kept))).sample(VALIDATION_QUERIES)


def _affordable(dataset: Dataset, plan: EncoderPlan, first: Trainer | None, exam: Exam | None, prepared: float) -> int:
    """Steps of the refit that fit into the minutes, with `prepared` seconds of all preparations and every look counted in.

    `first` is the start of the validation run and `exam` its questions; both are missing where there is no such run.
    """
    assert plan.minutes is not None
    clock = clock_of(plan.clock)
    began = clock()
    trainer = first.again(1_000, plan.rate) if first else start(dataset, dataset.meta.cut_test, plan, 1_000)
    trainer.run(1)  # the first step pays for what is done once
    ready = clock()
    each = seconds_per_step(trainer, clock)
    if exam is None:
        return max(LEAST_STEPS, int((plan.minutes * 60 - 2 * (ready - began)) / each))
    looked = clock()
    exam.recall(trainer.model, last_day=True)
    look = clock() - looked
    trials = len(RATES) if plan.learning_rate is None and plan.base is None else 0
    looks = 1 + trials + len(LOOKS) * exam.days
    left = plan.minutes * 60 - prepared - (ready - began) - SPEED_STEPS * each - looks * look
    return max(LEAST_STEPS, int(left / each * (1 - VALIDATION_SHARE)))
