"""What the synthetic feed shows and what members do with it, drawn from the laws in `world_truth`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.data.schema import DAY, DataError
from retrieval.data.world_people import People, WorldSettings
from retrieval.data.world_text import draw
from retrieval.data.world_truth import ACTIONS, Truth

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
_PAUSE = 1800
"""Seconds at least between two requests of a member; what a request leads to happens within them."""
_MOST = 8
"""Requests of a member on one day, at most."""
_CHUNK = 256
"""Requests handled at once: bounds the memory of a large world."""


@dataclass(frozen=True)
class Feed:
    """I impressions in request order and their outcomes: did bool [I, A], delay int64 [I, A] seconds, p_* as in Truth."""

    member: I64
    item: I64
    time: I64
    request: I64
    slot: I64
    did: npt.NDArray[np.bool_]
    delay: I64
    p_label: F64
    p_action: F64


def show(
    settings: WorldSettings,
    people: People,
    truth: Truth,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> Feed:
    """Play all days; a member is not shown again what it engaged with in an earlier request."""
    parts: list[Feed] = []
    done = np.zeros(0, np.int64)
    requests = 0
    for member, time, finished in _rounds(settings, people, rng):
        news = [done]
        for first in range(0, len(member), _CHUNK):
            some = slice(first, first + _CHUNK)
            part = _answer(truth, member[some], time[some], done, requests, rng)
            acted = part.did.any(axis=1)
            news.append(part.member[acted] * settings.items + part.item[acted])
            requests += len(member[some])
            parts.append(part)
        done = np.sort(np.concatenate(news))
        if progress is not None:
            progress(finished, settings.days)
    if not any(len(part.item) for part in parts):
        raise DataError("world: nobody was shown anything in so small a world. Use more members, items or days.")
    return Feed(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in Feed.__dataclass_fields__})


def _rounds(settings: WorldSettings, people: People, rng: np.random.Generator) -> Iterator[tuple[I64, I64, int]]:
    """Per day, the first requests of all members, then the second ones, ...: rows, times and days finished."""
    for day in range(settings.days):
        midnight = settings.start + day * DAY
        count = _poisson(people.rate, rng.random(settings.members))
        u = rng.random((settings.members, _MOST))
        u[np.arange(_MOST) >= count[:, None]] = np.inf
        u = np.sort(u, axis=1)
        for turn in range(_MOST):
            ready = np.flatnonzero(count > turn)
            room = DAY - _PAUSE * count[ready]
            time = midnight + np.floor(u[ready, turn] * room).astype(np.int64) + turn * _PAUSE
            here = people.joined[ready] <= time
            if here.any():
                yield ready[here], time[here], day + 1


def _poisson(rate: F64, u: F64) -> I64:
    """Int64 [M]: Poisson numbers by inversion, at most _MOST."""
    term = np.exp(-rate)
    total, number = term.copy(), np.zeros(len(rate), np.int64)
    for k in range(1, _MOST + 1):
        number += u >= total
        term = term * rate / k
        total = total + term
    return number


def _answer(truth: Truth, member: I64, time: I64, done: I64, requests: int, rng: np.random.Generator) -> Feed:
    """Draw every slot of B requests from the exposure law and what happens there from the action law."""
    item = truth.alive(int(time.min()), int(time.max()))
    fit, known = truth.affinity(member, time, item), truth.connected(member, time, item)
    weight = truth.exposure(time, item, fit, known)
    _hide(weight, member, item, done, len(truth.phi))
    size, slots, actions = len(member), truth.law.slots, len(ACTIONS)
    rows = np.repeat(np.arange(size), slots)
    column = draw(np.cumsum(weight, axis=1), rows, rng.random(size * slots)).reshape(size, slots)
    look, act, wait = rng.random((size, slots)), rng.random((size, slots, actions)), rng.random((size, slots, actions))
    kept = ~_repeated(column) & (weight.sum(axis=1) > 0)[:, None]
    request, slot = np.nonzero(kept)
    chosen = column[kept]
    wish = truth.wish(member[request], item[chosen], fit[request, chosen], known[request, chosen]).T
    attention = np.array(truth.law.attention)[slot]
    seen = look[kept] < attention
    return Feed(
        member=member[request],
        item=item[chosen],
        time=time[request],
        request=request + requests,
        slot=slot,
        did=seen[:, None] & (act[kept] < wish),
        delay=5 + np.floor(wait[kept] * (_PAUSE - 10)).astype(np.int64),
        p_label=attention * (1.0 - np.prod(1.0 - wish, axis=1)),
        p_action=attention[:, None] * wish,
    )


def _repeated(column: I64) -> npt.NDArray[np.bool_]:
    """Bool [B, slots]: the slot drew what an earlier slot of the request already shows; it stays without a post."""
    again = np.zeros(column.shape, np.bool_)
    for slot in range(1, column.shape[1]):
        again[:, slot] = (column[:, :slot] == column[:, slot : slot + 1]).any(axis=1)
    return again


def _hide(weight: F64, member: I64, item: I64, done: I64, items: int) -> None:
    """Set to 0 the weights of (member, item) pairs in the sorted keys `done`."""
    first = np.searchsorted(done, member * items)
    count = np.searchsorted(done, (member + 1) * items) - first
    row = np.repeat(np.arange(len(member)), count)
    key = done[np.arange(len(row)) + np.repeat(first - (np.cumsum(count) - count), count)]
    gone = key - member[row] * items
    column = np.minimum(np.searchsorted(item, gone), len(item) - 1)
    hit = item[column] == gone
    weight[row[hit], column[hit]] = 0.0
