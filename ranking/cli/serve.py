"""`brewline serve`: the published snapshot and its models behind one gRPC port."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranking.cli.arithmetic import How, RankerArithmetic
from ranking.cli.member_store import MembersUrl
from ranking.cli.output import emit
from ranking.cli.serve_workers import serve_workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from ranking.serving.security_tls import TlsFiles
    from ranking.serving.server import ServeSettings
    from ranking.serving.stack import Stack
    from ranking.serving.traces import Traces
    from ranking.serving.web import Web


Ranker = Annotated[Path | None, typer.Option(help="The ranker of the snapshot; without it only Retrieve answers.", metavar="DIR")]
Hybrid = Annotated[bool, typer.Option("--hybrid", help="Find candidates with the hybrid first stage that the night wrote.")]
InsecurePublic = Annotated[
    bool, typer.Option("--insecure-public", help="Listen beyond this machine although TLS or tokens are missing.")
]
TlsCert = Annotated[
    Path | None, typer.Option(help="Serve TLS with this certificate and the chain above it (PEM).", metavar="FILE")
]
TlsKey = Annotated[
    Path | None, typer.Option(help="Its private key (PEM); refused if everybody on this machine can read it.", metavar="FILE")
]
ClientCa = Annotated[
    Path | None, typer.Option(help="Callers must show a certificate signed by one of these (mTLS).", metavar="FILE")
]
Tokens = Annotated[
    Path | None, typer.Option(help="Callers must show one of these tokens; read again when it changes.", metavar="FILE")
]

NoJournal = Annotated[bool, typer.Option("--no-journal", help="Do not note in STORE/journal what was shown and done (ids only).")]
MostWait = Annotated[
    float,
    typer.Option(
        help="How long a request may wait in a burst; one that would wait longer is refused at once. Once that has happened, and "
        "until a second has passed without a refusal, a request waits for less than its own answer takes; 0: it always does.",
        min=0,
    ),
]
MostTogether = Annotated[
    int, typer.Option(help="Waiting Retrieve requests that are encoded and searched together; 1: one by one.", min=1, max=64)
]
Rehearse = Annotated[
    float,
    typer.Option(
        help="After so many idle milliseconds the last Retrieve is answered once more, for nobody, so that the next finds the "
        "processor's caches warm; at most 125 times after each. 8 suits; answers of 1 ms take a tenth of a core. 0: never.",
        min=0,
        max=1_000,
    ),
]
LeastFanout = Annotated[
    int,
    typer.Option(
        help="With a full queue Recommend ranks fewer candidates than asked, and says so, but no fewer than this; "
        "20000: never fewer.",
        min=1,
    ),
]
SwapPoll = Annotated[
    float,
    typer.Option(
        help="How often to look for another published night and for other files behind --encoder and --ranker, to serve them "
        "without a restart; 0: only at SIGHUP.",
        min=0,
    ),
]

MetricsPort = Annotated[
    int | None,
    typer.Option(help="Tell meters over HTTP on this port (GET /metrics, /healthz); 0 takes a free one.", min=0, max=65535),
]
MetricsHost = Annotated[str, typer.Option(help="The address for HTTP, which asks for no credentials.")]
TracesTo = Annotated[str, typer.Option(help="Send OpenTelemetry spans to this collector, as http://HOST:4317.", metavar="URL")]
ShadowShare = Annotated[
    float,
    typer.Option(
        help="Of this share of the searches the recall is measured against the exact search, beside the answers; one reads "
        "every vector once. 0: none.",
        min=0,
        max=1,
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        help="Serve from so many processes at one port: each has its models and its queue, all share the snapshot's pages and "
        "the cores, and what is changed through one of them is in the next answer of all.",
        min=1,
        max=64,
    ),
]
Worker = Annotated[Path | None, typer.Option(hidden=True, help="The socket of this worker, for the parent of several.")]
Ui = Annotated[bool, typer.Option("--ui", help="Open a page that looks at this server, for browsers on this machine only.")]
UiPort = Annotated[int, typer.Option(help="The port of the page; 0 takes a free one.", min=0, max=65535)]


def serve(
    context: typer.Context,
    store: Annotated[Path, typer.Option(help="The snapshot store that `brewline nightly` wrote.", metavar="DIR")],
    encoder: Annotated[Path, typer.Option(help="The encoder that made the snapshot.", metavar="DIR")],
    ranker: Ranker = None,
    members: MembersUrl = None,
    hybrid: Hybrid = False,
    arithmetic: How = RankerArithmetic.float32,
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = 50051,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    client_ca: ClientCa = None,
    tokens: Tokens = None,
    insecure_public: InsecurePublic = False,
    most_waiting: Annotated[int, typer.Option(help="Requests that may wait; the next is refused at once.", min=1)] = 64,
    most_wait_ms: MostWait = 500.0,
    most_together: MostTogether = 32,
    least_fanout: LeastFanout = 250,
    rehearse_ms: Rehearse = 0.0,
    no_journal: NoJournal = False,
    drain_seconds: Annotated[float, typer.Option(help="How long running requests may take after SIGTERM.", min=0)] = 10.0,
    swap_poll_seconds: SwapPoll = 1.0,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    traces: TracesTo = "",
    ui: Ui = False,
    ui_port: UiPort = 50080,
    shadow_share: ShadowShare = 0.0,
    workers: Workers = 1,
    worker: Worker = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout as soon as it answers.")] = False,
) -> None:
    """Serve recommendations over gRPC until SIGTERM or Ctrl-C. Models that did not make the snapshot are refused.

        brewline serve --store store/ --encoder encoder/ --ranker ranker/ --port 50051
        brewline serve --store store/ --encoder encoder/ --members redis://localhost/0 --port 0 --json

    Ask and tell it with `brewline ask`, or grpcurl (reflection is on). New nights and models are served without a restart.
    """
    if workers > 1:
        return serve_workers(context)
    from ranking.serving.server import ServeSettings
    from ranking.serving.stack import open_stack

    settings = ServeSettings(
        *(host, port, insecure_public, most_waiting, drain_seconds, _tls(tls_cert, tls_key, client_ca), tokens),
        journal=None if no_journal else _journal(store),
        most_wait_s=most_wait_ms / 1e3,
        most_together=most_together,
        least_depth=least_fanout,
        rehearse_s=rehearse_ms / 1e3,
        swap_poll_s=swap_poll_seconds,
        web=_web(metrics_host, metrics_port),
        traces=_traces(traces),
        page=_web("127.0.0.1", ui_port if ui else None),
        worker=worker,
    )
    how = partial(open_stack, hybrid=hybrid, shadow_share=shadow_share, arithmetic=arithmetic.value)
    return _serve(settings, partial(how, store, encoder, ranker, members), as_json)


def _serve(settings: ServeSettings, opened: Callable[[], Stack], as_json: bool) -> None:
    from ranking.serving.current import Current
    from ranking.serving.server import check_address, serve_until_signal

    check_address(settings)  # a taken port or a wrong key is said at once, not after the models are loaded
    current = Current(opened())
    serve_until_signal(current, settings, lambda bound: _ready(current.stack, settings, bound, as_json=as_json))


def _ready(stack: Stack, settings: ServeSettings, bound: int, *, as_json: bool) -> None:
    metrics = "" if settings.web is None else settings.web.address
    page = "" if settings.page is None else settings.page.address
    if settings.worker is None:  # a worker's parent speaks for all
        words = _ready_line(stack, settings.host, bound) + "\n"
        words += f"meters: {metrics}/metrics\n" if metrics else ""
        words += f"page: {page}/\n" if page else ""
        sys.stderr.write(words)
        sys.stderr.flush()
    if as_json:
        emit({**_ready_facts(stack, settings.host, bound), "metrics": metrics, "page": page}, as_json=True, table=lambda: None)


def _journal(store: Path) -> Path:
    from retrieval.data.exported_journal import JOURNAL_DIR

    return store / JOURNAL_DIR


def _web(host: str, port: int | None) -> Web | None:
    from ranking.serving.web import Web

    return None if port is None else Web(host, port)


def _traces(address: str) -> Traces | None:
    from ranking.serving.service import code_version
    from ranking.serving.traces import open_traces

    return open_traces(address, code_version()) if address else None


def _tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    from ranking.serving.security_tls import CertificateError, TlsFiles

    if cert is not None and key is not None:
        return TlsFiles(cert, key, client_ca)
    if cert is not None or key is not None or client_ca is not None:
        raise CertificateError("TLS needs --tls-cert and --tls-key, both; --client-ca comes on top of them")
    return None


def _ready_line(stack: Stack, host: str, port: int) -> str:
    stages = "retrieval and ranking" if stack.ranker is not None else "retrieval only"
    stages = f"hybrid {stages}" if stack.recommender.retriever.hybrid is not None else stages
    return f"ready: {stages} over {len(stack.catalog):,} items of snapshot {stack.snapshot.name} on {host}:{port}"


def _ready_facts(stack: Stack, host: str, port: int) -> dict[str, object]:
    return {
        "ready": True,
        "host": host,
        "port": port,
        "snapshot": stack.snapshot.name,
        "items": len(stack.catalog),
        "dims": stack.encoder.dims,
        "codes": stack.snapshot.manifest.dtype,
        "first_stage": stack.recommender.retriever.first_stage,
        "encoder": stack.encoder.fingerprint,
        "ranker": "" if stack.ranker is None else stack.ranker.fingerprint,
        "arithmetic": "" if stack.ranker is None else stack.ranker.engine.arithmetic,
    }
