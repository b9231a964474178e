from __future__ import annotations

import gc
import weakref

from retrieval.memory import freeze_loaded


class _Node:
    other: _Node


def _ring() -> weakref.ref[_Node]:
    one, two = _Node(), _Node()
    one.other, two.other = two, one
    return weakref.ref(one)


def test_what_is_there_is_left_alone_and_what_comes_is_still_collected() -> None:
    gc.disable()
    try:
        before = _ring()
        held = [[] for _ in range(1_000)]  # type: ignore[var-annotated]
        freeze_loaded()
        assert before() is None, "garbage is not frozen"
        assert gc.get_freeze_count() > len(held) and not any(one is held for one in gc.get_objects())
        after = _ring()
        assert gc.collect() and after() is None
    finally:
        gc.unfreeze()
        gc.enable()
