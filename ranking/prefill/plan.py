"""How a batch of scoring requests becomes packed forward passes: pure Python and numpy, no torch.

One request is a prefix (P tokens: instruction, member, history) and N items (L tokens each). Every item continues the
prefix as if it stood there alone: same positions, no sight of another item. The plan lays this out without padding:

    tokens    [ prefix of r0 | prefix of r1 | item item item ... of r0 | item item ... of r1 ]
    positions   0 .. P0-1      0 .. P1-1      P0.. P0.. P0..             P1.. P1..

Items attend to the prefix of their request (no mask needed: all of it lies before them) and causally to themselves; a
prefix attends causally to itself. So two calls of an attention kernel over segments are enough and no T x T mask exists.

Legend: R requests, N items of one request, U unique items, P prefix tokens, L item tokens, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from ranking.prefill.errors import BadHistory, UnknownVector
from ranking.prefill.request import Limits, Request, Tokens, check_history, check_ids, check_prefix, fit

HELD = 4
"""Prefix tokens that the requests of one pass may hold together, in multiples of a pass."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one request that one pass computes.

    `prefix` says whether its prefix tokens are in this pass (else their keys and values were kept from an earlier one),
    `keep` whether a later pass needs them. Rows are positions on the pass's packed token axis.
    """

    request: int
    prefix_tokens: int
    prefix: bool
    keep: bool
    first_row: int
    last_row: int
    items: int


@dataclass(frozen=True)
class Chunk:
    """One forward pass over T packed tokens; a negative token id -1 - v stands for row v of the plan's vectors.

    tokens, positions int64 [T]; segments int32 [S+1], the bounds of every causal segment (prefixes first, then items);
    prefix_rows: how many of the T rows are prefix; last int64 [items], the row of each item's last token;
    item_bounds int32 [items+1] on the token axis; unique int64 [items], which unique item of the plan each one is.
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int32]
    item_bounds: npt.NDArray[np.int32]
    last: npt.NDArray[np.int64]
    unique: npt.NDArray[np.int64]
    prefix_rows: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """The passes in order, and for each request the unique item (0..U-1) behind each of its items, in input order.

    `prefixes` int64 [P] of each request with items, hoisted tokens included; `histories` the bounds of those entries in them that
    do not see each other; `vectors` float [V, hidden] of all requests.
    """

    chunks: tuple[Chunk, ...]
    fan_out: tuple[npt.NDArray[np.int64], ...]
    unique_items: int
    prefixes: Mapping[int, npt.NDArray[np.int64]]
    histories: Mapping[int, tuple[int, ...]]
    vectors: npt.NDArray[np.float32] | None

    @property
    def tokens(self) -> int:
        """Tokens of all passes together: the rows that the linear layers see."""
        return sum(len(chunk.tokens) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class _Job:
    """One request after deduplication and hoisting, items in the order in which they will be packed."""

    request: int
    prefix: list[int]
    items: list[list[int]]
    unique: list[int]


def plan(requests: Sequence[Request], limits: Limits | None = None, *, hoist: bool = True, apart: bool = False) -> Plan:
    """Return the passes that score every item of every request exactly as if it stood alone after its prefix.

    Equal items of a request are computed once. With `hoist`, the tokens that all items of a request begin with move to
    the end of its prefix (each item keeps at least one), which changes no result. A pass holds at most `limits.max_tokens`
    tokens, except that a prefix and its first item are never torn apart; with `apart` no pass holds any prefix, because
    their keys and values are made (or found) beforehand. Raises EmptyPrefix, EmptyItem, ItemTooLong, PrefixTooLong,
    UnknownVector and BadHistory. A request without items is allowed and gets an empty answer.
    """
    limits = limits or Limits()
    jobs: list[_Job] = []
    fan_out: list[npt.NDArray[np.int64]] = []
    vectors: list[npt.NDArray[np.float32]] = []
    histories: dict[int, tuple[int, ...]] = {}
    total = rows = 0
    for number, request in enumerate(requests):
        job, order = _prepare(number, request, limits, total, hoist)
        if edges := check_history(request.history, len(request.prefix), number):
            if not apart:
                raise BadHistory(f"the history entries of request {number} do not see each other; only the lean loop can do that")
            histories[number] = edges
        if request.vectors is not None:
            job = replace(job, items=[_shifted(item, rows) for item in job.items])
            vectors.append(request.vectors)
            rows += len(request.vectors)
        fan_out.append(order)
        total += len(job.items)
        if job.items:
            jobs.append(job)
    return Plan(
        chunks=tuple(_lay_out(parts, apart) for parts in _split(jobs, limits.max_tokens, apart)),
        fan_out=tuple(fan_out),
        unique_items=total,
        prefixes={job.request: np.array(job.prefix, np.int64) for job in jobs},
        histories=histories,
        vectors=_together(vectors),
    )


def common_prefix(items: Sequence[Tokens]) -> int:
    """Return how many tokens all items share at their beginning, at most one less than the shortest item has."""
    if not items:
        return 0
    low, high = min(items, key=list), max(items, key=list)  # in lexical order the two extremes differ first
    shared = 0
    for left, right in zip(low, high):
        if left != right:
            break
        shared += 1
    return min(shared, min(len(item) for item in items) - 1)


def _prepare(number: int, request: Request, limits: Limits, offset: int, hoist: bool) -> tuple[_Job, npt.NDArray[np.int64]]:
    check_prefix(request.prefix, limits, number)
    slots: dict[tuple[int, ...], int] = {}
    order = np.empty(len(request.items), np.int64)
    for row, item in enumerate(request.items):
        tokens = fit(item, number, row, limits)
        order[row] = slots.setdefault(tokens, len(slots))
    unique = [list(tokens) for tokens in slots]
    prefix = list(request.prefix)
    if unique:
        check_prefix(prefix, limits, number, max(map(len, unique)))
    check_ids(number, prefix, unique, request.vectors)
    shared = common_prefix(unique) if hoist and len(unique) > 1 else 0
    shared = next((place for place, token in enumerate(unique[0][:shared]) if token < 0), shared) if shared else 0
    if shared:
        prefix += unique[0][:shared]
        unique = [item[shared:] for item in unique]
    packing = sorted(range(len(unique)), key=lambda slot: len(unique[slot]))  # equal lengths lie together
    job = _Job(number, prefix, [unique[slot] for slot in packing], [offset + slot for slot in packing])
    return job, order + offset


def _together(vectors: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32] | None:
    if len(widths := {part.shape[1] for part in vectors}) > 1:
        raise UnknownVector(f"the requests of one call have vectors of {sorted(widths)} dimensions; expected one width")
    return np.concatenate(vectors) if vectors else None


def _shifted(item: list[int], rows: int) -> list[int]:
    """The item with its vectors' ids counted on from those of earlier requests."""
    return [token - rows if token < 0 else token for token in item]


@dataclass(frozen=True, slots=True)
class _Part:
    """Items `start..stop` of a job, with or without its prefix, in one pass."""

    job: _Job
    start: int
    stop: int

    @property
    def first(self) -> bool:
        return self.start == 0

    @property
    def final(self) -> bool:
        return self.stop == len(self.job.items)


def _split(jobs: Sequence[_Job], budget: int, apart: bool) -> Iterator[list[_Part]]:
    """Fill passes up to the budget; a job that does not fit goes on in the next pass without its prefix."""
    parts: list[_Part] = []
    used = held = 0
    for job in jobs:
        prefix = 0 if apart else len(job.prefix)
        if parts and apart and held + len(job.prefix) > HELD * budget:
            yield parts
            parts, used, held = [], 0, 0
        held += len(job.prefix)
        start, room = 0, prefix
        for row, item in enumerate(job.items):
            fits = used + room + len(item) <= budget
            if not fits and (used or row > start):
                if row > start:
                    parts.append(_Part(job, start, row))
                yield parts
                parts, used, held, start = [], 0, len(job.prefix), row
                room = prefix if row == 0 else 0
            used += room + len(item)
            room = 0
        parts.append(_Part(job, start, len(job.items)))
    if parts:
        yield parts


def _lay_out(parts: Sequence[_Part], apart: bool) -> Chunk:
    heads = [part.job.prefix for part in parts if part.first and not apart]
    bodies = [(part, item) for part in parts for item in part.job.items[part.start : part.stop]]
    lengths = np.array([*map(len, heads), *(len(item) for _, item in bodies)], np.int64)
    segments = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    first_positions = np.array([0] * len(heads) + [len(part.job.prefix) for part, _ in bodies], np.int64)
    positions = np.arange(segments[-1]) - np.repeat(segments[:-1] - first_positions, lengths)
    rows = chain(chain.from_iterable(heads), chain.from_iterable(item for _, item in bodies))
    item_bounds = segments[len(heads) :]
    pieces: list[Piece] = []
    row = 0
    for part in parts:
        count = part.stop - part.start
        bounds = int(item_bounds[row]), int(item_bounds[row + count])
        pieces.append(Piece(part.job.request, len(part.job.prefix), part.first and not apart, not part.final, *bounds, count))
        row += count
    return Chunk(
        tokens=np.fromiter(rows, np.int64, int(segments[-1])),
        positions=positions.astype(np.int64),
        segments=segments,
        item_bounds=item_bounds,
        last=item_bounds[1:].astype(np.int64) - 1,
        unique=np.array([slot for part in parts for slot in part.job.unique[part.start : part.stop]], np.int64),
        prefix_rows=int(segments[len(heads)]),
        pieces=tuple(pieces),
    )
