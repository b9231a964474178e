"""Under load Recommend ranks fewer candidates than it was asked to, and says so: a good answer now, not the best one late."""

from __future__ import annotations

from collections.abc import Callable

from ranking.serving import answers
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call
from ranking.serving.load_shed import kind_of
from ranking.serving.messages import recommend_sizes
from ranking.serving.queue_forecast import Kind
from ranking.serving.stack import Stack

STEPS = ((0.9, 4), (0.5, 2))
"""From which pressure on the depth is divided by how much: with the queue half full by two, with it full by four."""
LEAST_DEPTH = 250


class Depth:
    """Recommend at the depth that the queue allows. `pressure` is told the kind of a request, `least` is the smallest depth."""

    def __init__(self, pressure: Callable[[Kind], float], least: int = LEAST_DEPTH) -> None:
        self._pressure, self._least = pressure, least
        self.share = 1.0
        """How much of the depth that it asked for the last request got."""

    def recommend(self, stack: Stack, request: pb.RecommendRequest, call: Call) -> pb.RecommendResponse:
        """What `answers.recommend` answers, out of fewer candidates if more would keep others waiting for too long.

        The answer is then FEWER_CANDIDATES, or has that in its detail if it lacks something worse. For one thread at a time.
        """
        sizes = recommend_sizes(request)
        pressure = self._pressure(kind_of("Recommend", request))
        depth = lowered(sizes.fanout, max(sizes.k, self._least), pressure)
        self.share = depth / sizes.fanout
        if depth == sizes.fanout:
            return answers.recommend(stack, request, call)
        fewer = pb.RecommendRequest()
        fewer.CopyFrom(request)
        fewer.fanout = depth

        def mark(response: pb.RecommendResponse) -> None:
            if response.candidates == depth:  # else there were no more, and nothing is missing
                full = f"because the queue was {pressure:.0%} full"
                detail = f"{depth:,} candidates took part and {sizes.fanout:,} were asked for, {full}"
                response.degraded = response.degraded or pb.FEWER_CANDIDATES
                response.degraded_detail = "; ".join(filter(None, (response.degraded_detail, detail)))

        return answers.recommend(stack, fewer, call, mark)


def lowered(fanout: int, least: int, pressure: float) -> int:
    """The depth at a pressure: `fanout` divided by its step, no less than `least` where `fanout` is more."""
    by = next((divisor for bound, divisor in STEPS if pressure >= bound), 1)
    return min(fanout, max(fanout // by, least))
