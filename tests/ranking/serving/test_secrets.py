"""No token, hash or key shows anywhere: a real server at the most talkative log level, told and asked well and badly."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from ranking.serving import recommender_pb2 as pb
from ranking.serving.client import Client, ServiceError
from ranking.serving.security_client import Credentials
from ranking.serving.tokens import make_token, read_tokens
from retrieval.data.schema import Item
from retrieval.recent import Told
from retrieval.records import Entry

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="NO openssl HERE: SECRETS WERE NOT SEARCHED FOR")
ROOT = Path(__file__).parents[3]


def certificate(folder: Path, name: str) -> None:
    """NAME.pem, which signs itself, and NAME.key."""
    curve, address = ["-pkeyopt", "ec_paramgen_curve:prime256v1"], ["-addext", "subjectAltName=IP:127.0.0.1"]
    words = ["openssl", "req", "-x509", "-newkey", "ec", *curve, "-nodes", "-subj", f"/CN={name}", *address]
    files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
    done = subprocess.run([*words, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / f"{name}.key").chmod(0o600)


@contextmanager
def serving(words: list[object], folder: Path) -> Iterator[dict]:
    """A server as an operator starts it, gRPC's own log on too; what it says on both streams is in `folder`."""
    command = [sys.executable, "-c", "from ranking.cli.main import main; main()", "serve", *map(str, words), "--json"]
    loud = {"BREWLINE_LOG": "json", "BREWLINE_LOG_LEVEL": "DEBUG", "GRPC_VERBOSITY": "DEBUG", "PYTHONPATH": str(ROOT)}
    heard = (folder / "stderr").open("wb")
    with heard, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=heard, env={**os.environ, **loud}) as server:
        try:
            assert server.stdout is not None
            ready = server.stdout.readline()
            (folder / "stdout").write_bytes(ready)
            yield json.loads(ready)
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0


def spellings(token: str, file: Path) -> set[bytes]:
    """What betrays a token: both ends of its secret, and what is kept of it, as text, in base64 and as bytes."""
    name, _, secret = token.partition(".")
    kept = read_tokens(file)[name]
    quick = hashlib.sha256(token.encode()).digest()
    found = {secret[:16].encode(), secret[-16:].encode()}
    for raw in (kept.digest, kept.salt, quick):
        found |= {
            raw,
            raw.hex().encode(),
            base64.b64encode(raw)[:-3],
            base64.urlsafe_b64encode(raw)[:-3],
            repr(raw)[2:-1].encode(),
        }
    return found


def body(key: Path) -> set[bytes]:
    """The lines of a key."""
    return {line.encode() for line in key.read_text().splitlines() if not line.startswith("-----") and len(line) > 8}


def told(call: Callable[[], object]) -> str:
    """All that a refused caller can see."""
    with pytest.raises((ServiceError, grpc.RpcError)) as caught:
        call()
    seen = caught.value.__cause__ if isinstance(caught.value, ServiceError) else caught.value
    more = f"{seen.debug_error_string()} {seen.trailing_metadata()}" if isinstance(seen, grpc.Call) else ""
    return f"{caught.value} {seen!r} {more}"


def ask(address: str, whom: Credentials, wrong: list[str], tokens: dict[str, str]) -> str:
    """Good and bad calls; everything that came back."""
    said: list[str] = []

    def client(token: str) -> Client:
        return Client(address, 20_000, Credentials(whom.ca, whom.cert, whom.key, token))

    with client(tokens["root"]) as root, client(tokens["shop"]) as shop:
        said += [repr(root.info()), repr(root.recommend("m1", 5, surface="feed")), repr(root.explain("m1", "i2"))]
        said.append(repr(root.upsert([Item("new", "roses")])))
        said.append(repr(root.record("m1", [Told("e1", Entry("i1", 0, "", None))])))
        said += [
            told(lambda: shop.withdraw(["i1"])),
            told(lambda: shop.rank("m1", ["nobody"])),
            told(lambda: shop.retrieve("who")),
        ]
    for token in wrong:
        with client(token) as other:
            said.append(told(other.info))
    assert whom.ca is not None and whom.cert is not None and whom.key is not None
    tls = grpc.ssl_channel_credentials(whom.ca.read_bytes(), whom.key.read_bytes(), whom.cert.read_bytes())
    with grpc.secure_channel(address, tls) as channel:
        odd = [("authorization", tokens["root"]), ("authorization", f"Basic {tokens['root']}"), ("x-token", tokens["shop"])]
        for method, header in itertools.product(("Info", "Shutdown", "Rank"), odd):
            raw = channel.unary_unary(f"/brewline.v1.Recommender/{method}", pb.InfoRequest.SerializeToString)
            said.append(told(lambda call=raw, one=header: call(pb.InfoRequest(), timeout=20, metadata=[one])))
        junk = channel.unary_unary("/brewline.v1.Recommender/Rank")
        said.append(told(lambda: junk(b"\xff\xff", timeout=20, metadata=[("authorization", f"Bearer {tokens['root']}")])))
    return "\n".join(said)


def test_nothing_secret_is_logged_noted_shown_or_answered(night: Path, copied: Path, tmp_path: Path) -> None:
    for name in ("server", "shop", "next"):
        certificate(tmp_path, name)
    shutil.copy(tmp_path / "server.pem", tmp_path / "live.pem")
    shutil.copy(tmp_path / "server.key", tmp_path / "live.key")
    file, out = tmp_path / "tokens.txt", tmp_path / "out"
    out.mkdir()
    tokens = {name: make_token(file, name, role) for name, role in (("root", "admin"), ("shop", "read"))}
    secret = {name: one.partition(".")[2] for name, one in tokens.items()}
    wrong = [f"root.{secret['shop']}", f"nobody.{secret['root']}", tokens["root"][:-1], tokens["root"] + "x"]
    hidden = set().union(*(spellings(token, file) for token in tokens.values()))
    hidden |= set().union(*(body(tmp_path / f"{name}.key") for name in ("server", "shop", "next")))
    whom = Credentials(tmp_path / "server.pem", tmp_path / "shop.pem", tmp_path / "shop.key")
    words: list[object] = ["--store", copied, "--encoder", night / "encoder1", "--ranker", night / "ranker1", "--port", 0]
    words += ["--tls-cert", tmp_path / "live.pem", "--tls-key", tmp_path / "live.key", "--client-ca", tmp_path / "shop.pem"]
    with serving([*words, "--tokens", file, "--metrics-port", 0], out) as ready:
        address = f"127.0.0.1:{ready['port']}"
        said = ask(address, whom, wrong, tokens)
        shutil.copy(tmp_path / "next.key", tmp_path / "live.pem")  # a slip of the hand: the key in the place of the certificate
        file.write_text(file.read_text().replace(" scrypt", ""))  # and lines that are none
        with Client(address, 20_000, Credentials(whom.ca, whom.cert, whom.key, tokens["root"])) as root:
            said += told(root.info)
        with urllib.request.urlopen(f"{ready['metrics']}/metrics", timeout=20) as page:
            (out / "metrics").write_bytes(page.read())
    (out / "said").write_text(said)
    heard = (out / "stderr").read_text(encoding="utf-8", errors="replace")
    for proof in ("turned away", "new certificate refused", "token file unusable", "line 1 is no line"):
        assert proof in heard, proof
    assert "UNAUTHENTICATED" in said and b"brewline" in (out / "metrics").read_bytes()
    places = [*out.iterdir(), *(path for path in copied.rglob("*") if path.is_file())]
    assert any("journal" in str(path) for path in places)
    shown = [f"{path.name}: {one[:40]!r}" for path in places for one in hidden if one in path.read_bytes()]
    assert not shown


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    token = make_token(file, "shop", "read")
    hidden = spellings(token, file)
    raw = file.read_bytes()
    assert sum(one in raw for one in hidden) >= 2, "salt and hash as the file has them"
    assert sum(one in f"Bearer {token}".encode() for one in hidden) == 2
    assert all(len(one) > 8 for one in hidden)
