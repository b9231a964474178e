"""What makes a final score, on the wire: weights read from a request, weights and obeyed wishes published in its answer."""

from __future__ import annotations

from ranking.pipeline import Ranked
from ranking.serving import recommender_pb2 as pb
from ranking.serving.stack import Stack
from ranking.tasks_weighted import Weights, weights_of


def read_weights(stack: Stack, request: pb.RecommendRequest | pb.RankRequest) -> dict[str, float]:
    """What each of several tasks counts; empty where one task is asked for. Raises NoRanker, TaskError, WeightsError."""
    pairs = [(one.task, one.weight) for one in request.weights]
    return weights_of(pairs, stack.recommender.known_ranker.tasks, request.task) if pairs else {}


def publish_formula(response: pb.RecommendResponse | pb.RankResponse, weights: Weights, ranked: Ranked) -> None:
    """The answer holds what made the final score: weights and wishes, and each task's own probabilities if there are any."""
    response.weights.extend(pb.Weight(task=name, weight=weight) for name, weight in weights.items())
    response.wishes.extend(pb.Wish(kind=one.wish.kind, said=one.wish.said, items=one.items) for one in ranked.wishes)
    if weights or ranked.wishes:
        columns = {name: column.astype("<f4").tobytes() for name, column in ranked.columns.items()}
        response.results.tasks.extend(pb.TaskColumn(task=name, probabilities=column) for name, column in columns.items())


def own_probabilities(response: pb.RecommendResponse | pb.RankResponse) -> bytes:
    """The packed probabilities (or final scores of several tasks) as no wish has moved them; nothing where a wish moved a final
    score of several tasks. What a member says is no news about the ranker."""
    if not response.wishes:
        return response.results.probabilities
    columns = response.results.tasks
    return columns[0].probabilities if len(columns) == 1 else b""
