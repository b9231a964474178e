"""What is refused at the door, and with which words: by count, by the predicted wait, by the deadline. No gRPC here.

A burst may fill the queue up to `most_wait_s`. Once that was not enough, the server is overloaded and not surprised: until a
second has passed without a refusal a request waits for less than its own answer takes, so that whoever is let in is answered
within twice the time of an idle server, and the models still hardly ever stand still. A caller who was not refused
lately may wait one turn more: he is not the one who asks too much.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from ranking.serving.messages import DEFAULT_FANOUT, MAX_FANOUT, MAX_IDS
from ranking.serving.queue_fair import Job
from ranking.serving.queue_forecast import Kind
from ranking.serving.recommender_pb2 import (
    ExplainRequest,
    RankRequest,
    RecommendRequest,
    RetrieveBatchRequest,
    RetrieveRequest,
    UpsertItemsRequest,
)
from ranking.serving.status import Late, Overloaded
from ranking.tasks_weighted import MOST_TASKS

MOST_WAIT_S = 0.5
"""A few requests at once are a burst and no overload: so many seconds hold three Recommends of 500 candidates on one core (158 ms
each, docs/log.md), and are soon over if it was overload after all."""
STRICT_S = 1.0
NEWCOMER, STRICT = 2.5, 0.75
"""Turns that a caller may wait who was not refused lately (the work at hand and another's turn), and one who was (less than
one: a mean is what is forecast, the slowest is what is felt)."""
GATHERED_S = 0.025
"""Seconds that may wait under overload of a kind that is answered together: less, and there would be nothing to gather."""
REMEMBERED = 1_024
"""Callers who were refused last; names are free, so those before them count as newcomers, whenever it was."""
WRITES = ("RecordEngagements", "UpsertItems", "WithdrawItems")
"""Calls that overload by others does not make strict: they cost little, and what was done or withdrawn should be known."""
RETRY_S = 0.05
"""The hint to a caller whom a count turned away before anything was measured."""


class Patience:
    """How long requests may wait, by what was lately refused and to whom."""

    def __init__(self, most_wait_s: float = MOST_WAIT_S) -> None:
        self._most_wait_s = most_wait_s
        self._strict_until = 0.0
        self._refused: OrderedDict[str, float] = OrderedDict()

    def bound(self, turn: float, now: float, caller: str = "", *, gathered: bool = False) -> float:
        """Seconds that a caller's work may wait where a turn takes so many: its own, or the one at hand if that is longer.

        A turn longer than `most_wait_s` may always be waited for.
        """
        burst = max(turn, self._most_wait_s)
        if now >= self._strict_until:
            return burst
        turns = STRICT if self._refused.get(caller, -math.inf) + STRICT_S > now else NEWCOMER
        return min(max(turn * turns, GATHERED_S if gathered else 0.0), burst)

    def refuse(self, caller: str, wait: float, reason: str, now: float) -> Overloaded:
        """The error of a request that is turned away for its wait; from now on bounds are strict."""
        self._strict_until = now + STRICT_S
        self._refused[caller] = now
        self._refused.move_to_end(caller)
        if len(self._refused) > REMEMBERED:
            self._refused.popitem(last=False)
        retry_s = max(wait, RETRY_S)
        return Overloaded(f"{reason}; ask again in {retry_s * 1e3:,.0f} ms", retry_s)

    def check(self, job: Job, wait: float, now: float, at_hand: float = 0.0) -> None:
        """Nothing happens if the job may wait so many seconds; the work `at_hand` takes as many in all.

        Raises Overloaded, or Late if no queue is to blame.
        """
        turn = max(job.cost, at_hand)
        bound = self.bound(turn, now, job.caller, gathered=job.together is not None)
        if job.kind.name in WRITES:
            bound = max(turn, self._most_wait_s)
        if wait > bound:
            words = f"the wait would be {wait * 1e3:,.0f} ms and may be {bound * 1e3:,.0f} ms"
            raise self.refuse(job.caller, wait, words, now)
        left = job.deadline - now
        if left <= 0:
            raise Late("the deadline passed before the request was read; give more time")
        if wait + job.least > left and job.queued:
            words = f"{left * 1e3:,.0f} ms are left, the wait would be {wait * 1e3:,.0f} ms and half of such"
            words = f"{words} answers lately took {job.least * 1e3:,.0f} ms or more"
            raise Late(f"{words}; give more time") if job.least > left else self.refuse(job.caller, wait, words, now)


def kind_of(name: str, request: object) -> Kind:
    """What a request asks of the models, by the sizes that it names. One beyond the limits is taken for the largest that is
    allowed: reading the request will refuse it, which is its own answer and not that the server is busy."""
    match request:
        case RecommendRequest():
            return Kind(name, min(request.fanout or max(request.k, DEFAULT_FANOUT), MAX_FANOUT) * _times(len(request.weights)))
        case ExplainRequest():
            return Kind(name, min(request.question.fanout or DEFAULT_FANOUT, MAX_FANOUT))
        case RankRequest():
            items = max(len(request.items.plain), len(request.items.ends) // 4)
            return Kind(name, min(items, MAX_IDS) * _times(len(request.weights)))
        case RetrieveRequest():
            return Kind(f"{name} described" if request.member.HasField("description") else name)
        case RetrieveBatchRequest():
            return Kind(name, len(request.requests))
        case UpsertItemsRequest():
            return Kind(name, len(request.items))
    return Kind(name)


def _times(tasks: int) -> int:
    return min(max(tasks, 1), MOST_TASKS)


def first_stage(kind: Kind) -> Kind:
    """The part of a Recommend after which there is something to answer."""
    return Kind(f"{kind.name} first stage", kind.size)
