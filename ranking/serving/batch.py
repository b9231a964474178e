"""What RetrieveBatch answers: members read one by one, encoded together, searched together; each fault stays in its row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from ranking.pipeline import in_retrieval_order
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Asker, Call, asker_of, keep_vectors, provenance
from ranking.serving.change_messages import read_wanted
from ranking.serving.messages import (
    MAX_NAME,
    BadRequest,
    at_most,
    fill_results,
    read_ids,
    read_instruction,
    retrieve_size,
    words_of,
)
from ranking.serving.stack import Stack
from ranking.serving.status import message_of, status_of
from ranking.serving.wide import Scope, Wide
from retrieval.retrieve import Candidates

MAX_BATCH, MAX_BATCH_ITEMS = 64, 128_000
OWN_FAULTS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS)
"""Statuses that say something of one member or one question; any other is the whole call's."""


@dataclass(frozen=True)
class Question:
    """One question of a batch that fits the contract; `place` is its row."""

    place: int
    k: int
    asker: Asker
    scope: Scope
    readable: bool


def retrieve_batch(stack: Stack, request: pb.RetrieveBatchRequest, call: Call) -> pb.RetrieveBatchResponse:
    """The answer to RetrieveBatch. Raises BadRequest for one that is empty or too large, and what no member is to blame for."""
    if not request.requests:
        raise BadRequest("requests: none are given; fill in at least one")
    at_most("requests", len(request.requests), MAX_BATCH)
    wide = Wide.over(stack.recommender.retriever)
    rows = [pb.BatchRow() for _ in request.requests]
    with call.watch("member"):
        questions = [
            question
            for place, one in enumerate(request.requests)
            if (question := _read(stack, wide, place, one, rows[place], call)) is not None
        ]
    at_most("requests: the sum of k", sum(one.k for one in questions), MAX_BATCH_ITEMS)
    vectors = vectors_of(stack, questions, call)
    with call.watch("search"):
        found = search(wide, questions, vectors)
    with call.watch("order"):
        for one, candidates in zip(questions, found):
            fill_results(rows[one.place].results, in_retrieval_order(candidates, one.k), stack.catalog, readable=one.readable)
    return pb.RetrieveBatchResponse(
        rows=rows, provenance=provenance(stack, ranked=False), times=call.times(), request_id=call.request_id
    )


def _read(stack: Stack, wide: Wide, place: int, request: pb.RetrieveRequest, row: pb.BatchRow, call: Call) -> Question | None:
    """The question, or None with the reason in its row. Raises what is not this member's own fault."""
    try:
        return question_of(stack, wide, place, request)
    except BrewlineError as error:
        code = status_of(error)
        if code not in OWN_FAULTS:
            raise
        row.status, row.message = code.value[0], message_of(error, call.request_id)
        return None


def question_of(stack: Stack, wide: Wide, place: int, request: pb.RetrieveRequest, *, stale: bool = False) -> Question:
    """The question of one member; `stale` as in `asker_of`. Raises what Retrieve raises before it encodes."""
    k = retrieve_size(request)
    words_of("surface", request.surface, MAX_NAME)
    instruction = read_instruction(request.instruction)
    exclude = read_ids(request.exclude, "exclude")
    wanted = read_wanted(request.filter)
    asker = asker_of(stack, request.member, instruction, words=wide.hybrid is not None, stale=stale)
    return Question(place, k, asker, wide.scope(asker.view, [*exclude, *asker.seen], wanted), request.readable)


def vectors_of(stack: Stack, questions: Sequence[Question], call: Call) -> npt.NDArray[np.float32]:
    """float32 [Q, D]: each member's vector, those that nobody knew made in one batch and kept for the next question."""
    vectors = np.zeros((len(questions), stack.encoder.dims), np.float32)
    unknown = [place for place, one in enumerate(questions) if one.asker.vector is None]
    for place, one in enumerate(questions):
        if one.asker.vector is not None:
            vectors[place] = one.asker.vector
    if unknown:
        askers = [questions[place].asker for place in unknown]
        with call.watch("encode"):
            vectors[unknown] = stack.encoder.members([asker.view for asker in askers])
        keep_vectors(stack, askers, vectors[unknown])
    return vectors


def search(wide: Wide, questions: Sequence[Question], vectors: npt.NDArray[np.float32]) -> list[Candidates]:
    """The candidates of each question; those that want as many are searched together."""
    found: dict[int, Candidates] = {}
    for k in dict.fromkeys(one.k for one in questions):
        alike = [place for place, one in enumerate(questions) if one.k == k]
        answers = wide.retrieve_many(vectors[alike], k, [questions[place].scope for place in alike])
        found.update(zip(alike, answers, strict=True))
    return [found[place] for place in range(len(questions))]
