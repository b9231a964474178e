"""The service on many machines by Ray Serve: encoder, shards and ranker as deployments of their own, one gRPC ingress.

    serve run examples/deploy/serve.yaml

The contract is the single server's, and so are the answers. What reads is offered: Recommend, Retrieve, RetrieveBatch, Rank,
Info. Serve's proxy knows neither TLS nor our tokens, so the cluster stands on a network that strangers do not reach, behind
something that asks for both. It does not hand on a caller's deadline; `timeout_s` stands for it. A new night is a new deployment.
Ray is imported where it is used (extra `cluster`).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from index.errors import BrewlineError
from index.publish import current
from index.snapshot import Snapshot, read_manifest
from ranking.serving import answers
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call
from ranking.serving.batch import retrieve_batch
from ranking.serving.cluster_app_parts import (
    Ask,
    EncoderReplica,
    FarStack,
    RankerReplica,
    ShardReplica,
    far_stack,
)
from ranking.serving.service import code_version
from ranking.serving.stack import NotServable, Stack, default_members
from ranking.serving.status import Late, Overloaded, message_of, status_of
from ranking.serving.swap_look import Source

SERVICER = "ranking.serving.recommender_pb2_grpc.add_RecommenderServicer_to_server"
"""What Serve's gRPC options name."""
THREADS = 16
"""Requests that one ingress works on: each mostly waits for others' work."""
QUEUED = 64
"""Requests that one ingress lets wait for a deployment before it refuses; the single server's `--most-waiting`."""
RETRY_S = 0.5

log = logging.getLogger(__name__)


class ClusterAppError(BrewlineError):
    """The application cannot be built from these settings."""


@dataclass(frozen=True)
class ClusterSettings:
    """Folders that every machine sees under the same path, and the most replicas of each deployment.

    The shards are those of the published snapshot (`brewline nightly --shards`), one if it is not divided; `exact` searches them
    exactly whatever their index is. Of the snapshot a machine needs only what its replicas open.
    """

    store: str
    encoder: str
    ranker: str = ""
    members: str = ""
    exact: bool = True
    timeout_s: float = 2.0
    most_encoders: int = 4
    most_searches: int = 4
    most_rankers: int = 16
    most_ingresses: int = 4

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> ClusterSettings:
        """The settings of a Serve configuration, whose values may be words. Raises ClusterAppError."""
        kinds = {one.name: str(one.type) for one in fields(cls)}
        unknown, lacking = sorted(set(given) - set(kinds)), sorted({"store", "encoder"} - set(given))
        if unknown or lacking:
            raise ClusterAppError(f"unknown settings {unknown}, missing {lacking}; known are {', '.join(kinds)}")
        try:
            return cls(**{name: READ[kinds[name]](str(value)) for name, value in given.items()})
        except (ValueError, KeyError) as error:
            raise ClusterAppError(f"{error}: expected numbers, and true or false for exact") from error

    @property
    def source(self) -> Source:
        """Where the night comes from."""
        store, ranker = Path(self.store), Path(self.ranker) if self.ranker else None
        return Source(store, Path(self.encoder), ranker, self.members or default_members(store))


READ: Mapping[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda word: {"true": True, "false": False}[word.lower()],
}


class Ingress:
    """Answers the contract's calls: reads requests, asks the other deployments, puts answers together. No model, no torch."""

    def __init__(
        self, settings: ClusterSettings, published: str, encoder: Any, shards: Sequence[Any], ranker: Any = None
    ) -> None:
        """`published` is the snapshot's folder that the shards are of; the last three are Serve's handles."""
        self._settings, self._published, self._handles = settings, Path(published), (encoder, tuple(shards), ranker)
        self._threads = ThreadPoolExecutor(THREADS, "request")
        self._opening = asyncio.Lock()
        self._stack: FarStack | None = None
        self._since, self._requests = time.monotonic(), 0

    async def Recommend(self, request: pb.RecommendRequest, grpc_context: Any) -> pb.RecommendResponse:
        """See the contract."""
        return await self._answer(answers.recommend, request, grpc_context, pb.RecommendResponse())

    async def Retrieve(self, request: pb.RetrieveRequest, grpc_context: Any) -> pb.RetrieveResponse:
        """See the contract."""
        return await self._answer(answers.retrieve, request, grpc_context, pb.RetrieveResponse())

    async def RetrieveBatch(self, request: pb.RetrieveBatchRequest, grpc_context: Any) -> pb.RetrieveBatchResponse:
        """See the contract."""
        return await self._answer(retrieve_batch, request, grpc_context, pb.RetrieveBatchResponse())

    async def Rank(self, request: pb.RankRequest, grpc_context: Any) -> pb.RankResponse:
        """See the contract."""
        return await self._answer(answers.rank, request, grpc_context, pb.RankResponse())

    async def Info(self, request: pb.InfoRequest, grpc_context: Any) -> pb.InfoResponse:
        """See the contract."""
        return await self._answer(self._info, request, grpc_context, pb.InfoResponse())

    async def check_health(self) -> None:
        """Serve asks this now and then: raises unless a tiny member is encoded and searched for."""
        stack = await self._opened()
        await asyncio.get_running_loop().run_in_executor(self._threads, stack.probe)

    async def _answer(self, work: Callable[..., Any], request: Message, grpc_context: Any, empty: Any) -> Any:
        """The answer, or an empty one under the status of what went wrong."""
        self._requests += 1
        now = time.monotonic()
        call = Call(uuid.uuid4().hex, now, now + self._settings.timeout_s)
        try:
            stack = await self._opened()
            return await asyncio.get_running_loop().run_in_executor(self._threads, _started, work, stack, request, call)
        except Exception as error:
            code = status_of(error)
            if code.name == "INTERNAL":
                log.error("request %s failed", call.request_id, exc_info=error)
            grpc_context.set_code(code)
            grpc_context.set_details(message_of(error, call.request_id))
            return empty

    async def _opened(self) -> FarStack:
        async with self._opening:
            if self._stack is None:
                loop, (encoder, shards, ranker) = asyncio.get_running_loop(), self._handles
                asks = [_asking(one, loop, self._settings.timeout_s) for one in (encoder, *shards)]
                judge = None if ranker is None else _asking(ranker, loop, self._settings.timeout_s)
                self._stack = await loop.run_in_executor(
                    self._threads, far_stack, self._settings.source, self._published, asks[0], asks[1:], judge
                )
            return self._stack

    def _info(self, stack: Stack, request: pb.InfoRequest, call: Call) -> pb.InfoResponse:
        del request, call
        moment = stack.recommender.retriever.moment
        return pb.InfoResponse(
            version=code_version(),
            provenance=answers.provenance(stack, ranked=True),
            items=moment.items,
            dims=stack.encoder.dims,
            index=moment.serving.why,
            codes=stack.snapshot.manifest.dtype,
            tasks=[] if stack.ranker is None else list(stack.ranker.tasks),
            as_of=stack.catalog.as_of,
            uptime_seconds=time.monotonic() - self._since,
            requests=self._requests,
            live_position=moment.position,
            live_items=moment.alive.size,
        )


def _started(work: Callable[..., Any], stack: FarStack, request: Message, call: Call) -> Any:
    call.started = time.monotonic()
    return work(stack.now(), request, call)


def _asking(handle: Any, loop: asyncio.AbstractEventLoop, timeout_s: float) -> Ask:
    """Asks a deployment from a thread: the loop of the replica awaits what Serve's handle returns.

    Raises Late after `timeout_s`, Overloaded where Serve lets no more requests wait, and what the replica raises.
    """
    exceptions = import_module("ray.serve.exceptions")

    async def asked(method: str, given: tuple[Any, ...]) -> Any:
        return await getattr(handle, method).remote(*given)

    def ask(method: str, *given: Any) -> Any:
        future = asyncio.run_coroutine_threadsafe(asked(method, given), loop)
        try:
            return future.result(timeout_s if method not in ("about", "name") else None)
        except TimeoutError as error:
            future.cancel()
            raise Late(f"{method} took longer than {timeout_s:.1f} s; ask again when it is quieter") from error
        except exceptions.BackPressureError as error:
            raise Overloaded(f"too many requests wait for {method}; ask again in {RETRY_S * 1e3:.0f} ms", RETRY_S) from error

    return ask


def application(args: dict[str, Any]) -> Any:
    """The Serve application of these settings (`ClusterSettings`), ready for `serve.run` or a Serve configuration.

    Raises ClusterAppError without Ray or with settings that are none, NotServable if the night is not there.
    """
    settings = ClusterSettings.read(args)
    try:
        serve = import_module("ray.serve")
    except ImportError as error:
        raise ClusterAppError(f"many machines need Ray Serve ({error}); pip install 'brewline[cluster]'") from error
    published = current(Path(settings.store))
    if published is None:
        raise NotServable(f"{settings.store}: nothing was published; run `brewline nightly` first")

    def model(kind: type, name: str, most: int, *given: Any) -> Any:
        """One request at a time in each replica: a model uses the cores that Ray gave it."""
        options = {"ray_actor_options": {"num_cpus": 1}, "max_ongoing_requests": 1, "max_queued_requests": QUEUED}
        return serve.deployment(name=name, autoscaling_config=scaling(most, 1.0), **options)(kind).bind(*given)

    night = Snapshot(published, read_manifest(published))
    encoder = model(EncoderReplica, "encoder", settings.most_encoders, settings.encoder, night.manifest.dims)
    shards = [
        model(ShardReplica, f"shard-{place}", settings.most_searches, str(published), place, settings.exact)
        for place in range(len(night.shards))
    ]
    ranker = model(RankerReplica, "ranker", settings.most_rankers, settings.ranker) if settings.ranker else None
    ingress = serve.deployment(
        name="ingress",
        autoscaling_config=scaling(settings.most_ingresses, THREADS / 2),
        max_ongoing_requests=THREADS,
        health_check_timeout_s=30,
    )(Ingress)
    return ingress.bind(settings, str(published), encoder, shards, ranker)


def scaling(most: int, target: float) -> dict[str, float]:
    """As many replicas as keep so many requests, running and waiting, at each of them: up in seconds, down in minutes."""
    return {
        "min_replicas": 1,
        "max_replicas": most,
        "target_ongoing_requests": target,
        "upscale_delay_s": 5.0,
        "downscale_delay_s": 300.0,
    }
