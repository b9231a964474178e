"""Settings by one flat name each, as flags and experiment files give them, become a checked plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.start import EncoderPlan

PLACES = {
    "numbers": ("quantizer",),
    **{name: (name,) for name in ("steps", "minutes", "seed", "base", "lora_rank", "learning_rate")},
    **{name: (name,) for name in ("warm_words", "fit_entries", "validation", "history", "device", "clock")},
    **{name: ("size", name) for name in ("hidden", "layers", "heads", "kv_heads", "mlp", "vocabulary")},
    **{f"{name}_tokens": ("budgets", name) for name in ("item", "entry", "profile")},
    "history_tokens": ("budgets", "member"),
    "whole_entries": ("budgets", "whole_entries"),
    **{name: ("batch", name) for name in ("targets", "targets_per_member", "hard", "hard_from", "hard_weight")},
    **{name: ("batch", name) for name in ("random_items", "popular", "strangers")},
    **{name: ("batch", name) for name in ("mine_every", "mine_skip", "mine_window", "recency_days", "share")},
    **{name: ("loop", name) for name in ("loss", "near", "matryoshka", "pooling", "forward_tokens", "cached", "recompute")},
    **{name: ("loop", name) for name in ("precision", "shard", "first_scale", "warmup", "weight_decay", "clip")},
}
"""Flat name -> where it stands in an `EncoderPlan`. `history_tokens` is the whole member row, profile included."""


def plan_of(settings: Mapping[str, object]) -> EncoderPlan:
    """The plan with these settings and defaults for all others; heads and MLP follow the width unless they are given.

    Raises TrainingError naming the setting that is unknown or has a value that it cannot have.
    """
    unknown = sorted(set(settings) - set(PLACES))
    if unknown:
        raise TrainingError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(PLACES))}")
    nested = asdict(EncoderPlan())
    for name, value in {**_shape(settings), **_entries(settings), **settings}.items():
        *outer, last = PLACES[name]
        (nested[outer[0]] if outer else nested)[last] = value
    try:
        plan = TypeAdapter(EncoderPlan).validate_python(nested)
    except ValidationError as error:
        seen = error.errors()[0]
        where = {".".join(place): name for name, place in PLACES.items()}.get(".".join(map(str, seen["loc"][:2])), "")
        name = where or next(name for name, place in PLACES.items() if place[0] == seen["loc"][0])
        raise TrainingError(f"setting {name} is {seen['input']!r}: {seen['msg'][0].lower()}{seen['msg'][1:]}") from error
    _check(plan)
    return plan


def _shape(settings: Mapping[str, object]) -> dict[str, object]:
    hidden = settings.get("hidden")
    if not isinstance(hidden, int):
        return {}
    return {"heads": max(2, hidden // 32), "kv_heads": max(1, hidden // 64), "mlp": 3 * hidden}


def _entries(settings: Mapping[str, object]) -> dict[str, object]:
    """Who says how long an entry is does not want it fitted."""
    return {"fit_entries": False} if {"entry_tokens", "whole_entries"} & set(settings) else {}


def _check(plan: EncoderPlan) -> None:
    """Raises TrainingError for values that types cannot refuse."""
    loop, batch = plan.loop, plan.batch
    wrong = {
        "matryoshka": any(dims < 1 for dims in loop.matryoshka)
        or (plan.base is None and max(loop.matryoshka, default=0) >= plan.size.hidden),
        "steps": plan.steps is not None and plan.steps < 1,
        "clock": plan.clock == "processor" and plan.device != "cpu",
        "validation": not plan.validation and (plan.steps is None or plan.learning_rate is None),
        "near": loop.near is not None and not 0 < loop.near <= 1,
        "hard": batch.hard < 0 or batch.hard_weight <= 0 or batch.mine_every < 1 or batch.mine_skip < 0 or batch.mine_window < 1,
        "share": not 0 < batch.share <= 1,
        "popular": not 0 <= batch.popular <= 1,
        "strangers": batch.strangers < 0,
        "recency_days": batch.recency_days is not None and batch.recency_days <= 0,
        "targets": min(batch.targets, batch.targets_per_member, batch.random_items, loop.forward_tokens) < 1,
        "item_tokens": min(plan.budgets.item, plan.budgets.entry, plan.budgets.profile) < 2,
        "history_tokens": plan.budgets.member <= plan.budgets.profile,
    }
    expected = {
        "matryoshka": "lengths below the model's width",
        "steps": "at least one",
        "clock": "processor time only where the processor does the work, on the device cpu",
        "validation": "a run that chooses steps and learning_rate, unless both are given",
        "near": "a cosine above 0 and at most 1",
        "hard": "0 or more of a weight above 0, mined every step or less often, from at least one place",
        "share": "above 0 and at most 1",
        "popular": "from 0 to 1",
        "strangers": "0 or more",
        "recency_days": "more than 0 days",
        "targets": "at least one target, one random item and one token in a pass",
        "item_tokens": "at least two tokens",
        "history_tokens": "more tokens than the profile's",
    }
    found = [f"{name} (expected {expected[name]})" for name, bad in wrong.items() if bad]
    if found:
        raise TrainingError(f"settings out of range: {'; '.join(found)}")
