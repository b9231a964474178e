"""`brewline serve`: the published snapshot and its models behind one gRPC port."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranking.cli.output import emit

if TYPE_CHECKING:
    from ranking.serving.security_tls import TlsFiles
    from ranking.serving.stack import Stack

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


def serve(
    store: Annotated[Path, typer.Option(help="The snapshot store that `brewline nightly` wrote.", metavar="DIR")],
    encoder: Annotated[Path, typer.Option(help="The encoder that made the snapshot.", metavar="DIR")],
    ranker: Annotated[
        Path | None, typer.Option(help="The ranker of the snapshot; without it only Retrieve answers.", metavar="DIR")
    ] = None,
    members: Annotated[
        str | None,
        typer.Option(help="The member store: sqlite:PATH or redis://HOST. Default: in the --store folder.", metavar="URL"),
    ] = None,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="Find candidates with the hybrid first stage that the night wrote.")
    ] = False,
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)] = 50051,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    client_ca: ClientCa = None,
    tokens: Tokens = None,
    insecure_public: Annotated[
        bool, typer.Option("--insecure-public", help="Listen beyond this machine although TLS or tokens are missing.")
    ] = False,
    most_waiting: Annotated[int, typer.Option(help="Requests that may wait; the next is refused at once.", min=1)] = 64,
    drain_seconds: Annotated[float, typer.Option(help="How long running requests may take after SIGTERM.", min=0)] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout as soon as it answers.")] = False,
) -> None:
    """Serve recommendations over gRPC until SIGTERM or Ctrl-C. Models that did not make the snapshot are refused.

        brewline serve --store store/ --encoder encoder/ --ranker ranker/ --port 50051
        brewline serve --store store/ --encoder encoder/ --members redis://localhost/0 --port 0 --json

    Ask it with `brewline ask recommend --member ID`, or with grpcurl: reflection and the health service are on. Tell it what
    changed with `brewline ask upsert`, `withdraw` and `record`; of several servers over one store one takes changes of items.
    """
    from ranking.serving.server import ServeSettings, check_address, serve_until_signal
    from ranking.serving.stack import open_stack

    tls = _tls(tls_cert, tls_key, client_ca)
    settings = ServeSettings(host, port, insecure_public, most_waiting, drain_seconds, tls=tls, tokens=tokens)
    check_address(settings)  # a taken port or a wrong key is said at once, not after the models are loaded
    stack = open_stack(store, encoder, ranker, members, hybrid=hybrid)

    def ready(bound: int) -> None:
        sys.stderr.write(_ready_line(stack, host, bound) + "\n")
        sys.stderr.flush()
        if as_json:
            emit(_ready_facts(stack, host, bound), as_json=True, table=lambda: None)

    serve_until_signal(stack, settings, ready)


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
    }
