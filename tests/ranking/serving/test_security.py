"""Tokens, TLS and the gate, over a real server with certificates that OpenSSL makes here."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner

from ranking.cli import ask
from ranking.serving import recommender_pb2, recommender_pb2_grpc
from ranking.serving import recommender_pb2 as pb
from ranking.serving.client import Client, ServiceError
from ranking.serving.security import NEEDS, _event
from ranking.serving.security_client import Credentials
from ranking.serving.security_tls import CertificateError, TlsFiles, check_tls, server_credentials
from ranking.serving.server import CannotListen, ServeSettings, check_address
from ranking.serving.stack import Stack, open_stack
from ranking.serving.tokens import TokenError, make_token
from retrieval.recent import Told
from retrieval.records import Entry

Start = Callable[..., tuple[int, Callable[[], None]]]
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="NO openssl HERE: TLS WAS NOT TESTED")


def openssl(*words: object) -> None:
    """Runs the command; its words end up in the failure."""
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def certificate(folder: Path, name: str, *, ca: str = "", days: int = 90) -> tuple[Path, Path]:
    """NAME.pem and NAME.key of this machine's address, signed by `ca`, or a CA of its own."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
    key.chmod(0o600)
    wish = folder / f"{name}.csr"
    openssl("req", "-new", "-key", key, "-subj", f"/CN={name}", "-out", wish)
    extra = folder / f"{name}.ext"
    extra.write_text("subjectAltName=IP:127.0.0.1" if ca else "basicConstraints=critical,CA:TRUE")
    signer = ["-CA", folder / f"{ca}.pem", "-CAkey", folder / f"{ca}.key", "-CAcreateserial"] if ca else ["-signkey", key]
    openssl("x509", "-req", "-in", wish, "-days", days, "-extfile", extra, "-out", cert, *signer)
    return cert, key


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca, stranger (another CA), server and shop (signed by ca)."""
    folder = tmp_path_factory.mktemp("pki")
    for name, ca in (("ca", ""), ("stranger", ""), ("server", "ca"), ("shop", "ca"), ("thief", "stranger")):
        certificate(folder, name, ca=ca)
    return folder


def code_of(call: Callable[[], object]) -> str:
    """The status of a call that must fail."""
    with pytest.raises(ServiceError) as caught:
        call()
    return caught.value.code


def event(name: str) -> list[Told]:
    return [Told(name, Entry("i1", 0, "", None))]


def test_roles_rotation_and_logs_over_the_wire(
    night: Path, copied: Path, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Right, lesser, wrong, missing, malformed; a new token at once, a deleted one no more; no secret in any log line."""
    file = tmp_path / "tokens.txt"
    reader, writer = make_token(file, "shop", "read"), make_token(file, "feed", "write")
    caplog.set_level(logging.DEBUG)
    port, _ = start(open_stack(copied, night / "encoder1", night / "ranker1", None), tokens=file)

    def client(token: str) -> Client:
        return Client(f"127.0.0.1:{port}", credentials=Credentials(token=token))

    with client(reader) as shop, client(writer) as feed:
        assert len(shop.retrieve("m1", 5)) == 5 and shop.info().items > 0
        assert code_of(lambda: shop.record("m1", event("e1"))) == "PERMISSION_DENIED"
        assert code_of(lambda: shop.withdraw(["i1"])) == "PERMISSION_DENIED"
        assert feed.record("m39", event("secured-1")).recorded == 1
        assert code_of(lambda: feed.record("", event("e2"))) == "INVALID_ARGUMENT"
        secret = reader.partition(".")[2]
        for wrong in ("", "x", f"shop.{secret[:-1]}", f"feed.{secret}", f"nobody.{secret}", "shop." + "a" * 5_000, ".", "shop"):
            with client(wrong) as other:
                assert code_of(other.info) == "UNAUTHENTICATED", wrong
        late = make_token(file, "late", "read")
        with client(late) as other:
            assert other.info().items > 0
        file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if not line.startswith("shop ")))
        assert code_of(shop.info) == "UNAUTHENTICATED"
        file.write_text("shop read scrypt")
        assert code_of(feed.info) == "UNAVAILABLE"
        file.unlink()
        assert code_of(feed.info) == "UNAVAILABLE"
    lines = [record for record in caplog.records if record.name == "brewline.audit"]
    told = {(r.getMessage(), r.__dict__.get("caller"), r.__dict__.get("code")) for r in lines}
    assert {
        ("turned away", "shop", "PERMISSION_DENIED"),
        ("changed", "feed", "OK"),
        ("turned away", "", "UNAUTHENTICATED"),
    } <= told
    assert ("not changed", "feed", "INVALID_ARGUMENT") in told and ("turned away", "", "UNAVAILABLE") in told
    everything = " ".join(str(record.__dict__) for record in caplog.records)
    assert _event("/brewline.v1.Recommender/Explain", "OK") == "looked", "a look changes nothing"
    assert not any(token.partition(".")[2] in everything for token in (reader, writer, late))
    assert "m39" not in " ".join(str(record.__dict__) for record in lines)


def test_health_is_open_reflection_and_what_nobody_knows_are_not(stack: Stack, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    token = make_token(file, "shop", "write")
    port, _ = start(stack, tokens=file)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=20).status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            next(ask(iter([question]), timeout=20))
        shown = [("authorization", f"Bearer {token}")]
        assert next(ask(iter([question]), timeout=20, metadata=shown)).list_services_response.service
        unknown = channel.unary_unary("/brewline.v1.Recommender/Shutdown")
        for metadata, code in (([], "UNAUTHENTICATED"), (shown, "PERMISSION_DENIED")):
            with pytest.raises(grpc.RpcError, match=code):
                unknown(b"", timeout=20, metadata=metadata)
        stub = recommender_pb2_grpc.RecommenderStub(channel)
        for odd in ([*shown, *shown], [("authorization", token)], [("authorization", f"Basic {token}")]):
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                stub.Info(pb.InfoRequest(), timeout=20, metadata=odd)


def test_every_method_of_the_contract_has_its_row() -> None:
    service = recommender_pb2.DESCRIPTOR.services_by_name["Recommender"]
    assert not [one.name for one in service.methods if f"/{service.full_name}/{one.name}" not in NEEDS]


@needs_openssl
def test_tls_and_mutual_tls(stack: Stack, start: Start, pki: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    token = make_token(file, "shop", "read")
    tls = TlsFiles(pki / "server.pem", pki / "server.key", pki / "ca.pem")
    port, stop = start(stack, tls=TlsFiles(tls.cert, tls.key), tokens=file)
    whole = Credentials(pki / "ca.pem", pki / "shop.pem", pki / "shop.key", token)
    refused = (
        (Credentials(pki / "ca.pem"), "UNAUTHENTICATED", "BREWLINE_TOKEN_FILE"),
        (Credentials(token=token), "UNAVAILABLE", "or does it want TLS"),
        (Credentials(pki / "stranger.pem", token=token), "UNAVAILABLE", "is BREWLINE_CA the authority"),
    )

    def ask(credentials: Credentials) -> int:
        with Client(f"127.0.0.1:{port}", 5_000, credentials) as client:
            return client.info().items

    assert ask(Credentials(pki / "ca.pem", token=token)) > 0
    for credentials, code, words in refused:
        with pytest.raises(ServiceError, match=words) as caught:
            ask(credentials)
        assert caught.value.code == code
    stop()
    port, _ = start(stack, tls=tls, tokens=file)
    assert ask(whole) > 0
    strangers = Credentials(pki / "ca.pem", pki / "thief.pem", pki / "thief.key", token)
    for credentials in (Credentials(pki / "ca.pem", token=token), strangers):
        assert code_of(lambda shown=credentials: ask(shown)) == "UNAVAILABLE"
    assert token not in repr(whole)


@needs_openssl
def test_files_that_cannot_be_used_are_refused_by_name(pki: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = pki / "server.pem", pki / "server.key"
    bare, noise, locked = tmp_path / "bare.key", tmp_path / "noise.pem", tmp_path / "locked.key"
    shutil.copy(key, bare)
    bare.chmod(0o644)
    noise.write_bytes(b"-----BEGIN CERTIFICATE-----\n\xff\x00\n-----END CERTIFICATE-----\n")
    openssl("pkcs8", "-topk8", "-in", key, "-passout", "pass:never", "-out", locked)
    locked.chmod(0o600)
    for files, words in (
        (TlsFiles(tmp_path / "none.pem", key), "none.pem cannot be read"),
        (TlsFiles(cert, tmp_path / "none.key"), "none.key cannot be read"),
        (TlsFiles(key, key), "holds no PEM block CERTIFICATE"),
        (TlsFiles(cert, pki / "shop.key"), "do not make a pair"),
        (TlsFiles(noise, key), "do not make a pair"),
        (TlsFiles(cert, bare), "chmod 600"),
        (TlsFiles(cert, locked), "is encrypted"),
        (TlsFiles(cert, key, noise), "noise.pem holds no certificate"),
    ):
        with pytest.raises(CertificateError, match=words):
            check_tls(files)
    assert server_credentials(TlsFiles(cert, key)) and not caplog.records
    for days, words in ((3, "ends in 3.0 days"), (0, "expired")):
        server_credentials(TlsFiles(*certificate(tmp_path, f"old{days}", days=days)))
        assert words in caplog.records[-1].getMessage()


@needs_openssl
def test_beyond_this_machine_both_are_needed(pki: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    make_token(file, "shop", "read")
    tls = TlsFiles(pki / "server.pem", pki / "server.key", pki / "ca.pem")
    for settings, words in (
        (ServeSettings("0.0.0.0", 0, tls=tls), "no tokens"),
        (ServeSettings("0.0.0.0", 0, tokens=file), "no TLS"),
        (ServeSettings("0.0.0.0", 0), "no TLS and no tokens"),
    ):
        with pytest.raises(CannotListen, match=words):
            check_address(settings)
    check_address(ServeSettings("0.0.0.0", 0, tls=tls, tokens=file))
    for credentials in (Credentials(cert=tls.cert, key=tls.key), Credentials(tls.client_ca, cert=tls.cert)):
        with pytest.raises(CertificateError, match="all three"):
            Client("127.0.0.1:1", credentials=credentials)
    with pytest.raises(TokenError, match="readable to all"):
        Client("example.org:50051", credentials=Credentials(token="a.b"))


@needs_openssl
def test_the_commands_as_the_manual_has_them(night: Path, copied: Path, pki: Path, tmp_path: Path) -> None:
    """A server of mTLS and tokens beyond loopback, asked and told by the environment; at the usual log level it notes both."""
    tokens, mine = tmp_path / "tokens.txt", tmp_path / "feed.token"
    mine.write_text(make_token(tokens, "feed", "write") + "\n")
    lesser = make_token(tokens, "shop", "read")
    words = ["serve", "--store", copied, "--encoder", night / "encoder1", "--host", "0.0.0.0", "--port", "0", "--json"]
    words += [
        "--tls-cert",
        pki / "server.pem",
        "--tls-key",
        pki / "server.key",
        "--client-ca",
        pki / "ca.pem",
        "--tokens",
        tokens,
    ]
    command = [sys.executable, "-c", "from ranking.cli.main import main; main()", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "BREWLINE_LOG": "json"}
    shown = {"BREWLINE_CA": str(pki / "ca.pem"), "BREWLINE_CERT": str(pki / "shop.pem"), "BREWLINE_KEY": str(pki / "shop.key")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            at = ("--address", f"127.0.0.1:{json.loads(server.stdout.readline())['port']}")
            feed, shop = {**shown, "BREWLINE_TOKEN_FILE": str(mine)}, {**shown, "BREWLINE_TOKEN": lesser}
            assert CliRunner().invoke(ask.app, ["withdraw", "i4", *at], env=feed).exit_code == 0
            refused = CliRunner().invoke(ask.app, ["withdraw", "i5", *at], env=shop)
            assert "the token of shop has the role read" in str(refused.exception) and "\n" not in str(refused.exception)
        finally:
            server.send_signal(signal.SIGTERM)
        heard = server.stderr.read()
    lines = [json.loads(line) for line in heard.splitlines() if "brewline.audit" in line]
    assert [(one["event"], one["caller"], one["certificate"], one["code"]) for one in lines] == [
        ("changed", "feed", "shop", "OK"),
        ("turned away", "shop", "shop", "PERMISSION_DENIED"),
    ]
    assert lines[0]["request_id"] and not any(secret.partition(".")[2].strip() in heard for secret in (lesser, mine.read_text()))
