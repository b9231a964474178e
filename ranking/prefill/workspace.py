"""Buffers that live from layer to layer and from request to request: fresh memory costs more than the sums done in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Named flat buffers that only grow. What a name held before is overwritten; not safe for concurrent use."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor over the name's memory, contents undefined."""
        last = self._last.get(name)
        if last is not None and last.shape == shape and last.dtype == dtype and last.device == device:
            return last  # most blocks are like the one before, and two views cost as much as a small sum
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size or flat.dtype != dtype or flat.device != device:
            flat = self._flat[name] = torch.zeros(size, dtype=dtype, device=device)
        made = self._last[name] = flat[:size].view(shape)
        return made

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat.values())
