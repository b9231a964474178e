"""The command `brewline`: every group and command in one place, one line for every error that a person can mend."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from index.errors import BrewlineError
from ranking.cli import (
    ask,
    bench,
    connection,
    data,
    demo,
    encoder,
    evaluate,
    experiment,
    index,
    nightly,
    prompt,
    ranker,
    serve,
    token,
    top,
)
from ranking.cli.output import one_line

BAD_REQUEST = 2
"""Exit status of an error that the person at the command line can mend; a bug ends with 1 and its traceback."""
CALL_HOME = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
"""Switches of libraries that report to their makers unless told not to; they read them when they are first loaded."""

QUIET = ("GRPC_VERBOSITY", "ERROR")
"""gRPC's library writes a line of its own, no JSON, about each stranger's handshake; it reads this when it is first loaded."""

app = typer.Typer(
    name="brewline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="A recommender that reads: retrieve with a LLaMA dual encoder and FAISS, rank with a LLaMA in one prefill.",
    epilog="Begin with `brewline demo`. Environment: BREWLINE_LOG=text|json, BREWLINE_LOG_LEVEL=DEBUG|INFO|WARNING|ERROR.",
)

PREPARE, SERVE, LOOK = "Prepare", "Serve", "Look closer"
app.command(rich_help_panel="Begin")(demo.demo)
app.add_typer(data.app, name="data", rich_help_panel=PREPARE)
app.add_typer(encoder.app, name="encoder", rich_help_panel=PREPARE)
app.add_typer(ranker.app, name="ranker", rich_help_panel=PREPARE)
app.command(rich_help_panel=SERVE)(nightly.nightly)
app.command(rich_help_panel=SERVE)(serve.serve)
app.command(rich_help_panel=SERVE)(top.top)
app.add_typer(ask.app, name="ask", callback=connection.credentials, rich_help_panel=SERVE)
app.add_typer(index.app, name="index", rich_help_panel=SERVE)
app.add_typer(token.app, name="token", rich_help_panel=SERVE)
app.add_typer(prompt.app, name="prompt", rich_help_panel=LOOK)
app.add_typer(evaluate.app, name="evaluate", rich_help_panel=LOOK)
app.add_typer(experiment.app, name="experiment", rich_help_panel=LOOK)
app.add_typer(bench.app, name="bench", rich_help_panel=LOOK)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"brewline {version('brewline')}")
        raise typer.Exit


@app.callback()
def _begin(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log everything to stderr.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    from ranking.cli.logs import set_up

    set_up(verbose=verbose)


def main() -> None:
    """Runs the command line of this process. Exit status: 0 done, 2 a mendable error, 130 interrupted, 1 a bug."""
    for name in CALL_HOME:
        os.environ.setdefault(name, "1")
    os.environ.setdefault(*QUIET)
    try:
        app()
    except BrewlineError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        sys.exit(BAD_REQUEST)


if __name__ == "__main__":
    main()
