"""Certificates and keys: read, tried against each other before anything listens, and handed to gRPC."""

from __future__ import annotations

import ipaddress
import logging
import ssl
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from index.errors import BrewlineError

SOON_S = 14 * 86_400

log = logging.getLogger(__name__)


class CertificateError(BrewlineError):
    """A certificate, key or CA file that cannot be used."""


@dataclass(frozen=True)
class TlsFiles:
    """What a server shows, and in `client_ca` whose certificates callers must show (mTLS). All PEM."""

    cert: Path
    key: Path
    client_ca: Path | None = None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """What gRPC serves TLS with. A certificate that callers would refuse today or soon is warned of. Raises CertificateError."""
    check_tls(files)
    cert, key = read_pem(files.cert, "CERTIFICATE"), read_pem(files.key, "PRIVATE KEY")
    client_ca = None if files.client_ca is None else read_pem(files.client_ca, "CERTIFICATE")
    warning = _doubt(files, cert)
    if warning:
        log.warning("certificate %s: %s", files.cert, warning)
    return grpc.ssl_server_credentials([(key, cert)], client_ca, require_client_auth=client_ca is not None)


def check_tls(files: TlsFiles) -> None:
    """The files can be read, the key is private and the certificate's own. Raises CertificateError."""
    check_private(files.key)
    read_pem(files.cert, "CERTIFICATE")
    read_pem(files.key, "PRIVATE KEY")
    _check_pair(files)
    if files.client_ca is not None:
        _trusting(read_pem(files.client_ca, "CERTIFICATE"), files.client_ca)


def read_pem(path: Path, kind: str) -> bytes:
    """The file, which holds a PEM block whose name ends in `kind`. Raises CertificateError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}; expected a PEM file") from error
    if f"{kind}-----".encode() not in content or b"-----BEGIN " not in content:
        raise CertificateError(f"{path} holds no PEM block {kind}; is it another file, or in DER form?")
    return content


def check_private(path: Path) -> None:
    """The key file is closed to strangers on this machine. Raises CertificateError."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}; expected a private key") from error
    if mode & stat.S_IRWXO:
        raise CertificateError(f"private key {path} is open to everybody on this machine (mode {mode:o}): chmod 600 it")


def _check_pair(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def no_password() -> str:
        raise CertificateError(f"private key {files.key} is encrypted; a server starts alone: give it one without a passphrase")

    try:
        context.load_cert_chain(files.cert, files.key, no_password)
    except ssl.SSLError as error:
        reason = error.reason or "unreadable"
        raise CertificateError(
            f"{files.cert} and {files.key} do not make a pair ({reason}); give a certificate and its own key"
        ) from error
    return context


def _trusting(pem: bytes, path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise CertificateError(f"{path} holds no certificate that can be read; expected PEM") from error
    return context


def _doubt(files: TlsFiles, cert: bytes) -> str:
    """Why callers would refuse the certificate now or soon, "" if they would not: the two ends of a handshake in memory tell."""
    inwards, outwards = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = _check_pair(files).wrap_bio(inwards, outwards, server_side=True)
    client = _trusting(cert, files.cert).wrap_bio(outwards, inwards)
    try:
        _shake(client, server)
    except ssl.SSLCertVerificationError as error:
        return f"callers will refuse it ({error.verify_message}); renew it and start again"
    except ssl.SSLError as error:
        raise CertificateError(f"{files.cert} cannot be served ({error.reason}); make another certificate and key") from error
    shown = client.getpeercert() or {}
    left = ssl.cert_time_to_seconds(str(shown["notAfter"])) - time.time()
    return f"it ends in {left / 86_400:.1f} days; renew it and start again" if left < SOON_S else ""


def _shake(client: ssl.SSLObject, server: ssl.SSLObject) -> None:
    for end in (client, server, client):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address; a name other than localhost counts as public."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
