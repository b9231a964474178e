"""What one process wrote is in every later answer of those that follow it, also where a look takes long."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from index import live
from index.live import FOLLOW_S, LiveIndex


def test_a_change_written_during_a_slow_look_is_in_the_next_one(
    make_snapshot, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look reads the log, and before it has shown what it read something else is written and acknowledged."""
    snapshot = make_snapshot(vectors=np.eye(4, dtype=np.float32))
    read = live._batches

    def slow(reader):
        found = read(reader)
        if writer.view().position < 2:
            writer.withdraw([f"item-{writer.view().position}"])
            time.sleep(FOLLOW_S)
        return found

    with LiveIndex(snapshot, store, write=True) as writer:
        monkeypatch.setattr(live, "_batches", slow)
        with LiveIndex(snapshot, store) as follower:  # reads nothing; item-0 is withdrawn meanwhile
            assert follower.view().rows(["item-0", "item-1"]).tolist() == [-1, 1]  # reads that; item-1 is
            assert follower.view().rows(["item-0", "item-1"]).tolist() == [-1, -1]
