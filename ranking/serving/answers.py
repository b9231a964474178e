"""What each call answers, as plain functions of a stack, a request and a call: no gRPC, no event loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from index.keyvalue import StoreError
from ranking.pace import Stopwatch
from ranking.pipeline import Ranked, in_retrieval_order
from ranking.serving import recommender_pb2 as pb
from ranking.serving.change_messages import read_wanted
from ranking.serving.messages import (
    MAX_ID,
    MAX_NAME,
    BadRequest,
    Sizes,
    fill_results,
    read_description,
    read_ids,
    read_instruction,
    recommend_sizes,
    retrieve_size,
    words_of,
)
from ranking.serving.stack import Stack
from ranking.serving.weights import publish_formula, read_weights
from ranking.tasks_weighted import Weights
from retrieval.attributes import Wanted
from retrieval.catalog import UnknownItem
from retrieval.data.schema import MemberView
from retrieval.members import KnownMember, MemberStore, UnknownMember
from retrieval.recent import stranger
from retrieval.records import MemberRecord, view_digest, view_of
from retrieval.retrieve import Candidates, Vector

NO_MEMBERS = "this server has no member store; describe the member in the request or start with --members URL"

log = logging.getLogger(__name__)


@dataclass
class Call:
    """One request on its way: its name, when it came (`time.monotonic()`), when it must be answered, where its time went; `early`
    is an answer without ranking, for the moment when waiting longer is pointless. `rehearsed`: nobody asked."""

    request_id: str
    arrived: float
    deadline: float = math.inf
    started: float = 0.0
    early: pb.RecommendResponse | None = None
    rehearsed: bool = False
    watch: Stopwatch = field(default_factory=Stopwatch)

    def times(self) -> pb.StageTimes:
        """The stage times so far, with the total until now."""
        micros = dict(self.watch.micros)  # the worker may still be writing
        total = round((time.monotonic() - self.arrived) * 1e6)
        queue = round((self.started - self.arrived) * 1e6)
        return pb.StageTimes(
            queue_us=queue,
            member_us=micros.get("member", 0),
            encode_us=micros.get("encode", 0),
            search_us=micros.get("search", 0),
            rank_us=micros.get("rank", 0),
            order_us=micros.get("order", 0),
            total_us=max(total, queue + sum(micros.values())),
        )


@dataclass(frozen=True)
class Asker:
    """Who asks: the view that prompts read, all ids that must not come back, and the vector if a kept one is right.

    `record` is the member's if a vector of it is worth keeping: there is none, and the view is the record's own. `stale` says
    what is wrong if the member store did not answer; whoever answers for such an asker must say it too.
    """

    view: MemberView
    seen: list[str]
    vector: Vector | None = None
    record: MemberRecord | None = None
    stale: str = ""


def asker_of(stack: Stack, message: pb.Member, instruction: str, *, words: bool = True, stale: bool = False) -> Asker:
    """Who a request is about. With `words` False a known vector makes the view's history unnecessary, and it is left out.

    With `stale`, a member store that does not answer is no error: the asker is who this process last knew, or, if that is nobody,
    a member of whom the id is known. Raises BadRequest, UnknownMember, UnknownItem, StoreError.
    """
    if message.HasField("description"):
        return Asker(read_description(message, instruction, stack.catalog, stack.engaged), [])
    if not message.id:
        raise BadRequest("member: neither id nor description is given; fill one of them")
    if len(message.id.encode()) > MAX_ID:
        raise BadRequest(f"member.id: more than {MAX_ID} bytes")
    if stack.members is None:
        raise UnknownMember(NO_MEMBERS)
    known, lacks = _known(stack.members, message.id, stale)
    vector = None if instruction else known.vector
    if vector is not None and not words:
        return Asker(MemberView(known.member, (), known.connections), known.seen, vector, stale=lacks)
    view = view_of(known.record, stack.catalog, instruction)
    worth_keeping = not (instruction or lacks) and vector is None
    return Asker(view, known.record.seen, vector, known.record if worth_keeping else None, lacks)


def _known(members: MemberStore, member_id: str, stale: bool) -> tuple[KnownMember, str]:
    """What is known of a member, and what that lacks if the store did not answer. Raises UnknownMember, StoreError."""
    try:
        return members.get(member_id), ""
    except StoreError as error:
        if not stale:
            raise
        last = members.last_known(member_id)
        if last is None:
            last, used = KnownMember(stranger(member_id), None), "nothing is known here of this member but the id"
        else:
            used = "what this server last knew of the member was used"
        return last, f"the member store did not answer, {used}; what was seen since may come back ({type(error).__name__})"


def mark_stale(asker: Asker, response: pb.RecommendResponse | pb.RetrieveResponse | pb.RankResponse) -> None:
    """The answer says that the member store did not answer, if so. What else it lacks stays in the detail: only this lack could
    not be seen in the answer itself."""
    if asker.stale:
        response.degraded = pb.STALE_MEMBER
        response.degraded_detail = "; ".join(filter(None, (asker.stale, response.degraded_detail)))


def vector_of(stack: Stack, asker: Asker, call: Call) -> Vector:
    """The member's vector; one that had to be made for want of a right one is kept for the next question."""
    if asker.vector is not None:
        return asker.vector
    vector = stack.recommender.describe(asker.view, asker.vector, watch=call.watch)
    if not call.rehearsed:
        keep_vectors(stack, [asker], vector[None])
    return vector


def keep_vectors(stack: Stack, askers: Sequence[Asker], vectors: npt.NDArray[np.float32]) -> None:
    """Of vectors float32 [M, D] just made, those worth keeping are in the member store, or the log says why not."""
    kept = [(asker.record, view_digest(asker.view), row) for row, asker in enumerate(askers) if asker.record is not None]
    if not kept or stack.members is None:
        return
    records, digests, rows = zip(*kept)
    try:
        stack.members.put_vectors(records, digests, vectors[list(rows)])
    except StoreError as error:  # the answer does not need them
        log.warning("%d members' vectors are not kept: %s", len(rows), error)


@dataclass(frozen=True)
class Question:
    """What Recommend is asked, read and checked; `excluded` are the ids that the request itself leaves out. `task` is "" where
    `weights` name several."""

    sizes: Sizes
    task: str
    wanted: Wanted
    asker: Asker
    excluded: list[str]
    weights: Weights = field(default_factory=dict)

    @property
    def unwanted(self) -> list[str]:
        """All ids that the stages are told to leave out."""
        return [*self.excluded, *self.asker.seen]


def question_of(stack: Stack, request: pb.RecommendRequest, call: Call, *, stale: bool = False) -> Question:
    """The question of a request; `stale` as in `asker_of`. Raises BadRequest, NoRanker, TaskError, UnknownMember, UnknownItem."""
    sizes = recommend_sizes(request)
    words_of("surface", request.surface, MAX_NAME)
    instruction = read_instruction(request.instruction)
    exclude = read_ids(request.exclude, "exclude")
    wanted = read_wanted(request.filter)
    weights = read_weights(stack, request)
    task = "" if weights else stack.recommender.task(request.task)
    with call.watch("member"):
        return Question(sizes, task, wanted, asker_of(stack, request.member, instruction, stale=stale), exclude, weights)


def recommend(
    stack: Stack, request: pb.RecommendRequest, call: Call, mark: Callable[[pb.RecommendResponse], None] | None = None
) -> pb.RecommendResponse:
    """The answer to Recommend; `call.early` is set as soon as the candidates are known. `mark` may say of both what they lack."""
    question = question_of(stack, request, call, stale=True)

    def answer(ranked: Ranked) -> pb.RecommendResponse:
        response = pb.RecommendResponse(
            candidates=ranked.candidates,
            degraded=ranked.degraded.name,
            degraded_detail=ranked.detail,
            provenance=provenance(stack, ranked=ranked.probabilities is not None),
            task=question.task,
            request_id=call.request_id,
        )
        with call.watch("order"):
            fill_results(response.results, ranked, stack.catalog, readable=request.readable)
        response.times.CopyFrom(call.times())
        publish_formula(response, question.weights, ranked)
        mark_stale(question.asker, response)
        if mark is not None:
            mark(response)
        return response

    def early(ranked: Ranked) -> None:
        if math.isfinite(call.deadline):
            call.early = answer(ranked)

    ranked = stack.recommender.recommend(
        question.asker.view,
        question.sizes.k,
        question.sizes.fanout,
        exclude=question.unwanted,
        task=question.task,
        weights=question.weights,
        vector=vector_of(stack, question.asker, call),
        wanted=question.wanted,
        deadline=call.deadline,
        watch=call.watch,
        early=early,
    )
    return answer(ranked)


def retrieve(stack: Stack, request: pb.RetrieveRequest, call: Call) -> pb.RetrieveResponse:
    """The answer to Retrieve."""
    k = retrieve_size(request)
    words_of("surface", request.surface, MAX_NAME)
    instruction = read_instruction(request.instruction)
    exclude = read_ids(request.exclude, "exclude")
    wanted = read_wanted(request.filter)
    with call.watch("member"):
        words = stack.recommender.retriever.hybrid is not None
        asker = asker_of(stack, request.member, instruction, words=words, stale=True)
    vector = vector_of(stack, asker, call)
    unwanted = [*exclude, *asker.seen]
    found = stack.recommender.retrieve(asker.view, k, exclude=unwanted, vector=vector, wanted=wanted, watch=call.watch)
    return retrieved(stack, asker, found, k, call, readable=request.readable)


def retrieved(stack: Stack, asker: Asker, found: Candidates, k: int, call: Call, *, readable: bool) -> pb.RetrieveResponse:
    """The first `k` candidates as Retrieve answers them."""
    response = pb.RetrieveResponse(provenance=provenance(stack, ranked=False), request_id=call.request_id)
    with call.watch("order"):
        fill_results(response.results, in_retrieval_order(found, k), stack.catalog, readable=readable)
    response.times.CopyFrom(call.times())
    mark_stale(asker, response)
    return response


def rank(stack: Stack, request: pb.RankRequest, call: Call) -> pb.RankResponse:
    """The answer to Rank. Raises UnknownItem naming the first item that the catalogue does not hold."""
    instruction = read_instruction(request.instruction)
    ids = read_ids(request.items, "items")
    if not ids:
        raise BadRequest("items: none are given; fill plain or packed with at least one id")
    weights = read_weights(stack, request)
    asked = stack.recommender.weighed(request.task, weights)
    with call.watch("member"):
        asker = asker_of(stack, request.member, instruction, stale=True)
        rows = stack.catalog.rows(ids)
    if (rows < 0).any():
        first = int(np.argmax(rows < 0))
        raise UnknownItem(f"items[{first}]: {ids[first][:80]!r} is not in the catalogue of snapshot {stack.snapshot.name}")
    columns = stack.recommender.columns(asker.view, rows, asked, vector=asker.vector, watch=call.watch)
    with call.watch("order"):
        final = stack.recommender.final(asker.view, rows, columns, asked)
        best = final.best
        own, named = {name: column[best] for name, column in columns.items()}, [ids[place] for place in best]
        ranked = Ranked(named, rows[best], best, None, final.scores[best], len(ids), columns=own, wishes=final.wishes)
        response = pb.RankResponse(
            provenance=provenance(stack, ranked=True, retrieved=False),
            task="" if weights else next(iter(asked)),
            request_id=call.request_id,
        )
        fill_results(response.results, ranked, stack.catalog, readable=request.readable)
    response.times.CopyFrom(call.times())
    publish_formula(response, weights, ranked)
    mark_stale(asker, response)
    return response


def provenance(stack: Stack, *, ranked: bool, retrieved: bool = True) -> pb.Provenance:
    """Which snapshot, models and first stage make an answer; the ranker and the first stage only if they took part."""
    return pb.Provenance(
        snapshot=stack.snapshot.name,
        encoder=stack.encoder.fingerprint,
        ranker=stack.ranker.fingerprint if ranked and stack.ranker is not None else "",
        first_stage=stack.recommender.retriever.first_stage if retrieved else "",
    )
