"""A load on servers with TLS, certificates of callers and tokens: shown what a client shows, and no token is told anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli.main import app
from ranking.serving.client import ServiceError
from ranking.serving.load import LoadError
from ranking.serving.security_client import Credentials
from ranking.serving.security_tls import CertificateError, TlsFiles
from ranking.serving.stack import Stack
from ranking.serving.tokens import make_token

Start = Callable[..., tuple[int, Callable[[], None]]]
VARIABLES = tuple(f"BREWLINE_{name}" for name in ("CA", "CERT", "KEY", "TOKEN", "TOKEN_FILE"))
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="NO openssl HERE: A LOAD OVER TLS WAS NOT TESTED")


@pytest.fixture(autouse=True)
def nobody_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is shown but what a test says, and what its commands put into the environment is gone after it."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """A certificate of this machine's address that is its own authority, for server and callers."""
    folder = tmp_path_factory.mktemp("pki")
    cert, key = folder / "one.pem", folder / "one.key"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
    about = ["-subj", "/CN=one", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", *words, *about, "-out", str(cert), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    key.chmod(0o600)
    return TlsFiles(cert, key, cert)


def bench(store: Path, *words: object) -> Result:
    """The command's result at a small rate; an error that is not ours fails the test."""
    load = ("--method", "retrieve", "--rate", 15, "--seconds", 1, "--deadline-ms", 20_000, "--json")
    result = CliRunner().invoke(
        app, ["bench", "serve", "--store", str(store), *map(str, (*load, *words))], env={"COLUMNS": "150"}
    )
    if result.exception is not None and not isinstance(result.exception, BrewlineError | SystemExit):
        raise result.exception
    return result


@contextmanager
def command_lines() -> Iterator[set[bytes]]:
    """Grows by what `ps` would show of every process that this one starts inside the block."""
    seen: set[bytes] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    parent = int(path.with_name("stat").read_text().rpartition(")")[2].split()[1])
                    if parent == os.getpid():
                        seen.add(path.read_bytes())
                except OSError:
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def test_a_running_server_of_tls_certificates_and_tokens_is_measured(
    night: Path,
    stack: Stack,
    start: Start,
    pki: TlsFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokens, mine = tmp_path / "tokens.txt", tmp_path / "mine"
    mine.write_text(make_token(tokens, "load", "read"))
    secret = mine.read_text().partition(".")[2]
    caplog.set_level("DEBUG")
    port, _ = start(stack, tls=pki, tokens=tokens)
    shown = ("--address", f"127.0.0.1:{port}", "--ca", pki.cert, "--cert", pki.cert, "--key", pki.key)
    refused = bench(night / "store", *shown).exception
    assert isinstance(refused, ServiceError) and refused.code == "UNAUTHENTICATED", "who is not let in sends no load"
    assert "BREWLINE_TOKEN_FILE" in str(refused)
    monkeypatch.setenv("BREWLINE_TOKEN_FILE", str(mine))
    with command_lines() as seen:
        done = bench(night / "store", *shown, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["sent"] == found["answered"] > 5 and found["failed"] == 0 and found["tls"] and found["token"]
    assert any(b"load_run" in line for line in seen)
    told = [done.output, (tmp_path / "out" / "serve.json").read_text(), *(str(record.__dict__) for record in caplog.records)]
    assert not any(secret in words for words in told) and not any(secret.encode() in line for line in seen)


def test_what_does_not_fit_the_server_is_said_in_a_line(
    night: Path, stack: Stack, start: Start, pki: TlsFiles, tmp_path: Path
) -> None:
    port, _ = start(stack, tls=TlsFiles(pki.cert, pki.key))
    at = ("--address", f"127.0.0.1:{port}")
    plain = bench(night / "store", *at).exception
    assert isinstance(plain, ServiceError) and plain.code == "UNAVAILABLE" and "BREWLINE_CA" in str(plain)
    none = bench(night / "store", *at, "--ca", tmp_path / "none.pem").exception
    assert isinstance(none, CertificateError) and "none.pem cannot be read" in str(none)
    own = bench(night / "store", "--encoder", night / "encoder1", "--ca", pki.cert).exception
    assert isinstance(own, LoadError) and "--tls-cert" in str(own), "said before models are loaded"
    half = bench(night / "store", *at, "--ca", pki.cert, "--cert", pki.cert).exception
    assert isinstance(half, CertificateError) and "all three" in str(half)


def test_a_server_of_its_own_is_secured_by_its_options(
    night: Path, copied: Path, pki: TlsFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens.txt"
    monkeypatch.setenv("BREWLINE_TOKEN", make_token(tokens, "load", "read"))
    options = f"--tls-cert {pki.cert} --tls-key {pki.key} --tokens {tokens}"
    done = bench(copied, "--encoder", night / "encoder1", "--serve-options", options, "--ca", pki.cert)
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["failed"] == 0 and found["sent"] > 5 and found["tls"] and found["token"]
    assert Credentials.from_environment().token not in done.output
