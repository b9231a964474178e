"""The options by which commands reach a server and say what may come back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retrieval.attributes import Wanted

Address = Annotated[str, typer.Option(help="Where the server listens.", metavar="HOST:PORT")]
Deadline = Annotated[float, typer.Option("--deadline-ms", help="How long to wait, in milliseconds.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Category = Annotated[
    list[str] | None, typer.Option("--category", help="Only items of this category; may be repeated.", metavar="WORDS")
]
Creator = Annotated[
    list[str] | None, typer.Option("--creator", help="Only items of this creator; may be repeated.", metavar="NAME")
]
Language = Annotated[
    list[str] | None,
    typer.Option("--language", help="Only items in this language, if the catalogue knows it; may be repeated.", metavar="CODE"),
]
Region = Annotated[
    list[str] | None,
    typer.Option("--region", help="Only items of this region, if the catalogue knows it; may be repeated.", metavar="CODE"),
]
Block = Annotated[
    list[str] | None, typer.Option("--block-creator", help="Nothing of this creator; may be repeated.", metavar="NAME")
]
ByConnections = Annotated[bool, typer.Option("--by-connections", help="Only items whose creator the member is connected to.")]

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_DEADLINE_MS = 30_000.0


Ca = Annotated[Path | None, typer.Option(help="Whose servers to trust (PEM); turns TLS on.", metavar="FILE")]
Cert = Annotated[Path | None, typer.Option(help="Our own certificate, for mTLS.", metavar="FILE")]
Key = Annotated[Path | None, typer.Option(help="Its private key.", metavar="FILE")]


def credentials(ca: Ca = None, cert: Cert = None, key: Key = None) -> None:
    """What this process shows a server: over BREWLINE_CA, _CERT and _KEY. A token comes from the environment alone."""
    for name, given in (("CA", ca), ("CERT", cert), ("KEY", key)):
        if given is not None:
            os.environ[f"BREWLINE_{name}"] = str(given)


def wanted_of(
    category: Sequence[str] | None,
    creator: Sequence[str] | None,
    language: Sequence[str] | None,
    region: Sequence[str] | None,
    blocked: Sequence[str] | None,
    by_connections: bool,
) -> Wanted:
    """What the options let in."""
    from retrieval.attributes import Wanted

    categories, creators, languages, regions, away = (
        frozenset(values or ()) for values in (category, creator, language, region, blocked)
    )
    return Wanted(categories, creators, languages, regions, away, by_connections)
