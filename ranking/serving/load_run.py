"""The load generator, a process of its own: it sends when the schedule says so, whatever became of the requests before.

A generator that waits for an answer before it sends the next request hides exactly the moments that matter: while the server
stands still, nothing is asked and nothing is late (coordinated omission). Here every request has its time in the schedule, and
its latency counts from there, so a generator that falls behind makes the figures worse, never better.

    python -m ranking.serving.load_run < plan.json > outcome.json

What it shows the server it reads where every client does, in the environment (`Credentials.from_environment`): no plan, no
command line and no outcome holds a token.

No torch and no models here: on a machine with few cores they would take from the server what is to be measured.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field

import grpc

from index.errors import BrewlineError
from ranking.serving import recommender_pb2 as pb
from ranking.serving.security_client import Credentials, tls_of

CONNECTIONS = 32
"""Requests take them in turn, so that none waits for another one's bytes on the way, and so that chance, which deals connections
to a server's workers, deals many: of four, three once went to one worker and hid a third of what two can do."""
CONNECT_S = 5.0
HEAD_START_S = 0.2
REPLIES: dict[str, type[pb.RecommendResponse] | type[pb.RetrieveResponse]] = {
    "Recommend": pb.RecommendResponse,
    "Retrieve": pb.RetrieveResponse,
}
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]

Ask = Callable[[bytes, float], Awaitable[bytes]]


@dataclass(frozen=True)
class Plan:
    """What to send: `requests` are messages of `method` in base64, taken in turn.

    Open loop: one at each of `at`, seconds from the start in rising order. Closed loop (`at` empty): each of `concurrency`
    callers asks as soon as it was answered, until `seconds` are over.

    With `enough_late` the open loop sends nothing more once so many failed, were degraded or took longer than `limit_ms`: what is
    to be found out is then known, and nothing that was due before is left out.
    """

    address: str
    method: str
    requests: list[str]
    deadline_s: float
    at: list[float] = field(default_factory=list)
    concurrency: int = 0
    seconds: float = 0.0
    limit_ms: float = 0.0
    enough_late: int = 0


@dataclass
class Outcome:
    """What became of each request, column by column, in the order of sending.

    `at`: scheduled, seconds from `started` (`time.monotonic()`, one clock for all processes of a machine). `late_ms`: sent so
    much after that. `ms`: answered so much after that. `code`: gRPC status. `degraded`: as in the contract. `snapshot`: place
    in `snapshots`, `model` in `models` ("ENCODER|RANKER", as the answer names them), -1 without an answer. `inside_us`: the
    server's own time without encode, search and rank, `total_us` all of it.
    """

    started: float = 0.0
    cpu_share: float = 0.0
    wall_s: float = 0.0
    snapshots: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    degraded: list[int] = field(default_factory=list)
    snapshot: list[int] = field(default_factory=list)
    model: list[int] = field(default_factory=list)
    inside_us: list[int] = field(default_factory=list)
    total_us: list[int] = field(default_factory=list)


class Sender:
    """Asks and keeps what became of it."""

    def __init__(self, plan: Plan, asks: list[Ask]) -> None:
        self._asks, self._deadline_s = asks, plan.deadline_s
        self._limit_ms, self._enough_late, self._late = plan.limit_ms, plan.enough_late, 0
        self._requests = [base64.b64decode(one) for one in plan.requests]
        self._reply = REPLIES[plan.method]
        self._snapshots: dict[str, int] = {}
        self._models: dict[str, int] = {}
        self.outcome = Outcome()

    def close(self) -> Outcome:
        """The outcome, with the names that its columns `snapshot` and `model` point to."""
        self.outcome.snapshots, self.outcome.models = list(self._snapshots), list(self._models)
        return self.outcome

    @property
    def enough(self) -> bool:
        """Whether what the plan wants to know is known."""
        return 0 < self._enough_late <= self._late

    async def send(self, number: int, at: float) -> None:
        """The outcome has one row more, for request `number` of the schedule."""
        sent = time.monotonic()
        ask, request = self._asks[number % len(self._asks)], self._requests[number % len(self._requests)]
        raw, code = b"", 0
        try:
            raw = await ask(request, self._deadline_s)
        except grpc.aio.AioRpcError as error:
            code = int(error.code().value[0])
        self._keep(at, sent, time.monotonic(), code, raw)

    def _keep(self, at: float, sent: float, done: float, code: int, raw: bytes) -> None:
        outcome = self.outcome
        due = outcome.started + at
        outcome.at.append(round(at, 6))
        outcome.late_ms.append(round((sent - due) * 1e3, 3))
        outcome.ms.append(round((done - due) * 1e3, 3))
        outcome.code.append(code)
        reply = self._reply.FromString(raw)
        times, made = reply.times, reply.provenance
        outcome.degraded.append(int(reply.degraded))
        outcome.snapshot.append(_place(self._snapshots, made.snapshot) if made.snapshot else -1)
        outcome.model.append(_place(self._models, f"{made.encoder}|{made.ranker}") if made.snapshot else -1)
        outcome.total_us.append(times.total_us)
        outcome.inside_us.append(times.total_us - times.encode_us - times.search_us - times.rank_us)
        self._late += code != 0 or reply.degraded != 0 or outcome.ms[-1] > self._limit_ms


def _place(names: dict[str, int], name: str) -> int:
    return names.setdefault(name, len(names))


async def open_loop(sender: Sender, at: list[float]) -> None:
    """Every request was sent at its time, or as soon after as the generator could, until it was enough, and all have ended."""
    running: set[asyncio.Task[None]] = set()
    for number, due in enumerate(at):
        # Behind schedule, too, the loop gets its turn: what is sent late must still be sent, and what is answered be seen.
        await asyncio.sleep(max(sender.outcome.started + due - time.monotonic(), 0))
        if sender.enough:
            break
        task = asyncio.create_task(sender.send(number, due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def closed_loop(sender: Sender, concurrency: int, seconds: float) -> None:
    """So many callers have asked one thing after another for `seconds`."""
    started = sender.outcome.started
    numbers = iter(range(sys.maxsize))

    async def caller() -> None:
        await asyncio.sleep(started - time.monotonic())
        while (now := time.monotonic() - started) < seconds:
            await sender.send(next(numbers), now)

    await asyncio.gather(*(caller() for _ in range(concurrency)))


async def run(plan: Plan, credentials: Credentials) -> Outcome:
    """The plan was carried out. Raises TimeoutError if nobody listens at the address, CertificateError, TokenError."""
    tls = tls_of(plan.address, credentials)
    channels = [_channel(plan.address, tls) for _ in range(CONNECTIONS)]
    try:
        await asyncio.wait_for(asyncio.gather(*(channel.channel_ready() for channel in channels)), CONNECT_S)
        sender = Sender(plan, [_ask(channel, plan.method, credentials.metadata) for channel in channels])
        sender.outcome.started = time.monotonic() + HEAD_START_S
        cpu = time.process_time()
        if plan.at:
            await open_loop(sender, plan.at)
        else:
            await closed_loop(sender, plan.concurrency, plan.seconds)
        sender.outcome.wall_s = time.monotonic() - sender.outcome.started
        sender.outcome.cpu_share = (time.process_time() - cpu) / (sender.outcome.wall_s + HEAD_START_S)
        return sender.close()
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


def _channel(address: str, tls: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    return grpc.aio.secure_channel(address, tls, options=OPTIONS)


def _ask(channel: grpc.aio.Channel, method: str, metadata: tuple[tuple[str, str], ...]) -> Ask:
    call = channel.unary_unary(f"/{pb.DESCRIPTOR.services_by_name['Recommender'].full_name}/{method}")

    async def ask(request: bytes, deadline_s: float) -> bytes:
        return bytes(await call(request, timeout=deadline_s if math.isfinite(deadline_s) else None, metadata=metadata))

    return ask


def main() -> None:
    """Reads a plan on stdin, carries it out, and writes the outcome on stdout."""
    plan = Plan(**json.load(sys.stdin))
    try:
        outcome = asyncio.run(run(plan, Credentials.from_environment()))
    except TimeoutError:
        sys.exit(f"nobody answers at {plan.address}")
    except BrewlineError as error:
        sys.exit(str(error))
    json.dump(asdict(outcome), sys.stdout)


if __name__ == "__main__":
    main()
