"""`brewline token`: who may call a server that is started with --tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ranking.cli.connection import AsJson
from ranking.cli.output import emit

app = typer.Typer(no_args_is_help=True, help="Who may call a server that is started with --tokens.")


@app.callback()
def _group() -> None:
    """Typer would fold a group of one command into that command."""


@app.command()
def make(
    name: Annotated[str, typer.Argument(help="Who will use it; stands in the audit log.", metavar="NAME")],
    file: Annotated[Path, typer.Option(help="The server's token file; made if missing.", metavar="FILE")],
    role: Annotated[Literal["read", "write", "admin"], typer.Option(help="What it may do; each includes those before.")] = "read",
    as_json: AsJson = False,
) -> None:
    """Make a token and print it, this once: the file keeps a salted hash. Running servers know it at their next call.

        brewline token make shop --role read --file tokens.txt > shop.token

    To take a token away, delete its line. To renew one, make another name, give it to the caller, delete the old line.
    """
    from ranking.serving.tokens import make_token

    token = make_token(file, name, role)
    emit({"name": name, "role": role, "token": token}, as_json=as_json, table=lambda: typer.echo(token))
