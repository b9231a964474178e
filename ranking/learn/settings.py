"""Settings of a ranker's training by name: those without a flag of their own, and all of them for experiment and stage files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ranking.learn.start import RankerPlan
from retrieval.learn.checkpoint import TrainingError

GROUPS = ("layout", "groups", "loop", "budgets", "size", "positions")
"""Parts of a plan whose settings can be named, as in `layout.grouped=true`."""
ELSEWHERE = (*GROUPS, "tasks")
"""Fields of a plan that are no single setting."""


def plan_of(settings: Mapping[str, object]) -> RankerPlan:
    """The plan with these settings, NAME or PART.NAME, and defaults for all others; one of steps and minutes says how long.

    Raises TrainingError naming the setting that is unknown or has a value that it cannot have.
    """
    content = {**asdict(RankerPlan()), "minutes": None}
    alone = [one.name for one in fields(RankerPlan) if one.name not in ELSEWHERE]
    known = [*alone, *(f"{part}.{name}" for part in GROUPS for name in content[part])]
    if unknown := sorted(set(settings) - set(known)):
        raise TrainingError(f"unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
    for name, value in settings.items():
        part, _, field = name.rpartition(".")
        (content[part] if part else content)[field] = value
    plan = _checked(content, "settings")
    if (plan.steps is None) == (plan.minutes is None):
        raise TrainingError(f"settings: steps is {plan.steps} and minutes is {plan.minutes}; give one of them")
    if not 0 < plan.share <= 1:
        raise TrainingError(f"settings: share is {plan.share:g}; expected above 0 and at most 1")
    return plan


def with_settings(plan: RankerPlan, pairs: Sequence[str]) -> RankerPlan:
    """The plan with PART.NAME=VALUE settings changed, values read as YAML. Raises TrainingError naming those there are."""
    if not pairs:
        return plan
    content = asdict(plan)
    for pair in pairs:
        name, _, value = pair.partition("=")
        part, _, field = name.partition(".")
        known: dict[str, Any] = content[part] if part in GROUPS else {}
        if field not in known:
            there = ", ".join(known) or ", ".join(f"{group}.NAME" for group in GROUPS)
            raise TrainingError(f"--set {pair}: there is no setting {name!r}; expected one of {there}")
        try:
            known[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise TrainingError(f"--set {pair}: {' '.join(str(error).split())}; expected PART.NAME=VALUE") from error
    return _checked(content, "--set")


def _checked(content: Mapping[str, Any], where: str) -> RankerPlan:
    try:
        plan = TypeAdapter(RankerPlan).validate_python(content)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise TrainingError(f"{where}: {said}") from error
    if wrong := _wrong(plan):
        raise TrainingError(f"{where}: {wrong}")
    return plan


def _wrong(plan: RankerPlan) -> str:
    """The first number that no training can have, in words; "" if there is none."""
    loop = {f"loop.{name}": value for name, value in asdict(plan.loop).items()}
    above = {"steps": plan.steps, "minutes": plan.minutes, "learning_rate": plan.learning_rate}
    above |= {"positions.ridge": plan.positions.ridge}
    above |= {name: loop[name] for name in ("loop.learning_rate", "loop.candidates", "loop.temperature")}
    for name, value in above.items():
        if value is not None and not 0 < value < math.inf:
            return f"{name} is {value:g}; expected a number above 0"
    for name, value in {"seed": plan.seed, "loop.others": loop["loop.others"]}.items():
        if not 0 <= value < math.inf:
            return f"{name} is {value:g}; expected 0 or more"
    return ""
