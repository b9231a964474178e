"""`brewline serve --workers N`: the command lines of the workers, from the one that was typed."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from index.errors import BrewlineError
from ranking.cli.output import emit

OWN = ("workers", "port", "metrics_port", "metrics_host", "ui", "ui_port", "as_json")
"""Options that are the parent's, or not the same for all workers."""
MOST_PATH = 100
"""Bytes of a Unix socket's path; the system takes a few more."""


class CannotShare(BrewlineError):
    """What was asked for is not right, or not possible, with several processes."""


def serve_workers(context: typer.Context) -> None:
    """Serves from several processes until SIGTERM or Ctrl-C. Raises CannotShare, CannotListen, WebError, WorkerFailed."""
    from ranking.serving.address import bound
    from ranking.serving.web import Web
    from ranking.serving.workers import THREADS, Workers, run_until_signal, share_of_cores
    from ranking.serving.workers_pages import Pages

    asked = context.params
    _check(asked)
    environment = share_of_cores(asked["workers"], os.environ)
    told = {"workers": asked["workers"], "threads": _first_number(environment[THREADS])}
    bound(asked["host"], asked["port"]).close()
    web = None if asked["metrics_port"] is None else Web(asked["metrics_host"], asked["metrics_port"])
    # Kept bound so that nobody else takes the port while no worker listens; it does not listen itself and is sent nobody.
    with bound(asked["host"], asked["port"], shared=True) as held, _folder() as folder:
        commands = [_command(context, folder, place, held.getsockname()[1]) for place in range(asked["workers"])]
        workers = Workers(commands, environment, asked["drain_seconds"])
        pages = None if web is None else Pages(workers, web)
        if pages is not None:
            pages.start()
        told["metrics"] = web.address if web else ""
        try:
            run_until_signal(workers, lambda facts: _ready({**facts, **told}, as_json=asked["as_json"]))
        finally:
            if pages is not None:
                pages.close()


def _check(asked: dict[str, Any]) -> None:
    if sys.platform != "linux":
        raise CannotShare(f"--workers needs Linux, which shares out connections to one port; this is {sys.platform}")
    if str(asked["members"] or "").endswith(":memory:"):
        raise CannotShare(
            "--members in memory is each process's own, and --workers would record an engagement in one of them only; "
            "name a file (sqlite:PATH) or a Redis"
        )


def _first_number(threads: str) -> int:
    """Of OMP_NUM_THREADS, which may name a number for each level of nesting. Raises CannotShare."""
    first = threads.split(",")[0].strip()
    if not (first.isascii() and first.isdecimal() and int(first)):
        raise CannotShare(
            f"OMP_NUM_THREADS={threads!r}, expected how many threads each worker gets; unset it to share out all cores"
        )
    return int(first)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for the workers' sockets that only this user may enter."""
    made = Path(tempfile.mkdtemp(prefix="brewline-"))
    try:
        if len(os.fsencode(made)) > MOST_PATH:
            raise CannotShare(f"{made} is too long for the path of a socket; set TMPDIR to a shorter one")
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _command(context: typer.Context, folder: Path, place: int, port: int) -> list[str]:
    """The command line of a worker: what was typed but for what is the parent's. The environment speaks for itself."""
    asked = context.params
    # -m alone looks for modules in the current folder first, whoever may write into it; a checkout's parent looks there itself.
    safe = [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]
    words = [sys.executable, *safe, "-m", "ranking.cli.main"]
    words += ["--verbose"] if context.find_root().params.get("verbose") else []
    words += ["serve", "--worker", str(folder / str(place)), "--port", str(port), "--json", "--drain-seconds"]
    words += [str(asked["drain_seconds"])]
    words += [] if asked["metrics_port"] is None else ["--metrics-port", "0"]
    words += ["--ui", "--ui-port", str(asked["ui_port"])] if asked["ui"] and place == 0 else []
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if option.name in (*OWN, "drain_seconds") or source is None or source.name != "COMMANDLINE":
            continue
        value = asked[str(option.name)]
        words += [option.opts[0]] if value is True else [option.opts[0], str(value)]
    return words


def _ready(facts: dict[str, Any], *, as_json: bool) -> None:
    how = f"{facts['workers']} workers of {facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    words = f"ready: {how} over {facts['items']:,} items of snapshot {facts['snapshot']} on {facts['host']}:{facts['port']}\n"
    words += f"meters: {facts['metrics']}/metrics\n" if facts["metrics"] else ""
    words += f"page: {facts['page']}/ (it looks at worker 0)\n" if facts["page"] else ""
    sys.stderr.write(words)
    sys.stderr.flush()
    if as_json:
        emit(facts, as_json=True, table=lambda: None)
