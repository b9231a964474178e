"""Keys and values of member prefixes, kept across requests and reused where a new prefix begins like an old one.

A prefix is cut into blocks of 64 tokens, each named by a hash of all tokens up to its end, so the longest known beginning is
found block by block, and within the last block by comparing tokens. A member with two new events reuses all of yesterday's
history; another member of the same task reuses the instruction. The chain of hashes starts with the model's revision.

Legend: P prefix tokens, G key heads, D dims of a head.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK = 64
SHARING = 8
"""Entries with one beginning that are remembered under its name, newest first; more are found by their whole prefix only."""

Ints = npt.NDArray[np.int64]


@dataclass(eq=False)
class Keys:
    """Keys (after rotation) and values of the first `length` tokens of a prefix: tensor [layers, 2, capacity, G, D]."""

    tensor: Tensor
    tokens: Ints
    length: int = 0
    pins: int = 0
    names: tuple[bytes, ...] = field(default=())

    @classmethod
    def empty(cls, tokens: Ints, layers: int, capacity: int, heads: int, dims: int, like: Tensor) -> Keys:
        """Room for `tokens`, nothing computed yet."""
        return cls(torch.empty(layers, 2, capacity, heads, dims, dtype=like.dtype, device=like.device), tokens)

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [capacity, G, D]."""
        return self.tensor[number, 0], self.tensor[number, 1]

    def pair(self, number: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [P, G, D] of what is computed."""
        return self.tensor[number, 0, : self.length], self.tensor[number, 1, : self.length]

    def begin_like(self, other: Keys, length: int) -> None:
        """The first `length` tokens are those of `other`, keys and values copied."""
        self.tensor[:, :, :length] = other.tensor[:, :, :length]
        self.length = length

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.numel() * self.tensor.element_size()


@dataclass
class CacheStats:
    """Counts since the engine was made: prefixes found whole (hits), in part (partial), not at all (misses); tokens reused and
    computed; bytes held now and evicted so far (entries that a longer one replaced included)."""

    hits: int = 0
    partial: int = 0
    misses: int = 0
    tokens_reused: int = 0
    tokens_computed: int = 0
    bytes: int = 0
    evicted_bytes: int = 0


class PrefixCache:
    """Prefixes within a budget of bytes, least recently used out first, none while it is pinned. Safe for concurrent calls."""

    def __init__(self, budget: int, revision: str) -> None:
        """`budget` 0 keeps nothing. `revision` names the weights and their precision."""
        self.budget, self._stats = budget, CacheStats()
        self._root = hashlib.sha256(revision.encode()).digest()
        self._entries: OrderedDict[int, Keys] = OrderedDict()
        self._named: dict[bytes, list[Keys]] = {}
        self._lock = threading.Lock()

    @property
    def stats(self) -> CacheStats:
        """The counts of now."""
        with self._lock:
            return replace(self._stats)

    def longest(self, tokens: Ints, *, whole_blocks: bool) -> tuple[Keys | None, int]:
        """The entry, pinned, that shares most tokens with the beginning of `tokens`, and how many; (None, 0) if there is none.

        With `whole_blocks` a beginning counts in multiples of BLOCK only, unless it is all of `tokens`.
        """
        names = self._names(tokens)
        with self._lock:
            for name in reversed(names):
                found = [(_shared(entry.tokens[: entry.length], tokens), entry) for entry in self._named.get(name, ())]
                shared, entry = max(found, key=lambda pair: pair[0], default=(0, None))
                if whole_blocks and shared < len(tokens):
                    shared -= shared % BLOCK
                if entry is not None and shared:
                    entry.pins += 1
                    self._entries.move_to_end(id(entry))
                    return entry, shared
        return None, 0

    def keep(self, entry: Keys) -> None:
        """The entry, computed whole and pinned by the caller, is found from now on, and entries that it covers are dropped.

        One larger than the whole budget is not kept.
        """
        entry.names = tuple(self._names(entry.tokens))
        with self._lock:
            if entry.bytes > self.budget:
                return
            covered = {id(old): old for name in entry.names for old in self._named.get(name, ()) if not old.pins}
            self._drop(old for old in covered.values() if _shared(old.tokens, entry.tokens) == len(old.tokens))
            self._entries[id(entry)] = entry
            self._stats.bytes += entry.bytes
            for name in entry.names:
                self._named[name] = [entry, *self._named.get(name, ())][:SHARING]
            self._evict()

    def release(self, entry: Keys) -> None:
        """One pin less."""
        with self._lock:
            entry.pins -= 1
            self._evict()

    def clear(self) -> None:
        """Nothing is held any more; the counts stay."""
        with self._lock:
            self._entries.clear()
            self._named.clear()
            self._stats.bytes = 0

    def count(self, reused: int, computed: int) -> None:
        """One more prefix, of whose tokens so many were found and so many had to be computed."""
        with self._lock:
            self._stats.hits += not computed
            self._stats.partial += bool(computed and reused)
            self._stats.misses += not reused
            self._stats.tokens_reused += reused
            self._stats.tokens_computed += computed

    def _evict(self) -> None:
        while self._stats.bytes > self.budget:
            oldest = next((entry for entry in self._entries.values() if not entry.pins), None)
            if oldest is None:
                return
            self._drop([oldest])

    def _drop(self, entries: Iterable[Keys]) -> None:
        for entry in entries:
            del self._entries[id(entry)]
            self._stats.bytes -= entry.bytes
            self._stats.evicted_bytes += entry.bytes
            for name in entry.names:
                left = [other for other in self._named.get(name, ()) if other is not entry]
                if left:
                    self._named[name] = left
                else:
                    self._named.pop(name, None)

    def _names(self, tokens: Ints) -> list[bytes]:
        """The names of the beginnings that end with each block, the empty one first, and last of the whole prefix."""
        name, names = self._root, [self._root]
        for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
            name = hashlib.sha256(name + tokens[first : first + BLOCK].tobytes()).digest()
            names.append(name)
        return [*names, hashlib.sha256(b"whole" + name + tokens[len(tokens) // BLOCK * BLOCK :].tobytes()).digest()]


def _shared(left: Ints, right: Ints) -> int:
    """How many tokens both begin with."""
    length = min(len(left), len(right))
    apart = np.flatnonzero(left[:length] != right[:length])
    return int(apart[0]) if len(apart) else length
