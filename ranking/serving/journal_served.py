"""What goes into the journal: answers as they leave the server, and engagements once they are acknowledged. Ids only."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np

from ranking.serving import recommender_pb2 as pb
from ranking.serving.journal import Journal
from ranking.serving.messages import unpack_ids
from ranking.serving.weights import own_probabilities
from retrieval.data.exported_journal import Done, Shown

SERVICE = "/brewline.v1.Recommender/"
RECORD_BYTES = 512
"""About what a record takes beside its items."""

log = logging.getLogger(__name__)


class Served(grpc.aio.ServerInterceptor):
    """Hands to the journal what was answered OK: every Recommend and Retrieve (alone or in a batch) for a member with an id that
    names a surface (without one it is a probe or a first stage, not something that is shown), every engagement."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._keeps: dict[str, Callable[[Any, Any, int], None]] = {
            f"{SERVICE}Recommend": self._recommended,
            f"{SERVICE}Retrieve": self._retrieved,
            f"{SERVICE}RetrieveBatch": self._retrieved_batch,
            f"{SERVICE}RecordEngagements": self._recorded,
        }

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, or one that also tells the journal."""
        handler = await continuation(handler_call_details)
        keep = self._keeps.get(handler_call_details.method)
        if handler is None or keep is None:
            return handler
        answer = handler.unary_unary

        async def behave(request: Any, context: grpc.aio.ServicerContext) -> Any:
            at = int(time.time())
            if isinstance(request, pb.RecordEngagementsRequest):
                stamp(request, at)
            response = await answer(request, context)
            try:
                keep(request, response, at)
            except Exception as error:  # the answer is made, the change is kept: a bug of the journal must not take them back
                log.exception("what %s answered is not noted in the journal", handler_call_details.method)
                self._journal.miss(type(error).__name__)
            return response

        return grpc.unary_unary_rpc_method_handler(behave, handler.request_deserializer, handler.response_serializer)

    def _recommended(self, request: pb.RecommendRequest, response: pb.RecommendResponse, at: int) -> None:
        if request.member.id and request.surface:
            self._shown(request, response, response.results, at)

    def _retrieved(self, request: pb.RetrieveRequest, response: pb.RetrieveResponse, at: int) -> None:
        if request.member.id and request.surface:
            self._shown(request, response, response.results, at)

    def _retrieved_batch(self, request: pb.RetrieveBatchRequest, response: pb.RetrieveBatchResponse, at: int) -> None:
        for one, row in zip(request.requests, response.rows):
            if one.member.id and one.surface and not row.status:
                self._shown(one, response, row.results, at)

    def _shown(
        self,
        request: pb.RecommendRequest | pb.RetrieveRequest,
        response: pb.RecommendResponse | pb.RetrieveResponse | pb.RetrieveBatchResponse,
        results: pb.Results,
        at: int,
    ) -> None:
        # Neither the request with all its words is held back nor, by a row, its whole batch.
        head = shown_of(request.member.id, request.surface, response, at)
        packed, ends = results.ids.packed, results.ids.ends
        probabilities = own_probabilities(response) if isinstance(response, pb.RecommendResponse) else results.probabilities
        size = RECORD_BYTES + len(packed) + len(ends) + len(probabilities)
        self._journal.put(lambda: [with_items(head, packed, ends, probabilities)], size)

    def _recorded(self, request: pb.RecordEngagementsRequest, response: pb.RecordEngagementsResponse, at: int) -> None:
        del response, at  # known ones too: whoever reads the journal counts an event id once
        self._journal.put(lambda: done_of(request), request.ByteSize(), len(request.events))


def stamp(request: pb.RecordEngagementsRequest, now: int) -> None:
    """Engagements without a time have this one (seconds): the member store and the journal then tell the same."""
    for event in request.events:
        event.timestamp = event.timestamp or now


def shown_of(
    member: str, surface: str, response: pb.RecommendResponse | pb.RetrieveResponse | pb.RetrieveBatchResponse, at: int
) -> Shown:
    """An answer as the journal keeps it, still without its items."""
    made = response.provenance
    ranked = isinstance(response, pb.RecommendResponse)
    degraded = 0 if isinstance(response, pb.RetrieveBatchResponse) else response.degraded
    return Shown(
        at=at,
        request=response.request_id,
        member=member,
        surface=surface,
        items=(),
        probabilities=(),
        task=response.task if ranked else "",
        degraded=pb.Degraded.Name(degraded),
        snapshot=made.snapshot,
        encoder=made.encoder,
        ranker=made.ranker,
    )


def with_items(shown: Shown, packed: bytes, ends: bytes, probabilities: bytes) -> Shown:
    """The answer with its items (the packed form of ids) and their float32 probabilities, to six digits."""
    chances = np.frombuffer(probabilities, "<f4").astype(np.float64).round(6).tolist()
    return replace(shown, items=tuple(unpack_ids(pb.Ids(packed=packed, ends=ends))), probabilities=tuple(chances))


def done_of(request: pb.RecordEngagementsRequest) -> Iterator[Done]:
    """The engagements of a request as the journal keeps them."""
    for event in request.events:
        label = int(event.liked) if event.HasField("liked") else None
        yield Done(
            request.member_id,
            event.event_id,
            event.item_id,
            event.timestamp,
            event.action,
            label,
            event.request_id,
            event.surface,
        )
