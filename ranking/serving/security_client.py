"""What a client shows and whom it trusts; a token crosses the network inside TLS or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from ranking.serving.security_tls import CertificateError, check_private, is_loopback, read_pem
from ranking.serving.tokens import TokenError

OPTIONS = [("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True)
class Credentials:
    """`ca`: whom to trust, which turns TLS on. `cert`, `key`: our own, for mTLS. `token`: of `brewline token make`."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls) -> Credentials:
        """What BREWLINE_CA, _CERT, _KEY, and _TOKEN_FILE or _TOKEN name; nothing where they are not set. Raises TokenError."""
        ca, cert, key, file = (os.environ.get(f"BREWLINE_{name}", "") for name in ("CA", "CERT", "KEY", "TOKEN_FILE"))
        token = read_token(Path(file)) if file else os.environ.get("BREWLINE_TOKEN", "").strip()
        return cls(Path(ca) if ca else None, Path(cert) if cert else None, Path(key) if key else None, token)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call shows beside its request."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


def read_token(path: Path) -> str:
    """The one line of a file. Raises TokenError."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(f"BREWLINE_TOKEN_FILE {path} cannot be read ({type(error).__name__}); expected one token") from error
    if not token or not token.isprintable() or " " in token:
        raise TokenError(f"BREWLINE_TOKEN_FILE {path} holds no token; expected the line that `brewline token make` printed")
    return token


def open_channel(address: str, credentials: Credentials) -> grpc.Channel:
    """A channel that shows what `credentials` hold. Raises as `tls_of`."""
    tls = tls_of(address, credentials)
    if tls is None:
        channel = grpc.insecure_channel(address, options=OPTIONS)
    else:
        channel = grpc.secure_channel(address, tls, options=OPTIONS)
    return grpc.intercept_channel(channel, Bearer(credentials.token)) if credentials.token else channel


def tls_of(address: str, credentials: Credentials) -> grpc.ChannelCredentials | None:
    """What a channel to the address is secured with, None for plain text.

    Raises CertificateError, and TokenError for a token that would leave this machine without TLS.
    """
    if (credentials.cert is None) != (credentials.key is None) or (credentials.cert is not None and credentials.ca is None):
        raise CertificateError("a client's certificate goes with its key and a CA: give all three (BREWLINE_CA, _CERT, _KEY)")
    if credentials.ca is None:
        if credentials.token and not is_loopback(address.rpartition(":")[0].strip("[]")):
            raise TokenError(f"a token for {address} would cross the network readable to all: set BREWLINE_CA to the server's CA")
        return None
    roots, key, cert = read_pem(credentials.ca, "CERTIFICATE"), None, None
    if credentials.key is not None and credentials.cert is not None:
        check_private(credentials.key)
        key, cert = read_pem(credentials.key, "PRIVATE KEY"), read_pem(credentials.cert, "CERTIFICATE")
    return grpc.ssl_channel_credentials(roots, key, cert)


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: list[tuple[str, str | bytes]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _DetailsOfCall(_Details, grpc.ClientCallDetails):
    """The details of a call with a token among its metadata."""


class Bearer(grpc.UnaryUnaryClientInterceptor):
    """Sends the token with every call."""

    def __init__(self, token: str) -> None:
        self._shown = Credentials(token=token).metadata

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: object
    ) -> Any:
        """The call's outcome."""
        seen = client_call_details
        metadata = [*(seen.metadata or ()), *self._shown]
        more = _DetailsOfCall(seen.method, seen.timeout, metadata, seen.credentials, seen.wait_for_ready, seen.compression)
        return continuation(more, request)
