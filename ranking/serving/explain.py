"""What Explain answers: the functions that answer Recommend answer its question, and one item is looked up at each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ranking.pipeline import Ranked
from ranking.prompts import relations_of
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call, Question, provenance, question_of, vector_of
from ranking.serving.messages import MAX_FANOUT, id_of
from ranking.serving.stack import Stack
from ranking.serving.wide import Listed, Scope, Wide
from ranking.wishes import Topics
from retrieval.live_catalog import number_columns
from retrieval.retrieve import Vector, seen_items
from retrieval.tokens import Tokens


@dataclass(frozen=True)
class Case:
    """One item before one answered question.

    `ranked` are all candidates in the answer's order; `row` is the item's in the catalogue of the moment (-1: not there) and
    `place` its number among `ranked` (None: no candidate).
    """

    question: Question
    vector: Vector
    ranked: Ranked
    wide: Wide
    scope: Scope
    item_id: str
    row: int
    place: int | None


def explain(stack: Stack, request: pb.ExplainRequest, call: Call) -> pb.ExplainResponse:
    """The answer to Explain. Raises what Recommend raises for the same question, and BadRequest."""
    item_id = id_of(request.item_id, "item_id")
    case = _case(stack, question_of(stack, request.question, call), item_id, call)
    response = pb.ExplainResponse(
        known=case.row >= 0,
        withdrawn=_withdrawn(case),
        seen=item_id in case.question.asker.seen or item_id in seen_items(case.question.asker.view),
        excluded=item_id in case.question.excluded,
        filtered=case.row >= 0 and not case.wide.lets_through(case.scope, case.row),
        candidates=case.ranked.candidates,
        fanout=case.question.sizes.fanout,
        k=case.question.sizes.k,
        task=case.question.task,
        provenance=provenance(stack, ranked=True),
        request_id=call.request_id,
    )
    response.outcome = _outcome(response, case)
    response.detail = _detail(response.outcome, case)
    with call.watch("search"):
        # A dense list may be read deeper than it was for the answer: its head stays what it is.
        deeper = case.place is None and case.wide.hybrid is None
        lists = case.wide.lists(case.vector, MAX_FANOUT if deeper else case.question.sizes.fanout, case.scope)
        response.lists.extend(_list_place(one, case) for one in lists)
    _fill_numbers(response, stack, case, call)
    with call.watch("order"):
        response.prompts.extend(_prompts(stack, case))
    response.times.CopyFrom(call.times())
    return response


def _case(stack: Stack, question: Question, item_id: str, call: Call) -> Case:
    """The question, answered with as many items as there are candidates, so that every one of them has its place."""
    vector = vector_of(stack, question.asker, call)
    ranked = stack.recommender.recommend(
        question.asker.view,
        question.sizes.fanout,
        question.sizes.fanout,
        exclude=question.unwanted,
        task=question.task,
        weights=question.weights,
        vector=vector,
        wanted=question.wanted,
        watch=call.watch,
    )
    wide = Wide.over(stack.recommender.retriever)
    scope = wide.scope(question.asker.view, question.unwanted, question.wanted)
    row = int(wide.catalog.rows([item_id])[0])
    place = ranked.ids.index(item_id) if item_id in ranked.ids else None
    return Case(question, vector, ranked, wide, scope, item_id, row, place)


def _withdrawn(case: Case) -> bool:
    moment = case.wide.moment
    before = int(moment.snapshot.ids.rows([case.item_id])[0]) >= 0
    return case.row < 0 and (before or case.item_id in moment.ids(np.arange(moment.first_live, moment.count)))


def _outcome(response: pb.ExplainResponse, case: Case) -> pb.Outcome:
    if case.place is not None:
        return pb.RETURNED if case.place < case.question.sizes.k else pb.OUTRANKED
    reasons = (
        (response.withdrawn, pb.WITHDRAWN),
        (not response.known, pb.NOT_IN_CATALOGUE),
        (response.seen, pb.SEEN),
        (response.excluded, pb.EXCLUDED),
        (response.filtered, pb.FILTERED),
    )
    return next((outcome for true, outcome in reasons if true), pb.NOT_RETRIEVED)


def _detail(outcome: pb.Outcome, case: Case) -> str:
    """The outcome as a sentence."""
    k, name, candidates = case.question.sizes.k, repr(case.item_id[:80]), case.ranked.candidates
    if case.place is not None:
        stands = f"{name} is number {case.place + 1:,} of {candidates:,} ranked candidates, and {k:,} were asked for"
        return stands if outcome == pb.RETURNED else f"{stands}: {case.place - k + 1:,} too far down"
    return {
        pb.WITHDRAWN: f"{name} was taken out of the catalogue",
        pb.NOT_IN_CATALOGUE: f"the catalogue holds no {name}",
        pb.SEEN: f"the member has engaged with {name}, and what was seen is not recommended again",
        pb.EXCLUDED: f"the request excludes {name}",
        pb.FILTERED: f"the request's filter does not let {name} through",
    }.get(outcome, f"{name} is not among the {candidates:,} candidates that the first stage found")


def _list_place(listed: Listed, case: Case) -> pb.ListPlace:
    place = pb.ListPlace(list=listed.name, length=len(listed.rows))
    found = np.flatnonzero(listed.rows == case.row)  # no list holds row -1
    if found.size:
        place.place = int(found[0])
        if listed.weight is not None and case.wide.hybrid is not None:
            place.adds = listed.weight / (case.wide.hybrid.settings.constant + place.place + 1)
    return place


def _fill_numbers(response: pb.ExplainResponse, stack: Stack, case: Case, call: Call) -> None:
    """Cosine, probability, and the places and score of both stages are in the response, as far as they exist."""
    if case.row < 0:
        return
    row, ranked, place = np.array([case.row], np.int64), case.ranked, case.place
    response.cosine = float(case.wide.cosines(case.vector, row)[0])
    if place is None:
        asked = stack.recommender.weighed(case.question.task, case.question.weights)
        view = case.question.asker.view
        columns = stack.recommender.columns(view, row, asked, vector=case.vector, watch=call.watch)
        nothing: Topics = frozenset()
        known = nothing.union(*stack.recommender.topics(ranked.rows))
        response.probability = float(stack.recommender.final(view, row, columns, asked, known).scores[0])
        return
    response.place, response.first_place = place, int(ranked.places[place])
    if ranked.scores is not None and ranked.probabilities is not None:
        response.first_score, response.probability = float(ranked.scores[place]), float(ranked.probabilities[place])


def _prompts(stack: Stack, case: Case) -> list[pb.Prompt]:
    """What the models read of the member and, if the catalogue holds it, of the item."""
    view, catalog, writer, ranker = case.question.asker.view, stack.catalog, stack.encoder.writer, stack.ranker
    found = [_prompt("encoder", "member", writer.tokens, writer.members([view])[0])]
    if ranker is not None:
        found.append(_prompt("ranker", "member", ranker.prompts.tokens, ranker.prefix(view, case.question.task)))
    if case.row < 0:
        return found
    numbers = number_columns([catalog.numbers(case.row)], catalog.as_of_names)
    found.append(_prompt("encoder", "item", writer.tokens, writer.items([catalog.item(case.row)], numbers)[0]))
    if ranker is not None:
        relation = relations_of(view.connections, catalog.words("creator", [case.row]))[0]
        tokens = [*catalog.tokens([case.row])[0].tolist(), *ranker.prompts.suffix(relation)]
        found.append(_prompt("ranker", "item", ranker.prompts.tokens, tokens))
    return found


def _prompt(model: str, row: str, tokens: Tokens, ids: Sequence[int]) -> pb.Prompt:
    return pb.Prompt(model=model, row=row, text=tokens.text(ids), tokens=len(ids))
