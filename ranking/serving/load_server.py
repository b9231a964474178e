"""A real `brewline serve` for as long as it is measured: started on a free port, asked until it is warm, ended gently."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ranking.serving.load import LoadError, last_line

START_S = 300.0
"""Models and indexes of any size are loaded by then."""
STOP_S = 60.0
POLL_S = 0.5
MEMBERS = "BREWLINE_MEMBERS"
"""The variable that `ranking.cli.member_store` reads: a URL with a password among the words of a command shows in `ps`."""
CALLERS = ("BREWLINE_TOKEN", "BREWLINE_TOKEN_FILE")
"""What a caller shows (`security_client`) is none of the server's business: it knows hashes."""


@dataclass(frozen=True)
class ServerWish:
    """What to serve; `options` are further words of `brewline serve`."""

    store: Path
    encoder: Path
    ranker: Path | None = None
    members: str | None = None
    options: Sequence[str] = ()

    def command(self) -> list[str]:
        """The command line."""
        words = ["--store", str(self.store), "--encoder", str(self.encoder), "--port", "0", "--json"]
        words += ["--no-journal"]  # what nobody saw must not teach tomorrow's models
        words += [] if self.ranker is None else ["--ranker", str(self.ranker)]
        return [sys.executable, "-m", "ranking.cli.main", "serve", *words, *self.options]

    def environment(self) -> dict[str, str]:
        """What the server reads beside its command line: this process's own, no token, and the address of the members."""
        own = {name: value for name, value in os.environ.items() if name not in (MEMBERS, *CALLERS)}
        return own if self.members is None else {**own, MEMBERS: self.members}


@dataclass(frozen=True)
class Served:
    """A server that answers at `address`; `process` is it."""

    address: str
    process: subprocess.Popen[str]
    words: IO[str]

    def check(self) -> None:
        """The server still runs. Raises LoadError with its last words."""
        if self.process.poll() is not None:
            raise LoadError(f"the server ended with status {self.process.returncode} under load: {last_line(self.words)}")


@contextmanager
def served(wish: ServerWish) -> Iterator[Served]:
    """The server runs inside the block and is gone after it, by SIGTERM. Raises LoadError if it does not start or stop."""
    with (
        tempfile.TemporaryFile("w+") as words,
        subprocess.Popen(wish.command(), stdout=subprocess.PIPE, stderr=words, text=True, env=wish.environment()) as process,
    ):
        try:
            yield Served(_address(process, words), process, words)
            process.send_signal(signal.SIGTERM)
            if process.wait(STOP_S):
                raise LoadError(f"the server stopped with status {process.returncode}: {last_line(words)}")
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"the server did not stop within {STOP_S:.0f} s of SIGTERM: {last_line(words)}") from error
        finally:
            process.kill()


def _address(process: subprocess.Popen[str], words: IO[str]) -> str:
    assert process.stdout is not None
    until = time.monotonic() + START_S
    while not select.select([process.stdout], [], [], POLL_S)[0]:
        if time.monotonic() > until:
            raise LoadError(f"the server was not ready within {START_S:.0f} s: {last_line(words)}")
    line = process.stdout.readline()
    if not line:
        process.wait(STOP_S)
        raise LoadError(f"the server did not start: {last_line(words).removeprefix('error: ')}")
    ready = json.loads(line)
    return f"{ready['host']}:{ready['port']}"
