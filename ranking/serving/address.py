"""The address that a server listens on, asked of the system before gRPC is: its own words would stand on stderr beside ours."""

from __future__ import annotations

import socket

from index.errors import BrewlineError


class CannotListen(BrewlineError):
    """The address is taken, not allowed, or not one of this machine's."""


def bound(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket is bound to the address and does not listen; close it. Port 0 takes a free one.

    `shared`: others of this user that say so too may be bound to it, and listen; nobody else. Raises CannotListen.
    """
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind((host, port))
        if shared:  # set for the bind, which a closed connection would forbid; left on, whoever sets it too could come in
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        taken.close()
        raise cannot_listen(host, port, error) from error
    return taken


def cannot_listen(host: str, port: int, error: Exception) -> CannotListen:
    """The error for an address that the system, or gRPC, does not give."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CannotListen(
        f"cannot listen on {host}:{port} ({reason}); choose another --port (0 takes a free one), or stop the server that has it"
    )
