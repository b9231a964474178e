"""What a real server over a tiny night answers: the same as its local twin, packed as readable, with names and times."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from ranking.pipeline import Degraded, Recommender
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call
from ranking.serving.client import Client
from ranking.serving.current import Current
from ranking.serving.health import HealthService
from ranking.serving.messages import BadRequest, pack_ids, unpack_ids
from ranking.serving.service import RecommenderService
from ranking.serving.stack import Stack
from ranking.serving.worker import Worker
from retrieval.data.schema import Connection, Engagement, Item, Member, MemberView

SERVICE = "brewline.v1.Recommender"


def test_the_served_answer_is_the_local_one(client: Client, stack: Stack, views: list[MemberView]) -> None:
    for row in (0, 3, 8, 21):
        view = views[row]
        local = stack.recommender.recommend(view, 10, 30)
        by_id = client.recommend(f"m{row}", 10, fanout=30)
        described = client.recommend(view, 10, fanout=30)
        for served in (by_id, described):
            assert served.ids == local.ids
            np.testing.assert_allclose(served.probabilities, local.probabilities, atol=1e-6)
            np.testing.assert_allclose(served.scores, local.scores, atol=1e-6)
            np.testing.assert_array_equal(served.places, local.places)
            assert (served.candidates, served.degraded, served.task) == (30, Degraded.NONE, "label")


def test_retrieve_and_rank_are_the_two_halves_of_recommend(client: Client) -> None:
    whole = client.recommend("m4", 60)
    candidates = client.retrieve("m4")
    ranked = client.rank("m4", candidates.ids)
    assert ranked.ids == whole.ids
    np.testing.assert_allclose(ranked.probabilities, whole.probabilities, atol=1e-6)
    np.testing.assert_array_equal(ranked.places, whole.places)
    assert candidates.probabilities is None and ranked.scores is None
    assert [candidates.ids[place] for place in ranked.places] == ranked.ids


def test_packed_equals_readable(client: Client, stack: Stack) -> None:
    answer = client.recommend("m2", 12, readable=True)
    assert [row.item_id for row in answer.rows] == answer.ids
    np.testing.assert_array_equal(np.array([row.score for row in answer.rows], np.float32), answer.scores)
    np.testing.assert_array_equal(np.array([row.probability for row in answer.rows], np.float32), answer.probabilities)
    assert [row.place for row in answer.rows] == answer.places.tolist()
    for row in answer.rows:
        item = stack.catalog.item(stack.catalog.row(row.item_id))
        assert (row.title, row.category, row.creator) == (item.title, item.category, item.creator)
    assert client.recommend("m2", 12).rows == []
    assert all(row.score is None for row in client.rank("m2", ["i1"], readable=True).rows)


def test_every_answer_names_what_made_it_and_where_the_time_went(client: Client, stack: Stack) -> None:
    answer = client.recommend("m2", 3)
    assert stack.ranker is not None
    assert (answer.snapshot, answer.encoder, answer.ranker) == (
        stack.snapshot.name,
        stack.encoder.fingerprint,
        stack.ranker.fingerprint,
    )
    assert client.retrieve("m2", 3).ranker == ""
    parts = sum(micros for stage, micros in answer.times.items() if stage != "total_us")
    assert answer.times["total_us"] >= parts > 0
    assert answer.times["rank_us"] > 0
    assert answer.request_id != client.recommend("m2", 3).request_id
    told = client.info()
    assert (told.snapshot, told.items, told.dims, told.index) == (answer.snapshot, 60, 32, "Flat")
    assert told.tasks == list(stack.ranker.tasks) and told.attention and told.requests >= 3
    assert told.as_of == stack.catalog.as_of


def test_history_and_exclusions_never_come_back(client: Client, views: list[MemberView]) -> None:
    for row in (0, 5, 9):
        view = views[row]
        seen = {done.item.item_id for done in view.history}
        assert seen
        unwanted = client.retrieve(f"m{row}", 1).ids
        for answer in (
            client.recommend(f"m{row}", 60, exclude=[*unwanted, "nobody knows this"]),
            client.retrieve(f"m{row}", 60, exclude=unwanted),
            client.recommend(view, 60, exclude=unwanted),
        ):
            assert not ({*seen, *unwanted} & set(answer.ids))
            assert len(answer) == 60 - len(seen) - 1


def test_a_stranger_is_served_from_what_the_request_says(client: Client, stack: Stack) -> None:
    item = stack.catalog.item(7)
    known = MemberView(
        Member("", {"role": "fond of roses"}, {"age": 30.0}),
        (Engagement(item, 5, "like", 1), Engagement(Item("elsewhere", "roses in june"), 9, "like")),
        (Connection("author 1", "follows", None),),
    )
    answer = client.recommend(known, 60)
    assert len(answer) == 59 and "i7" not in answer.ids
    assert answer.ids == stack.recommender.recommend(known, 60).ids
    reordered = replace(known, history=known.history[::-1])
    assert client.recommend(reordered, 60).ids == answer.ids, "a history is put in time order on arrival"
    unnamed = replace(known, history=tuple(replace(done, action="") for done in known.history))
    assert client.retrieve(unnamed, 60).ids == client.retrieve(known, 60).ids, "an unnamed action counts as engagement"


def test_an_own_instruction_is_read(client: Client) -> None:
    plain, wish = client.recommend("m6", 60), client.recommend("m6", 60, instruction="more about chess endgames")
    assert not np.array_equal(np.sort(plain.probabilities), np.sort(wish.probabilities))


def test_ids_of_any_language_travel_packed() -> None:
    ids = ["", "é🦆", "a\x00b", "x" * 300, ""]
    assert unpack_ids(pack_ids(ids)) == ids
    assert unpack_ids(pack_ids([])) == []
    for bad in (
        pb.Ids(packed=b"ab", ends=np.array([1], "<u4").tobytes()),
        pb.Ids(packed=b"ab", ends=np.array([2, 1, 2], "<u4").tobytes()),
        pb.Ids(packed=b"\xff", ends=np.array([1], "<u4").tobytes()),
    ):
        with pytest.raises(BadRequest):
            unpack_ids(bad)


def test_health_runs_a_real_search(port: int) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watched = health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(iter(watched)).status == health_pb2.HealthCheckResponse.SERVING
        watched.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_says_when_the_search_is_broken(stack: Stack) -> None:
    @dataclass(frozen=True)
    class BrokenRecommender(Recommender):
        fail: list[bool] = field(default_factory=lambda: [True])

        def retrieve(self, *_rest: object, **_named: object) -> object:
            raise RuntimeError("no index")

    worker = Worker()
    broken = RecommenderService(Current(replace(stack, recommender=BrokenRecommender(stack.recommender.retriever))), worker)
    assert await HealthService(broken, worker).state() == health_pb2.HealthCheckResponse.NOT_SERVING
    good = HealthService(RecommenderService(Current(stack), worker), worker, fresh_s=0.0)
    assert await good.state() == health_pb2.HealthCheckResponse.SERVING
    worker.draining = True
    assert await good.state() == health_pb2.HealthCheckResponse.NOT_SERVING
    worker.close()


def test_reflection_tells_the_whole_contract(port: int) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        known = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "grpc.health.v1.Health"} <= set(known.get_services())
        told = known.FindFileContainingSymbol(SERVICE)
        assert [method.name for method in told.service[0].method] == [
            *("Recommend", "Retrieve", "RetrieveBatch", "Rank", "Explain"),
            *("UpsertItems", "WithdrawItems", "RecordEngagements", "Info"),
        ]


def test_times_never_fall_short_of_their_parts() -> None:
    call = Call("r", time.monotonic())
    call.started = call.arrived
    call.watch.micros = {"rank": 10**9}
    assert call.times().total_us >= 10**9
