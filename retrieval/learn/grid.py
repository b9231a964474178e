"""Experiment files: one default, some factors, some data sets and seeds, and from them the runs to do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from index.errors import BrewlineError
from retrieval.learn.plan_file import read_plan

Factors = dict[str, list[Any] | dict[str, dict[str, Any]]]
JUDGED_BY = {"counts": "live", "dims": None}
"""Settings that decide how a model is judged and not how it is trained, with their defaults."""
BASE = "base"


class ExperimentError(BrewlineError):
    """An experiment file or its results cannot be used."""


@dataclass(frozen=True)
class Run:
    """One cell of the table: `settings` by flat name (`retrieval.learn.settings` or, of a ranker, `ranking.learn.settings`; and
    `JUDGED_BY`), the seed among them."""

    data: str
    factor: str
    value: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def words(self) -> str:
        """The run as people call it."""
        return f"{self.data} seed {self.seed} {self.factor}{self.value and f'={self.value}'}"


@dataclass(frozen=True)
class Experiment:
    """What a file asks for. `kind`: what is trained and judged. `data` name -> folder; `base` the settings of the default; each
    of `factors` lists values of the setting of its name, or maps labels to settings. `design`: one factor at a time from the
    default, or their product.

    One of `steps` and `minutes` says how long each training is. `speed`: floating point operations per second that this machine
    is thought to do; only the predicted cost asks for it, and only until there are rows to predict from.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    out: Path
    data: dict[str, Path]
    seeds: list[int]
    base: dict[str, Any] = field(default_factory=dict)
    factors: Factors = field(default_factory=dict)
    design: Literal["one_factor", "product"] = "one_factor"
    steps: int | None = None
    minutes: float | None = None
    speed: float = 2e10
    kind: Literal["encoder", "ranker"] = "encoder"

    @classmethod
    def read(cls, path: Path) -> Experiment:
        """The experiment of a YAML file. Raises ExperimentError with what was seen and what was expected."""
        found = read_plan(path, cls, ExperimentError)
        if (found.steps is None) == (found.minutes is None):
            raise ExperimentError(f"{path}: give one of steps and minutes, the length of each training")
        for name, value in (("steps", found.steps), ("minutes", found.minutes), ("speed", found.speed)):
            if value is not None and not 0 < value < math.inf:
                raise ExperimentError(f"{path}: {name} is {value:g}; expected a number above 0")
        if not found.seeds or not found.data:
            raise ExperimentError(f"{path}: no seeds or no data; there is nothing to run")
        return found

    def runs(self) -> Iterator[Run]:
        """Every cell, seed by seed, so that an early end leaves one seed of everything. Cells that say the same stand twice."""
        for seed, data, (factor, value, changed) in itertools.product(self.seeds, self.data, self.cells()):
            length = {"steps": self.steps, "minutes": self.minutes}
            yield Run(data, factor, value, seed, {**JUDGED_BY, **length, **self.base, **changed, "seed": seed})

    def cells(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(factor, value, settings that differ from the default) in the order of the file, the default first."""
        choices = {name: _choices(name, values) for name, values in self.factors.items()}
        if self.design == "one_factor":
            alone = [(name, label, changed) for name, values in choices.items() for label, changed in values.items()]
            return [(BASE, "", {}), *alone]
        names = ", ".join(choices)
        return [
            (
                names,
                ", ".join(labels),
                {key: held for name, label in zip(choices, labels) for key, held in choices[name][label].items()},
            )
            for labels in itertools.product(*choices.values())
        ]


def _choices(name: str, values: list[Any] | dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if isinstance(values, dict):
        return values
    return {str(value): {name: value} for value in values}
