"""The simple models of a label that a ranker has to beat: rates, logistic regression, gradient boosting; and what none can beat.

"frozen": what is said of a test event stops at the test cut. "live": it stops at the start of the event's day. Classifiers are
fitted on the latest labelled events before the cut, each with features as of its own day. In a synthetic world the oracle knows
everything, and readers who are told part of the truth (`ranking.told`) say how far a log could take anyone; none is a rival.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from ranking.evaluate import Rows
from ranking.features import FeatureTable
from ranking.told import TOLD, Asked, told_features
from ranking.told_world import Told
from retrieval.data.schema import DAY, Dataset
from retrieval.data.world import Truth
from retrieval.evidence.baselines import Knowledge

Floats = npt.NDArray[np.float64]
KINDS: tuple[Knowledge, Knowledge] = ("frozen", "live")
FITTED_ON = 30_000
"""Labelled events that a classifier is fitted on at most."""
TOLD_DAYS = 6
"""Days before the cut whose labels a told reader is fitted on at most: each day is read anew."""
MOST_FOR_TOLD = 1_000_000
"""Labelled events from which on told readers would take hours."""

told = logging.getLogger(__name__)


class ExtraMissing(BrewlineError):
    """A part of the evaluation needs a library of the extra `evaluate`."""


class LabelTruth(Protocol):
    """A world that knows the true probability of each impression's label."""

    @property
    def event(self) -> npt.NDArray[np.int64]: ...
    @property
    def p_label(self) -> Floats: ...


@dataclass(frozen=True)
class Scored:
    """One baseline's probabilities float64 [E] for the rows to judge."""

    name: str
    knowledge: Knowledge
    probability: Floats


def simple_rankers(
    dataset: Dataset,
    rows: Rows,
    truth: LabelTruth | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    with_told: bool = False,
) -> list[Scored]:
    """Returns every baseline's probabilities, frozen and live, and the oracle's where the truth is known.

    `with_told` adds the readers who are told a part of a world's whole truth. Raises ExtraMissing without scikit-learn.
    """
    table = FeatureTable(dataset)
    base = np.full(len(rows), table.base_rate)
    found = [Scored("Base rate", "frozen", base)]
    train = _latest_labelled(table)
    models = _fitted(table, train)
    for done, knowledge in enumerate(KINDS):
        found += _of_knowledge(table, rows, models, knowledge)
        if progress is not None:
            progress(done + 1, len(KINDS))
    if with_told and isinstance(truth, Truth):
        found += _told(table, rows, train, truth, progress)
    if truth is not None:
        found.append(Scored("Oracle", "live", oracle(rows, truth)))
    return found


def as_of_days(dataset: Dataset, rows: Rows, knowledge: Knowledge) -> npt.NDArray[np.int64]:
    """Int64 [E]: the day at whose start a baseline's knowledge of each row ends."""
    if knowledge == "live":
        return dataset.events.timestamp[rows.event] // DAY
    return np.full(len(rows), dataset.meta.cut_test // DAY)


def _of_knowledge(table: FeatureTable, rows: Rows, models: Sequence[tuple[str, Any]], knowledge: Knowledge) -> list[Scored]:
    day = as_of_days(table.dataset, rows, knowledge)
    found = [
        Scored("Item rate", knowledge, table.rate("item", rows.item, day)[0]),
        Scored("Member rate", knowledge, table.rate("member", rows.member, day)[0]),
    ]
    if not models:
        return found
    features = table.features(rows.event, day)
    with _one_thread():
        return found + [Scored(name, knowledge, model.predict_proba(features)[:, 1].astype(np.float64)) for name, model in models]


def _told(
    table: FeatureTable, rows: Rows, train: npt.NDArray[np.int64], truth: Truth, progress: Callable[[int, int], None] | None
) -> list[Scored]:
    """The mean log odds of both classifiers on what each reader of `ranking.told` is told and what the simple baselines see, but
    for the vector of the text; none where the labels allow no classifier."""
    dataset, log = table.dataset, table.dataset.events
    train = train[log.day[train] > log.day[train].max(initial=0) - TOLD_DAYS]
    label = log.label[train]
    if not len(train) or label.min() == label.max():
        told.warning("no told readers are shown: the last %d days before the cut hold no two labels", TOLD_DAYS)
        return []
    if len(table.labelled) > MOST_FOR_TOLD:
        told.warning("no told readers are shown: reading %s labels would take hours", f"{len(table.labelled):,}")
        return []
    frozen = np.full(len(rows), dataset.meta.cut_test)
    parts = [
        Asked(train, log.day[train], log.timestamp[train]),
        Asked(rows.event, frozen // DAY, frozen),
        Asked(rows.event, log.day[rows.event], log.timestamp[rows.event]),
    ]
    known = told_features(Told(dataset, truth), Asked.joined(parts), progress)
    text = table.text_vectors.shape[1]
    numbers = np.concatenate([table.features(part.event, part.day) for part in parts])
    numbers = numbers[:, : numbers.shape[1] - text]
    found = []
    for name in TOLD:
        fitted, *judged = np.split(np.hstack([numbers, known[name]]), np.cumsum([len(part.day) for part in parts])[:-1])
        with _one_thread():
            models = [model.fit(fitted, label) for _, model in _classifiers()]
            odds = [np.mean([_log_odds(model.predict_proba(each)[:, 1]) for model in models], axis=0) for each in judged]
        found += [Scored(name, kind, 1 / (1 + np.exp(-each))) for kind, each in zip(KINDS, odds)]
    return found


def _log_odds(probability: Floats) -> Floats:
    held = np.clip(probability, 1e-9, 1 - 1e-9)
    return np.asarray(np.log(held / (1 - held)), np.float64)


def _one_thread() -> AbstractContextManager[object]:
    """Small trees on a busy machine: OpenMP threads that wait for each other made a fit of 4 s take 100 s."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

    limits: AbstractContextManager[object] = threadpool_limits(1)
    return limits


def _latest_labelled(table: FeatureTable) -> npt.NDArray[np.int64]:
    """Positions of the labelled events that classifiers are fitted on, in time order."""
    moment = table.dataset.events.timestamp[table.labelled]
    return table.labelled[moment < table.dataset.meta.cut_test][-FITTED_ON:]


def _fitted(table: FeatureTable, train: npt.NDArray[np.int64]) -> list[tuple[str, Any]]:
    """The classifiers, fitted; none if the training events know one label only."""
    label = table.dataset.events.label[train]
    if not len(train) or label.min() == label.max():
        return []
    features = table.features(train, table.dataset.events.timestamp[train] // DAY)
    models = _classifiers()
    with _one_thread():
        return [(name, model.fit(features, label)) for name, model in models]


def _classifiers() -> list[tuple[str, Any]]:
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ExtraMissing(
            "The ranking baselines need scikit-learn, which is not installed: pip install 'brewline[evaluate]'."
        ) from error
    boosting = HistGradientBoostingClassifier(
        max_iter=200, learning_rate=0.06, max_leaf_nodes=31, min_samples_leaf=40, l2_regularization=1.0, random_state=0
    )
    return [
        ("Logistic regression", make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))),
        ("Gradient boosting", boosting),
    ]


def oracle(rows: Rows, truth: LabelTruth) -> Floats:
    """Returns the true probability of each row's label; rows that the truth does not know raise BrewlineError."""
    order = np.argsort(truth.event)
    known = truth.event[order]
    at = np.minimum(np.searchsorted(known, rows.event_id), max(len(known) - 1, 0))
    missing = len(rows) if not len(known) else int((known[at] != rows.event_id).sum())
    if missing:
        raise BrewlineError(f"The truth of this world does not know {missing} of {len(rows)} labelled events; make it anew.")
    return np.asarray(truth.p_label[order][at], np.float64)
