"""What a training's minutes are counted in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

Clock = Literal["wall", "processor"]


def clock_of(kind: Clock) -> Callable[[], float]:
    """Seconds that pass on the wall, or those that this process computed: what else a machine does costs nothing then, so that
    the cells of a table can cost the same on a machine that is shared."""
    return time.monotonic if kind == "wall" else processor_seconds


def processor_seconds() -> float:
    """Seconds that this process has spent computing, divided by torch's threads.

    The threads of a pass are all busy or all wait; what one thread prepares alone counts for a part of what it took."""
    return time.process_time() / torch.get_num_threads()
