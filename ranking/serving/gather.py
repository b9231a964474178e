"""Several members' Retrieve at once: read one by one, encoded together, searched together, answered each as if alone.

And one that nobody asks: see `rehearsal`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from index.keyvalue import StoreError
from ranking.serving import answers
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call, retrieved
from ranking.serving.batch import Question, question_of, search, vectors_of
from ranking.serving.stack import Stack
from ranking.serving.wide import Wide

Asked = tuple[pb.RetrieveRequest, Call]
Answered = pb.RetrieveResponse | Exception

log = logging.getLogger(__name__)


def retrieve_together(stack: Stack, asked: Sequence[Asked]) -> list[Answered]:
    """What `answers.retrieve` answers to each request (scores to the last digits of a float32), or the error that it raises.

    If the part that is done together fails, each is answered alone, so that it fails for nobody but who made it fail.
    """
    wide = Wide.over(stack.recommender.retriever)
    found: dict[int, Answered] = {}
    questions: list[Question] = []
    for place, (request, call) in enumerate(asked):
        try:
            with call.watch("member"):
                questions.append(question_of(stack, wide, place, request, stale=True))
        except StoreError:
            found[place] = _alone(stack, request, call)  # from what is remembered of the member, and marked so
        except Exception as error:
            found[place] = error
    try:
        found |= _joint(stack, wide, questions, [asked[one.place][1] for one in questions])
    except Exception as error:
        log.warning("%d requests are answered one by one: %s together", len(questions), type(error).__name__, exc_info=error)
        found |= {one.place: _alone(stack, *asked[one.place]) for one in questions}
    return [found[place] for place in range(len(asked))]


def _joint(stack: Stack, wide: Wide, questions: Sequence[Question], calls: Sequence[Call]) -> dict[int, Answered]:
    """The answer to each question by its place; every call's own times hold those of the encoding and search that it was in."""
    if not questions:
        return {}
    batch = Call("", calls[0].started)
    vectors = vectors_of(stack, questions, batch)
    with batch.watch("search"):
        found = search(wide, questions, vectors)
    answered: dict[int, Answered] = {}
    for one, call, candidates in zip(questions, calls, found, strict=True):
        call.watch.micros |= batch.watch.micros
        answered[one.place] = retrieved(stack, one.asker, candidates, one.k, call, readable=one.readable)
    return answered


def _alone(stack: Stack, request: pb.RetrieveRequest, call: Call) -> Answered:
    call.watch.micros.clear()
    try:
        return answers.retrieve(stack, request, call)
    except Exception as error:
        return error


def rehearse(stack: Stack, request: pb.RetrieveRequest) -> None:
    """All that answering takes was done, and nothing is changed by it. Raises what answering raises.

    Where answers are compared with the exact ones nothing is done: what nobody asked must not be in the recall that is told.
    """
    if stack.origin.shadow is None:
        now = time.monotonic()
        answers.retrieve(stack, request, Call("", now, started=now, rehearsed=True))
