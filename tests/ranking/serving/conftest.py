"""A tiny night behind a real gRPC server, shared by the tests of the service."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from index.store import open_store
from ranking.prompts import RankBudgets, RankPrompts
from ranking.ranker import Ranker, RankerFacts, labels_of, save_ranker
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.client import Client
from ranking.serving.current import Current
from ranking.serving.load import Measured, Target, closed_load
from ranking.serving.server import ServeSettings, run_server
from ranking.serving.stack import Stack, open_stack
from ranking.tasks import tasks_of
from retrieval.data.schema import Dataset, MemberView
from retrieval.encoder import Encoder, save_encoder
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.members import MemberStore
from retrieval.moments import end_of
from retrieval.records import ItemWords, records_of, view_of
from retrieval.refresh import nightly
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer

SIZE = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48)


Start = Callable[..., tuple[int, Callable[[], None]]]
Loaded = Callable[..., AbstractContextManager[Callable[[], Measured]]]
Pause = Callable[[], Awaitable[None]]
Answering = Callable[[Pause], str]


@pytest.fixture(scope="session")
def night(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset, tiny_quantizer: Quantizer, tiny_tokens: Tokens
) -> Path:
    """A folder with encoder1, encoder2, ranker1 and ranker2 (each for its encoder), ranker3 (for any), and the store of
    the first two. Shared: do not write into it."""
    folder = tmp_path_factory.mktemp("night")
    writer = Writer(tiny_tokens, tiny_quantizer, Budgets(item=32, member=96), ("like",))
    fingerprints: list[str | None] = []
    for number in (1, 2):
        torch.manual_seed(number)
        encoder = new_llama(SIZE, len(tiny_tokens), causal_lm=False)
        fingerprints.append(save_encoder(folder / f"encoder{number}", encoder, writer, {}))
    prompts, tasks = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets()), tasks_of(tiny_dataset)
    for number, fingerprint in enumerate([*fingerprints, None], 1):
        facts = RankerFacts(tasks, labels_of(tiny_tokens, tasks), RankBudgets(), {}, fingerprint, {})
        ranker = new_llama(SIZE, len(tiny_tokens), causal_lm=True)
        save_ranker(folder / f"ranker{number}", ranker, prompts, facts)
    (folder / "store").mkdir()
    reader = Encoder.load(folder / "encoder1")
    members = MemberStore(open_store(f"sqlite:{folder / 'store' / 'members.sqlite'}"), reader.fingerprint)
    judge = Ranker.load(folder / "ranker1")
    nightly(tiny_dataset, reader, judge, folder / "store", end_of(tiny_dataset), members)
    return folder


@pytest.fixture(scope="session")
def views(tiny_dataset: Dataset) -> list[MemberView]:
    """Every member as the data folder describes them."""
    words = ItemWords(tiny_dataset.items)
    return [view_of(record, words) for record in records_of(tiny_dataset, end_of(tiny_dataset))]


@pytest.fixture(scope="session")
def stack(night: Path) -> Stack:
    """The night, opened as a server opens it."""
    return open_stack(night / "store", night / "encoder1", night / "ranker1", None)


@pytest.fixture
def copied(night: Path, tmp_path: Path) -> Path:
    """A copy of the night's store that a test may change.

    Copied by another process: SQLite keeps its locks per process and file, so closing any descriptor of the member store here
    would take the locks from under a server that has it open.
    """
    subprocess.run(["cp", "-r", night / "store", tmp_path / "store"], check=True)
    return tmp_path / "store"


class Running:
    """A server in a thread of its own."""

    def __init__(self, stack: Stack | Current, **settings: Any) -> None:
        self._ready = threading.Event()
        self.port = 0
        self._current = stack if isinstance(stack, Current) else Current(stack)
        self._settings = ServeSettings(port=0, drain_s=5.0, **settings)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._ready.wait(20)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await run_server(self._current, self._settings, self._bound, self._stop)

    def _bound(self, port: int) -> None:
        self.port = port
        self._ready.set()

    def stop(self) -> None:
        """The server is down; a second call changes nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def port(stack: Stack) -> Iterator[int]:
    """The port of a running server over the night."""
    running = Running(stack)
    yield running.port
    running.stop()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server over a stack: (port, stop). Those that the test leaves running are stopped."""
    started: list[Running] = []

    def begin(stack: Stack | Current, **settings: Any) -> tuple[int, Callable[[], None]]:
        started.append(Running(stack, **settings))
        return started[-1].port, started[-1].stop

    yield begin
    for running in started:
        running.stop()


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    """A client of the running server."""
    with Client(f"127.0.0.1:{port}") as found:
        yield found


@pytest.fixture
def stub(port: int) -> Iterator[recommender_pb2_grpc.RecommenderStub]:
    """The bare generated stub of the running server."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield recommender_pb2_grpc.RecommenderStub(channel)


@contextmanager
def _loaded(target: Target, seconds: float, callers: int, begun: int) -> Iterator[Callable[[], Measured]]:
    found: list[Measured] = []
    thread = threading.Thread(target=lambda: found.append(closed_load(target, callers, seconds)))
    with Client(target.address) as client:
        before = client.info().requests
        thread.start()
        while client.info().requests < before + begun and thread.is_alive():
            time.sleep(0.02)

    def result() -> Measured:
        thread.join(120)
        return found[0]

    try:
        yield result
    finally:
        thread.join(120)


@pytest.fixture
def loaded() -> Loaded:
    """`with loaded(target, seconds, callers, begun)`: so many ask for so long, and so many were answered; the result says what
    they were told."""
    return _loaded


class _Answerer(grpc.GenericRpcHandler):
    """Answers every method with one empty answer of one night, after what is to be waited for."""

    def __init__(self, pause: Pause) -> None:
        self._pause = pause

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """The same for every method."""
        del handler_call_details
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        del request, context
        await self._pause()
        return pb.RetrieveResponse(provenance=pb.Provenance(snapshot="one")).SerializeToString()


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Starts servers that answer after a pause, each in a thread of its own; returns the address of each."""
    ended: list[Callable[[], None]] = []

    def begin(pause: Pause) -> str:
        ready, address = threading.Event(), []
        loop, stop = asyncio.new_event_loop(), asyncio.Event()

        async def serve() -> None:
            server = grpc.aio.server()
            server.add_generic_rpc_handlers((_Answerer(pause),))
            address.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            ready.set()
            await stop.wait()
            await server.stop(0)

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
        thread.start()

        def end() -> None:
            loop.call_soon_threadsafe(stop.set)
            thread.join(20)
            loop.close()

        ended.append(end)
        assert ready.wait(20)
        return address[0]

    yield begin
    for end in ended:
        end()
