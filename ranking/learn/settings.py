"""Settings of a ranker's training by their dotted names, for those that have no flag of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ranking.learn.start import RankerPlan
from retrieval.learn.checkpoint import TrainingError

GROUPS = ("layout", "groups", "loop", "budgets", "size")
"""Parts of a plan whose settings can be named, as in `layout.grouped=true`."""


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
    try:
        return TypeAdapter(RankerPlan).validate_python(content)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise TrainingError(f"--set: {said}") from error
