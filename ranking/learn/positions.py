"""Where an item stood is a reason of its own for a click: it is learned beside the ranker and left out of what is served.

    logit in training  =  text(member, item)  +  place(surface, bucket of the position)            served: text alone

Position as the input of a shallow tower (Zhao et al. 2019, YouTube; PAL, Guo et al. 2019, multiplies instead), the tower being
a table of one number per place, buckets of log2(position + 1). The words never see a position, so nothing is left in them to
take out. The numbers are centred over the impressions: the served score is that of the mean shown place. All tasks share them,
for what a place decides is whether an item is looked at, whatever is done then, and most tasks are asked too seldom to say; where
the question is who says no, they count the other way round. Only impressions count: that a position is known of a click alone
would be an answer, not a place.

What is fitted after the text model needs the same correction. A log that shows the best on top lets every score that goes with
goodness also stand for the place, so a calibrator on raw labels is too steep, and the weights of late fusion and its trees are
those of (item and place). All of them are fitted on what a label is expected to be at the mean place: the label times
P(yes at the mean place) / P(yes where it stood), the inverse propensity weight of the examination model. Metrics keep raw labels,
and so do the counts that prompts and trees read: a click rate in a prompt is still one of the places where the item stood.

Legend: E events, n candidates, C cells (surface, bucket).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict
from torch import Tensor

from ranking.calibrate import ENOUGH, logistic, sigmoid
from ranking.learn.batches import Batch
from ranking.learn.examples import Ints, Pool
from ranking.tasks import Task
from retrieval.data.schema import IMPRESSION, Dataset

BUCKETS = 16
"""Positions are below 2^15."""
RECENT = 2.0
"""Steps in multiples of Newton's: what was learned at step k weighs about k^(RECENT - 1), for a third more noise in variance."""
WORDS_FIRST = 0.3
"""Share of the steps before the table moves. What words and places could both explain belongs to the words, which learn more
slowly: on a toy of 250 steps a table that moved from the start cost .012 and .016 AUC (two seeds), this one 0 and .004."""
HEAVIEST = 10.0
"""The most that a click at a bad place counts: beyond it a few clicks would decide."""

Answers = npt.NDArray[Any]
"""Labels, whole or as they are expected to be elsewhere."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PositionSettings:
    """Whether positions are taken out where impressions have them. `ridge`: evidence that a place needs to be half believed, as a
    sum of p (1 - p): 20 are about 170 impressions of which one in seven is clicked."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    on: bool = True
    ridge: float = 20.0


@dataclass(frozen=True)
class Places:
    """The cells of a training: `cell` int64 [E] of each event (-1: no impression, or at a place that training never saw), `names`
    (surface, bucket) and `shown` int64 [C], how many candidates stood there; `signs` task -> 1, or -1 if it asks who says no."""

    settings: PositionSettings
    cell: Ints
    names: Sequence[tuple[str, int]]
    shown: Ints
    signs: Mapping[str, float]

    def of(self, task: str, event: Ints) -> tuple[Ints, float]:
        """The cells int64 [n] of events as a task's candidates, -1 for none, and the task's sign."""
        if task not in self.signs or not len(event):
            return np.full(len(event), -1, np.int64), 1.0
        return np.where(event >= 0, self.cell[event], -1), self.signs[task]


def applies(dataset: Dataset, settings: PositionSettings) -> bool:
    """Whether there are impressions with positions to learn from, and somebody wants it."""
    return settings.on and bool((_spots(dataset) >= 0).any())


def places_of(
    dataset: Dataset, pools: Mapping[str, Pool], tasks: Mapping[str, Task], settings: PositionSettings
) -> Places | None:
    """The places of the candidates of some pools; None where they stood at fewer than two, or nobody wants it."""
    if not applies(dataset, settings):
        return None
    signs = {name: 1.0 if tasks[name].label else -1.0 for name in pools if tasks[name].asks != "engage"}
    event = np.concatenate([np.zeros(0, np.int64), *(pools[name].event for name in signs)])
    spot = _spots(dataset)
    stood = spot[event[event >= 0]]
    found, shown = np.unique(stood[stood >= 0], return_counts=True)
    if len(found) < 2:
        return None
    surfaces = ("", *dataset.events.surfaces)
    names = [(surfaces[one // BUCKETS], one % BUCKETS) for one in found.tolist()]
    cell = np.where(np.isin(spot, found), np.searchsorted(found, spot), -1)
    return Places(settings, cell, names, shown, signs)


def _spots(dataset: Dataset) -> Ints:
    """Int64 [E]: surface and bucket of each impression with a position, -1 of everything else."""
    log = dataset.events
    shown = log.actions.index(IMPRESSION) if IMPRESSION in log.actions else -1
    there = (log.action == shown) & (log.position >= 0)
    bucket = np.floor(np.log2(np.maximum(log.position, 0).astype(np.float64) + 1)).astype(np.int64)
    return np.where(there, (log.surface.astype(np.int64) + 1) * BUCKETS + bucket, -1)


class Positions:
    """The table while it is learned. Its log-loss is the labels', whatever else the model's own loss asks for.

    Each step is one of Newton's with the curvature of all steps so far, so a cell moves by what is known of it and not by a
    learning rate; RECENT makes later steps count more, for the words are learned meanwhile and explain away more and more.
    """

    def __init__(self, places: Places, device: torch.device) -> None:
        """All places are alike at first."""
        self.places = places
        self._logit = torch.zeros(len(places.names), dtype=torch.float64, device=device)
        self._evidence = torch.full_like(self._logit, places.settings.ridge)
        self._share = torch.tensor(places.shown / places.shown.sum(), device=device)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Places that an earlier training knew, by its `training`, add from the first step what they added at its end."""
        known = _told(facts)
        logit = [known.get((surface, 2**bucket - 1), 0.0) for surface, bucket in self.places.names]
        self._logit = torch.tensor(logit, dtype=torch.float64, device=self._logit.device)

    def added(self, batch: Batch) -> Tensor:
        """What their places add to the logits of a batch's candidates, float32 [n]; 0 where no place is known."""
        cell, sign = self._cells(batch)
        return torch.where(cell >= 0, sign * self._logit[cell.clamp(min=0)], 0.0).float()

    def learn(self, batch: Batch, logits: Tensor, label: Tensor) -> None:
        """The table knows one step more: `logits` [n] with what places (and all else) added, `label` [n]."""
        cell, sign = self._cells(batch)
        known, said = cell >= 0, logits.detach().double().sigmoid()
        wrong = torch.zeros_like(self._logit).index_add(0, cell[known], (sign * (said - label))[known])
        self._evidence = self._evidence.index_add(0, cell[known], (said * (1 - said))[known])
        moved = self._logit - RECENT * wrong / self._evidence
        self._logit = moved - (self._share * moved).sum()

    def _cells(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cells int64 [n] of a batch's candidates, -1 for none, and the signs float64 [n] of their tasks."""
        sizes = [len(one.items) for one in batch.requests]
        parts = [self.places.of(task, event) for task, event in zip(batch.tasks, np.split(batch.event, np.cumsum(sizes)[:-1]))]
        cell, sign = np.concatenate([part for part, _ in parts]), np.repeat([one for _, one in parts], sizes)
        return torch.from_numpy(cell).to(self._logit.device), torch.from_numpy(sign).to(self._logit.device)

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint must hold."""
        return {"logit": self._logit.tolist(), "evidence": self._evidence.tolist()}

    def restore(self, held: Mapping[str, Sequence[float]]) -> None:
        """The table is as `state` said."""
        exact = (torch.tensor(held[name], dtype=torch.float64) for name in ("logit", "evidence"))
        self._logit, self._evidence = (one.to(self._logit.device) for one in exact)

    def shifts(self, task: str, event: Ints) -> Floats:
        """What their places add to the logits of a task's candidates, float64 [n]."""
        cell, sign = self.places.of(task, event)
        return np.where(cell >= 0, sign * self._logit.cpu().numpy()[cell], 0.0)

    def curve(self) -> list[dict[str, object]]:
        """The table for people and for the model folder."""
        rows = zip(self.places.names, self.places.shown.tolist(), self._logit.tolist())
        return [
            {
                "surface": surface,
                "first": 2**bucket - 1,
                "last": 2 ** (bucket + 1) - 2,
                "shown": count,
                "logit": round(logit, 5),
            }
            for (surface, bucket), count, logit in rows
        ]

    def facts(self) -> dict[str, object]:
        """What a ranker's folder says of the correction."""
        return {"ridge": self.places.settings.ridge, "curve": self.curve()}


def at_mean_place(scores: npt.NDArray[np.floating], label: npt.NDArray[np.integer], shift: Floats) -> Answers:
    """What labels [n] are expected to be at the mean place, given a model's raw scores [n] and what their places add [n].

    Score and place are weighed on these labels first: a model that is too sure of itself must not bend the ratio.
    """
    good = float(label.sum(dtype=np.float64))
    if not shift.any() or min(good, len(label) - good) < ENOUGH:
        return label
    s, y = np.asarray(scores, np.float64), label.astype(np.float64)
    design = np.column_stack([s, shift, np.ones_like(s)])
    a, c, b = logistic(design, y, np.full(3, 1e-6 * len(s)), np.array([1.0, 1.0, 0.0]))
    return y * _ratio(a * s + b, c * shift)


def at_mean_place_alone(label: npt.NDArray[np.integer], base: float, shift: Floats) -> Floats:
    """The same for labels [n] of which no score is known: all answers are thought as likely as `base`."""
    return label * _ratio(np.full(len(label), np.log(base / (1 - base))), shift)


def _ratio(logit: Floats, shift: Floats) -> Floats:
    return np.minimum(sigmoid(logit) / np.maximum(sigmoid(logit + shift), 1e-9), HEAVIEST)


def known_shifts(dataset: Dataset, facts: Mapping[str, Any], task: Task, event: Ints) -> Floats:
    """`Positions.shifts` float64 [n] of a ranker that was trained before, by its `training`; 0 if it took nothing out."""
    known = _told(facts) if task.asks != "engage" else {}
    spot, names = np.where(event >= 0, _spots(dataset)[event], -1), ("", *dataset.events.surfaces)
    stood = [(names[one // BUCKETS], 2 ** (one % BUCKETS) - 1) if one >= 0 else ("", -1) for one in spot.tolist()]
    return np.array([known.get(one, 0.0) for one in stood]) * (1.0 if task.label else -1.0)


def _told(facts: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    """What a ranker's `training` says that places add, by surface and first position."""
    curve = facts.get("positions", {}).get("curve", ())
    return {(row["surface"], int(row["first"])): float(row["logit"]) for row in curve}
