"""A real gRPC server over a tiny night: what it answers, what it refuses and with which status, and that it equals its local twin."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from index.manifest import SnapshotMismatch
from index.store import open_store
from ranking.pipeline import Degraded, Recommender
from ranking.prompts import RankBudgets, RankPrompts
from ranking.ranker import Ranker, RankerFacts, labels_of, save_ranker
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.answers import Call
from ranking.serving.client import Client, ServiceError
from ranking.serving.health import HealthService
from ranking.serving.messages import BadRequest, pack_ids, unpack_ids
from ranking.serving.server import CannotListen, ServeSettings, check_address, run_server
from ranking.serving.service import RecommenderService
from ranking.serving.stack import NotServable, Stack, open_stack
from ranking.serving.status import TABLE, message_of, status_of
from ranking.serving.worker import Worker
from ranking.tasks import tasks_of
from retrieval.data.schema import Connection, Dataset, Engagement, Item, Member, MemberView
from retrieval.encoder import Encoder, save_encoder
from retrieval.features import Quantizer
from retrieval.fingerprint import FingerprintMismatch
from retrieval.llama import Size, new_llama
from retrieval.members import MemberStore
from retrieval.moments import end_of
from retrieval.records import ItemWords, records_of, view_of
from retrieval.refresh import nightly
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer

SIZE = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48)
SERVICE = "brewline.v1.Recommender"


class Town:
    """Folders of a tiny night: two encoders, two rankers, one store made with the first of each."""

    def __init__(self, folder: Path, dataset: Dataset, quantizer: Quantizer, tokens: Tokens) -> None:
        self.folder, self.dataset = folder, dataset
        writer = Writer(tokens, quantizer, Budgets(item=32, member=96), ("like",))
        prompts, tasks = RankPrompts(tokens, quantizer, RankBudgets()), tasks_of(dataset)
        for seed in (1, 2):
            torch.manual_seed(seed)
            encoder = new_llama(SIZE, len(tokens), causal_lm=False)
            fingerprint = save_encoder(folder / f"encoder{seed}", encoder, writer, {"seed": seed})
            facts = RankerFacts(tasks, labels_of(tokens, tasks), RankBudgets(), {}, fingerprint, {"seed": seed})
            save_ranker(folder / f"ranker{seed}", new_llama(SIZE, len(tokens), causal_lm=True), prompts, facts)
        free = replace(facts, encoder=None, training={"seed": 3})
        save_ranker(folder / "ranker3", new_llama(SIZE, len(tokens), causal_lm=True), prompts, free)
        self.store, self.encoder, self.ranker = folder / "store", folder / "encoder1", folder / "ranker1"
        self.store.mkdir()
        reader = Encoder.load(self.encoder)
        members = MemberStore(open_store(f"sqlite:{self.store / 'members.sqlite'}"), reader.fingerprint)
        nightly(dataset, reader, Ranker.load(self.ranker), self.store, end_of(dataset), members)

    def views(self) -> list[MemberView]:
        """Every member as the data folder describes them."""
        words = ItemWords(self.dataset.items)
        return [view_of(record, words) for record in records_of(self.dataset, end_of(self.dataset))]


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset, tiny_quantizer: Quantizer, tiny_tokens: Tokens) -> Town:
    return Town(tmp_path_factory.mktemp("town"), tiny_dataset, tiny_quantizer, tiny_tokens)


@pytest.fixture(scope="module")
def stack(town: Town) -> Stack:
    return open_stack(town.store, town.encoder, town.ranker, None)


class Running:
    """A server in a thread of its own, stopped by `stop`."""

    def __init__(self, stack: Stack, **settings: object) -> None:
        self.ready = threading.Event()
        self.port = 0
        self._stack, self._settings = stack, ServeSettings(port=0, drain_s=5.0, **settings)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self.ready.wait(20)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await run_server(self._stack, self._settings, self._bound, self._stop)

    def _bound(self, port: int) -> None:
        self.port = port
        self.ready.set()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[Running]:
    running = Running(stack)
    yield running
    running.stop()


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}") as found:
        yield found


@pytest.fixture
def stub(server: Running) -> Iterator[recommender_pb2_grpc.RecommenderStub]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield recommender_pb2_grpc.RecommenderStub(channel)


def status(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """The status and the words of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_the_served_answer_is_the_local_one(client: Client, stack: Stack, town: Town) -> None:
    for row in (0, 3, 8, 21):
        view = town.views()[row]
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


def test_history_and_exclusions_never_come_back(client: Client, town: Town) -> None:
    for row in (0, 5, 9):
        view = town.views()[row]
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


@pytest.mark.parametrize(
    ("method", "request_", "code", "words"),
    [
        ("Recommend", pb.RecommendRequest(member=pb.Member(id="nobody")), "NOT_FOUND", "nobody"),
        ("Retrieve", pb.RetrieveRequest(member=pb.Member(id="nobody")), "NOT_FOUND", "nobody"),
        ("Recommend", pb.RecommendRequest(), "INVALID_ARGUMENT", "member: neither"),
        ("Recommend", pb.RecommendRequest(member=pb.Member(id="x" * 600)), "INVALID_ARGUMENT", "member.id"),
        ("Recommend", pb.RecommendRequest(member=pb.Member(id="m1"), k=10_001), "INVALID_ARGUMENT", "k: 10,001"),
        ("Recommend", pb.RecommendRequest(member=pb.Member(id="m1"), k=9, fanout=8), "INVALID_ARGUMENT", "fanout: 8"),
        ("Recommend", pb.RecommendRequest(member=pb.Member(id="m1"), task="dance"), "INVALID_ARGUMENT", "dance"),
        ("Retrieve", pb.RetrieveRequest(member=pb.Member(id="m1"), k=20_001), "INVALID_ARGUMENT", "k: 20,001"),
        (
            "Recommend",
            pb.RecommendRequest(member=pb.Member(id="m1"), instruction="é" * 1_025),
            "INVALID_ARGUMENT",
            "instruction: 2,050 bytes",
        ),
        ("Rank", pb.RankRequest(member=pb.Member(id="m1")), "INVALID_ARGUMENT", "items: none"),
        (
            "Rank",
            pb.RankRequest(member=pb.Member(id="m1"), items=pb.Ids(plain=["i1", "i99"])),
            "NOT_FOUND",
            "items[1]: 'i99'",
        ),
        (
            "Rank",
            pb.RankRequest(member=pb.Member(id="m1"), items=pb.Ids(plain=["i1"], packed=b"i2")),
            "INVALID_ARGUMENT",
            "items: plain and packed",
        ),
        (
            "Recommend",
            pb.RecommendRequest(member=pb.Member(id="m1"), exclude=pb.Ids(packed=b"i2", ends=b"\1")),
            "INVALID_ARGUMENT",
            "exclude.ends",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_typed_status(
    stub: recommender_pb2_grpc.RecommenderStub, method: str, request_: object, code: str, words: str
) -> None:
    calls = {"Recommend": stub.Recommend, "Retrieve": stub.Retrieve, "Rank": stub.Rank}
    seen, details = status(lambda: calls[method](request_, timeout=10))
    assert seen.name == code
    assert words in details and "Traceback" not in details


@pytest.mark.parametrize(
    ("described", "code", "words"),
    [
        (pb.Description(history=[pb.Engagement(item_id="i999")]), "NOT_FOUND", "history[0]"),
        (pb.Description(history=[pb.Engagement()]), "INVALID_ARGUMENT", "history[0].item_id"),
        (pb.Description(history=[pb.Engagement(item_id="i1")] * 2_049), "INVALID_ARGUMENT", "2,049 entries"),
        (pb.Description(profile=[pb.ProfileField(words="x")]), "INVALID_ARGUMENT", "profile[0].name"),
        (pb.Description(profile=[pb.ProfileField(name="a", words="x")] * 2), "INVALID_ARGUMENT", "profile[1].name"),
        (pb.Description(profile=[pb.ProfileField(name="a", number=math.nan)]), "INVALID_ARGUMENT", "not finite"),
        (pb.Description(profile=[pb.ProfileField(name="a", words="x" * 16_385)]), "INVALID_ARGUMENT", "16,385 bytes"),
        (pb.Description(connections=[pb.Connection(kind="follows")]), "INVALID_ARGUMENT", "connections[0].other_id"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(
    stub: recommender_pb2_grpc.RecommenderStub, described: pb.Description, code: str, words: str
) -> None:
    seen, details = status(lambda: stub.Retrieve(pb.RetrieveRequest(member=pb.Member(description=described)), timeout=10))
    assert (seen.name, words in details) == (code, True), details


def test_bytes_that_are_no_message_are_an_invalid_argument(server: Running) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        raw = channel.unary_unary(f"/{SERVICE}/Recommend")
        assert status(lambda: raw(b"\xff\xff\xff\xff", timeout=10))[0] is grpc.StatusCode.INVALID_ARGUMENT
        huge = b"\x2a" + b"\xff" * (5 << 20)
        assert status(lambda: raw(huge, timeout=10))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    with Client(f"127.0.0.1:{server.port}") as client:
        assert len(client.recommend("m1", 3)) == 3


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


def slowed(stack: Stack, seconds: float) -> Stack:
    """The same stack with a ranker that takes its time, and no idea yet how long."""

    class Slow(Ranker):
        def __init__(self) -> None:
            assert stack.ranker is not None
            self.facts, self.fingerprint, self.engine = stack.ranker.facts, stack.ranker.fingerprint, stack.ranker.engine
            self.quick = True

        def score(
            self, view: MemberView, item_tokens: Sequence[Sequence[int]], task: str = "", relations: Sequence[str] | None = None
        ) -> np.ndarray:
            assert stack.ranker is not None
            if not self.quick:
                time.sleep(seconds)
            self.quick = False  # the warm-up is quick, so the forecast is wrong
            return stack.ranker.score(view, item_tokens, task, relations)

    return replace(stack, ranker=Slow(), recommender=Recommender(stack.recommender.retriever, Slow()))


def test_lateness_degrades_openly_or_is_a_deadline(stack: Stack) -> None:
    running = Running(slowed(stack, 1.2))
    try:
        with Client(f"127.0.0.1:{running.port}") as client:
            surprised = client.recommend("m1", 5, deadline_ms=700)
            assert surprised.degraded is Degraded.RETRIEVAL_ORDER and surprised.probabilities is None
            assert "still running" in surprised.degraded_detail
            with pytest.raises(ServiceError) as caught:
                client.recommend("m1", 5, deadline_ms=100)  # waits behind the first, which still ranks
            assert caught.value.code == "DEADLINE_EXCEEDED"
            time.sleep(0.8)
            forewarned = client.recommend("m1", 5, deadline_ms=700)
            assert forewarned.degraded is Degraded.RETRIEVAL_ORDER
            assert "ms were left" in forewarned.degraded_detail
            assert forewarned.ids == surprised.ids == client.retrieve("m1", 5).ids
            assert client.recommend("m1", 5).degraded is Degraded.NONE
    finally:
        running.stop()


def test_overload_is_shed_and_a_stop_lets_running_work_finish(stack: Stack) -> None:
    running = Running(slowed(stack, 0.6), most_waiting=1)
    answers: list[object] = []

    def ask() -> None:
        with Client(f"127.0.0.1:{running.port}") as client:
            try:
                answers.append(len(client.recommend("m1", 5)))
            except ServiceError as error:
                answers.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    running.stop()
    for thread in threads:
        thread.join(10)
    assert sorted(map(str, answers)) == ["5", "5", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"]


def test_a_bug_is_internal_with_a_request_id_and_the_next_request_succeeds(
    stack: Stack, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class Explodes(Ranker):
        def __init__(self) -> None:
            assert stack.ranker is not None
            self.facts, self.fingerprint, self.engine = stack.ranker.facts, stack.ranker.fingerprint, stack.ranker.engine
            self.left = 1

        def score(self, *rest: object) -> np.ndarray:
            self.left -= 1
            if self.left == -1:
                raise ZeroDivisionError("the password is hunter2")
            assert stack.ranker is not None
            return stack.ranker.score(*rest)

    running = Running(replace(stack, recommender=Recommender(stack.recommender.retriever, Explodes())))
    try:
        with Client(f"127.0.0.1:{running.port}") as client:
            with caplog.at_level(logging.INFO), pytest.raises(ServiceError) as caught:
                client.recommend("m1", 5)
            assert caught.value.code == "INTERNAL"
            assert "hunter2" not in caught.value.details
            (request_id,) = re.findall(r"request id ([0-9a-f]{32})", caught.value.details)
            logged = caplog.text + "".join(capsys.readouterr())
            assert request_id in logged and "ZeroDivisionError" in logged
            assert len(client.recommend("m1", 5)) == 5
    finally:
        running.stop()


def test_health_runs_a_real_search(server: Running, stack: Stack) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watched = health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(iter(watched)).status == health_pb2.HealthCheckResponse.SERVING
        watched.cancel()
        unknown = status(lambda: health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10))
        assert unknown[0] is grpc.StatusCode.NOT_FOUND


async def test_health_says_when_the_search_is_broken(stack: Stack) -> None:
    @dataclass(frozen=True)
    class BrokenRecommender(Recommender):
        fail: list[bool] = field(default_factory=lambda: [True])

        def retrieve(self, *_rest: object, **_named: object) -> object:
            raise RuntimeError("no index")

    worker = Worker()
    broken = RecommenderService(replace(stack, recommender=BrokenRecommender(stack.recommender.retriever)), worker)
    assert await HealthService(broken, worker).state() == health_pb2.HealthCheckResponse.NOT_SERVING
    good = HealthService(RecommenderService(stack, worker), worker, fresh_s=0.0)
    assert await good.state() == health_pb2.HealthCheckResponse.SERVING
    worker.draining = True
    assert await good.state() == health_pb2.HealthCheckResponse.NOT_SERVING
    worker.close()


def test_reflection_tells_the_whole_contract(server: Running) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        known = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "grpc.health.v1.Health"} <= set(known.get_services())
        told = known.FindFileContainingSymbol(SERVICE)
        assert [method.name for method in told.service[0].method] == ["Recommend", "Retrieve", "Rank", "Info"]


def test_models_of_another_night_are_refused_with_both_values(town: Town) -> None:
    first, second = (Encoder.load(town.folder / f"encoder{seed}").fingerprint for seed in (1, 2))
    with pytest.raises(SnapshotMismatch) as wrong_encoder:
        open_stack(town.store, town.folder / "encoder2", None, None)
    assert first in str(wrong_encoder.value) and second in str(wrong_encoder.value)
    with pytest.raises(FingerprintMismatch) as wrong_pair:
        open_stack(town.store, town.encoder, town.folder / "ranker2", None)
    assert first in str(wrong_pair.value) and second in str(wrong_pair.value)
    with pytest.raises(FingerprintMismatch) as wrong_ranker:
        open_stack(town.store, town.encoder, town.folder / "ranker3", None)
    for seed in (1, 3):
        assert Ranker.load(town.folder / f"ranker{seed}").fingerprint in str(wrong_ranker.value)


def test_missing_folders_are_one_clear_line(town: Town, tmp_path: Path) -> None:
    for store, encoder, ranker, words in (
        (tmp_path / "no", town.encoder, None, "--store"),
        (tmp_path, town.encoder, None, "nothing was published"),
        (town.store, tmp_path / "no", None, "--encoder"),
        (town.store, town.encoder, tmp_path / "no", "--ranker"),
    ):
        with pytest.raises(NotServable, match=words) as caught:
            open_stack(store, encoder, ranker, None)
        assert "\n" not in str(caught.value)


def test_retrieval_alone_can_be_served(town: Town) -> None:
    running = Running(open_stack(town.store, town.encoder, None, None))
    try:
        with Client(f"127.0.0.1:{running.port}") as client:
            assert len(client.retrieve("m1", 5)) == 5
            assert client.info().ranker == "" and client.info().tasks == []
            for call in (lambda: client.recommend("m1", 5), lambda: client.rank("m1", ["i1"])):
                with pytest.raises(ServiceError, match="--ranker") as caught:
                    call()
                assert caught.value.code == "FAILED_PRECONDITION"
    finally:
        running.stop()


def test_a_taken_port_and_a_public_address_are_refused(server: Running) -> None:
    with pytest.raises(CannotListen, match=rf"127\.0\.0\.1:{server.port} \(Address already in use\)"):
        check_address(ServeSettings(port=server.port))
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(CannotListen, match="--insecure-public"):
            check_address(ServeSettings(host=host, port=0))
    check_address(ServeSettings(host="localhost", port=0))
    check_address(ServeSettings(host="0.0.0.0", port=0, insecure_public=True))
    with pytest.raises(CannotListen, match="cannot listen"):
        check_address(ServeSettings(host="192.0.2.1", port=0, insecure_public=True))


def test_a_client_without_a_server_says_so() -> None:
    with (
        Client("127.0.0.1:1", deadline_ms=500) as client,
        pytest.raises(ServiceError, match=r"127\.0\.0\.1:1 says UNAVAILABLE") as caught,
    ):
        client.info()
    assert "\n" not in str(caught.value)


def test_each_of_our_errors_has_one_status() -> None:
    kinds = [kind for kind, _ in TABLE]
    assert len(set(kinds)) == len(kinds)
    for place, kind in enumerate(kinds):
        assert not any(issubclass(kind, before) for before in kinds[:place]), "a row that nothing can reach"
    assert status_of(ZeroDivisionError()) is grpc.StatusCode.INTERNAL
    assert "r1" in message_of(ZeroDivisionError("secret"), "r1") and "secret" not in message_of(ZeroDivisionError("secret"), "r1")


def test_times_never_fall_short_of_their_parts() -> None:
    call = Call("r", time.monotonic())
    call.started = call.arrived
    call.watch.micros = {"rank": 10**9}
    assert call.times().total_us >= 10**9
