"""The audit log: one structured line for every change and every call turned away, without secrets or anybody's text."""

from __future__ import annotations

import logging

import grpc

log = logging.getLogger("brewline.audit")


def always_heard() -> None:
    """The lines are written from now on whatever BREWLINE_LOG_LEVEL says."""
    log.setLevel(logging.INFO)


def note(event: str, method: str, caller: str, code: str, context: grpc.aio.ServicerContext, request_id: str = "") -> None:
    """One line: what happened ("changed", "turned away"), to which method, by whom, from where, how it ended.

    `caller` is the name of the token, "" for nobody or any; `certificate` the common name of the caller's own, "" without mTLS.
    """
    names = context.auth_context().get("x509_common_name", ())
    certificate = b",".join(names).decode(errors="replace")
    told = {"method": method[:120], "caller": caller, "certificate": certificate, "peer": context.peer(), "code": code}
    log.info(event, extra={**told, "request_id": request_id})
