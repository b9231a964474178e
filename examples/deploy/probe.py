"""Asks a server's health service once: exit 0 if it says SERVING, 1 with a line on stderr if not.

    python probe.py HOST:PORT [NAME]

With BREWLINE_CA the connection is TLS, and NAME is the name that the certificate must hold: a probe comes from inside the
container, by an address that no certificate names. A server that asks for certificates is shown BREWLINE_CERT and BREWLINE_KEY.
The answer is made by a real small encode and search, so give it time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 12.0
"""More than the server's own patience with its probe (10 s): its own word is worth more than silence."""


def main(address: str, name: str = "") -> int:
    """0 if the server says SERVING; else what it says, or the status, is on stderr."""
    ca, cert, key = (_pem(f"BREWLINE_{name}") for name in ("CA", "CERT", "KEY"))
    options = [("grpc.ssl_target_name_override", name)] if name else []
    if ca:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options)
    else:
        channel = grpc.insecure_channel(address)
    try:
        asked = health_pb2.HealthCheckRequest()
        state = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=SECONDS, wait_for_ready=False).status
        told = health_pb2.HealthCheckResponse.ServingStatus.Name(state)
    except grpc.RpcError as error:
        told = error.code().name
    finally:
        channel.close()
    if told != "SERVING":
        sys.stderr.write(f"{address}: {told}\n")
    return int(told != "SERVING")


def _pem(name: str) -> bytes | None:
    path = os.environ.get(name, "")
    return Path(path).read_bytes() if path else None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
