"""Starts, announces and gently stops the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ranking.serving import audit, recommender_pb2, recommender_pb2_grpc
from ranking.serving.address import CannotListen, bound, cannot_listen
from ranking.serving.current import Current
from ranking.serving.health import HealthService
from ranking.serving.intake import Intake
from ranking.serving.journal import Journal
from ranking.serving.journal_served import Served
from ranking.serving.load_shed import MOST_WAIT_S
from ranking.serving.load_shed_depth import LEAST_DEPTH
from ranking.serving.load_shed_door import Door
from ranking.serving.security import Gate
from ranking.serving.security_tls import TlsFiles, check_tls, is_loopback, server_credentials
from ranking.serving.service import RecommenderService, code_version
from ranking.serving.swap import Watcher
from ranking.serving.swap_load import leave
from ranking.serving.tokens import TokenBook, read_tokens
from ranking.serving.traces import Traces
from ranking.serving.ui import Page
from ranking.serving.watching import Watching
from ranking.serving.web import Web
from ranking.serving.worker import MOST_TOGETHER, Worker
from ranking.serving.workers import BEAT_S
from ranking.serving.workers_peers import Peers
from retrieval.memory import freeze_loaded

LAST_WORDS_S = 0.5
"""Seconds that answers which are ready have at least to leave the server."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeSettings:
    """Where to listen, whom to believe and how much to bear. Port 0 takes a free one; `tokens` is a file of hashes.

    `journal` is the folder in which what was served is noted; None notes nothing. After `rehearse_s` idle seconds a Retrieve is
    rehearsed (`rehearsal`), 0: never. A new night is looked for every `swap_poll_s` seconds, 0: only when asked. `web` is where
    meters are told, `traces` who makes spans, `page` where people may look. `worker` is the socket of one of several processes
    at this address (`workers_peers`), which ends when its standard input does.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    insecure_public: bool = False
    most_waiting: int = 64
    drain_s: float = 10.0
    tls: TlsFiles | None = None
    tokens: Path | None = None
    journal: Path | None = None
    most_request_bytes: int = 4 << 20
    most_wait_s: float = MOST_WAIT_S
    most_together: int = MOST_TOGETHER
    least_depth: int = LEAST_DEPTH
    rehearse_s: float = 0.0
    swap_poll_s: float = 1.0
    web: Web | None = None
    traces: Traces | None = None
    page: Web | None = None
    worker: Path | None = None


@dataclass(frozen=True)
class Front:
    """What answers: the gRPC server, not yet listening, the service in it, its health, and the page if there is one."""

    server: grpc.aio.Server
    service: RecommenderService
    health: HealthService
    page: Page | None


async def run_server(
    current: Current,
    settings: ServeSettings,
    ready: Callable[[int], None],
    stop: asyncio.Event,
    asked: asyncio.Event | None = None,
) -> None:
    """Serves until `stop` is set, then lets running requests finish (at most `drain_s` seconds). `ready` is told the port.

    A new night is swapped in when it is published; setting `asked` looks for one at once. Raises CannotListen, CertificateError
    or TokenError before anything is served.
    """
    worker = Worker(settings.most_waiting, settings.most_wait_s, settings.most_together, settings.rehearse_s)
    journal = None if settings.journal is None else Journal(settings.journal)
    watching = Watching(current, code_version(), settings.web, settings.traces)
    peers = None if settings.worker is None else Peers(settings.worker)
    front = make_server(current, worker, settings, watching, journal, peers)
    watcher = Watcher(current, worker, settings.swap_poll_s, asked or asyncio.Event())
    try:
        await worker.submit(current.stack.warm)
        if peers is not None:
            await peers.start(front.service.take)
        port = listen(front.server, settings)  # not sooner: where several listen, callers would be sent to one that is cold
        await front.server.start()
        watching.start(front.health.state)
        if front.page is not None:
            await front.page.start()
        ready(port)
        watcher.start()
        await stop.wait()
    finally:
        await watcher.stop()
        log.info("draining", extra={"seconds": settings.drain_s})
        until = time.monotonic() + settings.drain_s
        if front.page is not None:
            await front.page.stop()
        await worker.drain(settings.drain_s)  # still listening: probes hear NOT_SERVING, and new requests UNAVAILABLE
        await front.server.stop(max(until - time.monotonic(), LAST_WORDS_S))
        if peers is not None:
            await peers.stop()
        await asyncio.to_thread(worker.close)
        current.stack.today.close()
        if current.stack.origin.shadow is not None:
            await asyncio.to_thread(current.stack.origin.shadow.close)
        if journal is not None:
            await asyncio.to_thread(journal.close)
        await asyncio.to_thread(watching.close)
        log.info("stopped")


def make_server(
    current: Current,
    worker: Worker,
    settings: ServeSettings,
    watching: Watching,
    journal: Journal | None = None,
    peers: Peers | None = None,
) -> Front:
    """A server with the recommender, health and reflection, not yet listening. Raises TokenError."""
    book = None if settings.tokens is None else TokenBook(settings.tokens)
    if book is not None or settings.tls is not None or not is_loopback(settings.host):
        audit.always_heard()
    service = RecommenderService(current, worker, tokens=book is not None, least_depth=settings.least_depth, peers=peers)
    inside = [watching.observe, Gate(book), Door(service), Intake()]
    server = grpc.aio.server(
        options=[
            # Unasked, a second server would share the port silently instead of failing.
            ("grpc.so_reuseport", int(settings.worker is not None)),
            ("grpc.max_receive_message_length", settings.most_request_bytes),
            ("grpc.max_send_message_length", -1),
        ],
        interceptors=[*inside, *([] if journal is None else [Served(journal)])],
    )
    recommender_pb2_grpc.add_RecommenderServicer_to_server(service, server)
    watching.telemetry.registry.register(service.gathered)
    if journal is not None:
        told = "Records of what was served, by what became of them."
        watching.telemetry.readings.add("brewline_journal_records_total", told, journal.counts, ("result",), counter=True)
    health = HealthService(service, worker)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [
        recommender_pb2.DESCRIPTOR.services_by_name["Recommender"].full_name,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection.SERVICE_NAME,
    ]
    reflection.enable_server_reflection(names, server)
    page = None if settings.page is None else Page(settings.page, current, service, inside, book)
    return Front(server, service, health, page)


def check_address(settings: ServeSettings) -> None:
    """The address is allowed and free at this moment, and the files of credentials can be used.

    Raises CannotListen, CertificateError or TokenError.
    """
    missing = [name for name, given in (("TLS", settings.tls), ("tokens", settings.tokens)) if given is None]
    if missing and not is_loopback(settings.host) and not settings.insecure_public:
        raise CannotListen(
            f"--host {settings.host} can be reached from other machines, and this server has no {' and no '.join(missing)}; give "
            "--tls-cert, --tls-key and --tokens, use 127.0.0.1, or say --insecure-public if the network around it protects it"
        )
    if settings.page is not None and settings.tls is not None and settings.tls.client_ca is not None and settings.tokens is None:
        raise CannotListen(
            "--ui asks for a token, not for a certificate, and with --client-ca and no --tokens it would let in everybody on "
            "this machine; give --tokens, or leave --ui out"
        )
    if settings.tls is not None:
        check_tls(settings.tls)
    if settings.tokens is not None:
        read_tokens(settings.tokens)
    bound(settings.host, settings.port, shared=settings.worker is not None).close()


def listen(server: grpc.aio.Server, settings: ServeSettings) -> int:
    """The server is bound, with TLS if the settings have it; returns the port. Raises as check_address does."""
    check_address(settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        if settings.tls is not None:
            return int(server.add_secure_port(f"{host}:{settings.port}", server_credentials(settings.tls)))
        return int(server.add_insecure_port(f"{host}:{settings.port}"))
    except RuntimeError as error:
        raise cannot_listen(settings.host, settings.port, error) from error


def serve_until_signal(current: Current, settings: ServeSettings, ready: Callable[[int], None]) -> None:
    """Serves in this thread until SIGTERM or SIGINT, then stops gently; SIGHUP looks for a new night. Raises CannotListen."""

    def warmed(port: int) -> None:
        freeze_loaded()  # to look through it again would stop every request
        ready(port)
        if settings.worker is not None:
            _beat()

    async def main() -> None:
        stop, asked = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number, event in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, asked)):
            with contextlib.suppress(NotImplementedError):  # Windows has no handlers on the loop
                loop.add_signal_handler(number, event.set)
        if settings.worker is not None:
            _stop_with_parent(loop, stop)
        await run_server(current, settings, warmed, stop, asked)

    asyncio.run(main())
    leave()


def _beat() -> None:
    """From now on the parent hears every `BEAT_S` seconds that the event loop turns."""
    with contextlib.suppress(BrokenPipeError):  # it is gone, as the end of the standard input tells
        with contextlib.suppress(BlockingIOError):  # it does not read: what it will find there is enough
            os.set_blocking(sys.stdout.fileno(), False)
            os.write(sys.stdout.fileno(), b"\n")
        asyncio.get_running_loop().call_later(BEAT_S, _beat)


def _stop_with_parent(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """`stop` is set when the process that holds the other end of the standard input is gone, however it ended."""
    inlet = sys.stdin.fileno()

    def heard() -> None:
        if not os.read(inlet, 1):
            loop.remove_reader(inlet)
            stop.set()

    loop.add_reader(inlet, heard)
