"""What each call that changes something answers, as plain functions of a stack, a request and a call: no gRPC, no event loop.

An answer means that the change is kept: items on the disk, engagements in the member store.
"""

from __future__ import annotations

import time

from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import NO_MEMBERS, Call, provenance
from ranking.serving.change_messages import read_events, read_items, read_withdrawn
from ranking.serving.stack import Stack
from retrieval.members import UnknownMember


def upsert_items(stack: Stack, request: pb.UpsertItemsRequest, call: Call) -> pb.UpsertItemsResponse:
    """The answer to UpsertItems. Raises BadRequest, ChangeRefused, StoreBusy, LogBroken."""
    items = read_items(request.items, stack.catalog.static)
    with call.watch("encode"):
        position = stack.today.upsert(items, int(time.time()))
    return pb.UpsertItemsResponse(
        position=position, provenance=provenance(stack, ranked=False, retrieved=False), request_id=call.request_id
    )


def withdraw_items(stack: Stack, request: pb.WithdrawItemsRequest, call: Call) -> pb.WithdrawItemsResponse:
    """The answer to WithdrawItems. Raises BadRequest, ChangeRefused, StoreBusy, LogBroken."""
    position, here = stack.today.withdraw(read_withdrawn(request.items))
    made = provenance(stack, ranked=False, retrieved=False)
    return pb.WithdrawItemsResponse(position=position, were_here=here, provenance=made, request_id=call.request_id)


def record_engagements(stack: Stack, request: pb.RecordEngagementsRequest, call: Call) -> pb.RecordEngagementsResponse:
    """The answer to RecordEngagements. Raises BadRequest, UnknownMember without a store, StoreUnavailable."""
    told = read_events(request, stack.encoder.writer.actions, int(time.time()))
    if stack.members is None:
        raise UnknownMember(NO_MEMBERS)
    with call.watch("member"):
        recorded = stack.members.tell(request.member_id, told)
    return pb.RecordEngagementsResponse(recorded=recorded, known=len(told) - recorded, request_id=call.request_id)
