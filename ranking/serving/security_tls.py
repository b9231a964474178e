"""Certificates and keys: read, tried against each other before anything uses them, handed to gRPC, and again when they change."""

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


class Unwelcome(CertificateError):
    """A certificate that can be served and that callers will refuse."""


@dataclass(frozen=True)
class TlsFiles:
    """What a server shows, and in `client_ca` whose certificates callers must show (mTLS). All PEM."""

    cert: Path
    key: Path
    client_ca: Path | None = None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """What gRPC serves TLS with: the files as they are now, and for new connections as they are then, where they can be used.

    A certificate that callers would refuse today or soon is warned of. Raises CertificateError.
    """
    renewal = Renewal(files)
    try:
        first = renewal.read()
    except Unwelcome as error:
        log.warning("%s", error)
        first = _configuration(files)
    return grpc.dynamic_ssl_server_credentials(first, renewal.changed, require_client_authentication=files.client_ca is not None)


class Renewal:
    """Files of certificates that may be replaced while they are served; whether clients must show theirs stays as it was."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = self._stamps()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What the files hold if they changed and can be used, else None: what was served goes on. gRPC asks at every connection.

        A change that is refused is logged once. A key that comes after its certificate is a change of its own.
        """
        now = self._stamps()
        if now == self._seen:
            return None
        self._seen = now
        try:
            found = self.read()
        except (CertificateError, OSError) as error:
            log.error("new certificate refused, the old one goes on: %s", error, extra={"file": str(self._files.cert)})
            return None
        if self._stamps() != now:  # replaced while it was read: the next connection asks again
            return None
        log.info("certificate renewed", extra={"file": str(self._files.cert)})
        return found

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What the files hold, tried; a certificate that ends soon is warned of. Raises CertificateError, or Unwelcome."""
        check_tls(self._files)
        left_s = _left_s(self._files)
        if left_s < SOON_S:
            log.warning("certificate %s: it ends in %.1f days; renew it", self._files.cert, left_s / 86_400)
        return _configuration(self._files)

    def _stamps(self) -> list[tuple[int, ...]]:
        paths = [path for path in (self._files.cert, self._files.key, self._files.client_ca) if path is not None]
        return [_stamp(path) for path in paths]


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes whenever the file does; () if it is not there at this moment."""
    try:
        now = path.stat()
    except OSError:
        return ()
    return now.st_mtime_ns, now.st_ctime_ns, now.st_size, now.st_ino, now.st_mode


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    cert, key = read_pem(files.cert, "CERTIFICATE"), read_pem(files.key, "PRIVATE KEY")
    client_ca = None if files.client_ca is None else read_pem(files.client_ca, "CERTIFICATE")
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


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


def _left_s(files: TlsFiles) -> float:
    """Seconds until callers refuse the certificate: the two ends of a handshake in memory tell. Raises CertificateError."""
    inwards, outwards = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = _check_pair(files).wrap_bio(inwards, outwards, server_side=True)
    client = _trusting(read_pem(files.cert, "CERTIFICATE"), files.cert).wrap_bio(outwards, inwards)
    try:
        _shake(client, server)
    except ssl.SSLCertVerificationError as error:
        raise Unwelcome(f"certificate {files.cert}: callers will refuse it ({error.verify_message}); renew it") from error
    except ssl.SSLError as error:
        raise CertificateError(f"{files.cert} cannot be served ({error.reason}); make another certificate and key") from error
    shown = client.getpeercert() or {}
    return ssl.cert_time_to_seconds(str(shown["notAfter"])) - time.time()


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
