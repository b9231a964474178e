"""The world's defaults were frozen before any model was trained on them (2026-11-22); a change of either hash is a new world."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from retrieval.data.schema import EVENT_COLUMNS
from retrieval.data.world import Law, World, WorldSettings, make_world

SETTINGS_AND_LAW = "62045a5df0a00dc8a61a826669c131e2c2f29392289e9a6f74dd89713c028e3c"
SMALL_WORLD = "10d635a3930d7693e5d268d33ac1e8bfef7b6a502246d3e7ad1dcd8e2b427c93"


def world_hash(world: World) -> str:
    """Sha256 of every word, number and event; probabilities to six digits, since exp and log may differ in the last bit."""
    data, whole = world.dataset, hashlib.sha256()
    words = (data.items.item_id, data.items.title, data.items.text, data.items.category, data.items.creator)
    for column in (*words, data.members.member_id, *data.members.profile.values()):
        whole.update("\0".join(column).encode())
    for name in EVENT_COLUMNS:
        column = getattr(data.events, name)
        whole.update(np.nan_to_num(column.astype("f8")).astype("i8").astype("<i8").tobytes())
    whole.update(np.round(world.truth.p_label * 1e6).astype("<i8").tobytes())
    return whole.hexdigest()


def test_the_defaults_are_those_that_were_frozen() -> None:
    assert hashlib.sha256(repr((WorldSettings(), Law())).encode()).hexdigest() == SETTINGS_AND_LAW


def test_the_generator_makes_the_world_that_it_made_then() -> None:
    world = make_world(replace(WorldSettings(), members=150, items=200, days=12))
    assert world_hash(world) == SMALL_WORLD
