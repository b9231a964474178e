"""Certificates are renewed under a running server: old connections go on, new ones see the new files or, if broken, the old."""

from __future__ import annotations

import gc
import logging
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ranking.serving.client import Client, ServiceError
from ranking.serving.security_client import Credentials
from ranking.serving.security_tls import Renewal, TlsFiles
from ranking.serving.stack import Stack

Start = Callable[..., tuple[int, Callable[[], None]]]
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="NO openssl HERE: TLS WAS NOT TESTED")
LIVE = TlsFiles(Path("live.pem"), Path("live.key"))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of this machine's address that sign themselves: old, new, late (of a day), dead, shop and bank."""
    folder = tmp_path_factory.mktemp("pki")
    for name, days in (("old", 90), ("new", 90), ("late", 1), ("dead", 0), ("shop", 90), ("bank", 90)):
        certificate(folder, name, days)
    return folder


def openssl(*words: object) -> None:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def certificate(folder: Path, name: str, days: int) -> None:
    """NAME.pem and NAME.key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    curve, address = ("-pkeyopt", "ec_paramgen_curve:prime256v1"), ("-addext", "subjectAltName=IP:127.0.0.1")
    openssl("req", "-x509", "-newkey", "ec", *curve, "-nodes", "-subj", f"/CN={name}", *address, "-keyout", key, "-out", cert)
    openssl("x509", "-in", cert, "-signkey", key, "-days", days, "-out", cert)
    key.chmod(0o600)


@pytest.fixture
def live(pki: Path, tmp_path: Path) -> TlsFiles:
    """The files that a server serves from: those of `old`."""
    files = TlsFiles(tmp_path / LIVE.cert, tmp_path / LIVE.key)
    put(pki / "old.key", files.key)
    put(pki / "old.pem", files.cert)
    return files


def put(source: Path, target: Path) -> None:
    """The target is a copy of the source from one moment to the next, as tools that renew certificates do it."""
    beside = target.with_suffix(".beside")
    shutil.copy(source, beside)
    beside.replace(target)


def shown(port: int) -> str:
    """The certificate that a new connection is shown."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=20).strip()


def asked(port: int, credentials: Credentials) -> str:
    """The status of a question over a connection of its own; "" if it was answered."""
    try:
        with Client(f"127.0.0.1:{port}", 5_000, credentials) as client:
            assert client.info().items > 0
    except ServiceError as error:
        return error.code
    return ""


def told(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    found = [one for one in caplog.records if one.name == "ranking.serving.security_tls" and one.levelno == level]
    return [one.getMessage() for one in found]


def test_old_connections_go_on_and_new_ones_get_the_new_certificate(
    stack: Stack, start: Start, pki: Path, live: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    port, _ = start(stack, tls=live)
    gc.collect()  # gRPC keeps a bare pointer to who is asked for newer files
    with Client(f"127.0.0.1:{port}", 5_000, Credentials(pki / "old.pem")) as standing:
        assert standing.info().items > 0 and shown(port) == (pki / "old.pem").read_text().strip()
        put(pki / "new.pem", live.cert)
        assert shown(port) == (pki / "old.pem").read_text().strip(), "its key is not there yet"
        put(pki / "new.key", live.key)
        assert shown(port) == (pki / "new.pem").read_text().strip()
        assert asked(port, Credentials(pki / "new.pem")) == "" and asked(port, Credentials(pki / "old.pem")) == "UNAVAILABLE"
        assert standing.info().items > 0
    (refused,) = told(caplog, logging.ERROR)
    assert "refused, the old one goes on" in refused and "do not make a pair" in refused
    assert told(caplog, logging.INFO) == ["certificate renewed"]


def test_broken_files_are_refused_once_each_and_the_old_ones_go_on(
    stack: Stack, start: Start, pki: Path, live: TlsFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port, _ = start(stack, tls=live)
    noise, half = tmp_path / "noise", tmp_path / "half"
    noise.write_bytes(b"-----BEGIN CERTIFICATE-----\n\xff\x00\n-----END CERTIFICATE-----\n")
    half.write_bytes((pki / "new.pem").read_bytes()[:300])
    old = (pki / "old.pem").read_text().strip()
    assert shown(port) == old
    broken: list[tuple[Callable[[], object], str]] = [
        (lambda: put(noise, live.cert), "do not make a pair"),
        (lambda: put(half, live.cert), "do not make a pair"),
        (lambda: put(pki / "shop.pem", live.cert), "do not make a pair"),
        (live.cert.unlink, "cannot be read"),
        (lambda: (put(pki / "old.pem", live.cert), live.key.chmod(0o644)), "chmod 600"),
        (lambda: (put(pki / "dead.key", live.key), put(pki / "dead.pem", live.cert)), "callers will refuse it"),
    ]
    for number, (breaks, words) in enumerate(broken, 1):
        breaks()
        assert [shown(port), shown(port)] == [old, old], words
        assert asked(port, Credentials(pki / "old.pem")) == ""
        assert len(told(caplog, logging.ERROR)) == number and words in told(caplog, logging.ERROR)[-1]
    put(pki / "late.key", live.key)
    put(pki / "late.pem", live.cert)
    assert shown(port) == (pki / "late.pem").read_text().strip()
    (warned,) = told(caplog, logging.WARNING)
    assert "ends in 1.0 days" in warned
    assert "PRIVATE KEY-----\n" not in caplog.text


def test_whom_the_server_believes_is_renewed_too(stack: Stack, start: Start, pki: Path, live: TlsFiles, tmp_path: Path) -> None:
    callers = tmp_path / "callers.pem"
    put(pki / "shop.pem", callers)
    port, _ = start(stack, tls=TlsFiles(live.cert, live.key, callers))
    who = {name: Credentials(pki / "old.pem", pki / f"{name}.pem", pki / f"{name}.key") for name in ("shop", "bank")}
    with Client(f"127.0.0.1:{port}", 5_000, who["shop"]) as standing:
        assert standing.info().items > 0 and asked(port, who["bank"]) == "UNAVAILABLE"
        put(pki / "bank.pem", callers)
        assert asked(port, who["bank"]) == ""
        assert asked(port, who["shop"]) == asked(port, Credentials(pki / "old.pem")) == "UNAVAILABLE"
        assert standing.info().items > 0
        callers.write_text("nobody")
        assert asked(port, who["bank"]) == "", "a broken list of callers lets nobody else in, and nobody out"
        assert asked(port, Credentials(pki / "old.pem")) == "UNAVAILABLE"


def test_nothing_is_read_while_nothing_changed(pki: Path, live: TlsFiles) -> None:
    renewal = Renewal(live)
    assert renewal.changed() is None
    time.sleep(0.02)  # coarser clocks of file systems would call two writes one
    put(pki / "old.pem", live.cert)
    assert renewal.changed() is not None and renewal.changed() is None
