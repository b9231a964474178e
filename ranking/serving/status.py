"""One table from our errors to gRPC statuses, and the errors that only a service has."""

from __future__ import annotations

import grpc

from index.changes import ChangeRefused
from index.durable import StoreBusy
from index.errors import BrewlineError
from index.hits import ExclusionError, FilterIgnored
from index.keyvalue import StoreUnavailable
from index.manifest import SnapshotMismatch
from index.wal import LogBroken, LogDamaged, LogTrimmed
from ranking.pipeline import BadScores, NoRanker
from ranking.prefill.errors import EmptyItem, EmptyPrefix, ItemTooLong, PrefixTooLong
from ranking.serving.messages import BadRequest
from ranking.tasks import TaskError
from retrieval.attributes import UnknownAttribute
from retrieval.catalog import UnknownItem
from retrieval.fingerprint import FingerprintMismatch
from retrieval.hybrid import HybridError
from retrieval.members import UnknownMember
from retrieval.parts import CatalogError
from retrieval.records import MemberRecordError
from retrieval.retrieve import ExclusionFailed


class Overloaded(BrewlineError):
    """More requests wait than the server lets wait; in `retry_s` seconds it may be otherwise."""

    def __init__(self, message: str, retry_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class Late(BrewlineError):
    """The deadline passed before there was anything to answer."""


class Draining(BrewlineError):
    """The server is going down and takes no new work."""


class Handed(BrewlineError):
    """A worker beside this one, to which a change was handed, refused it with the status of this name, in these words."""

    def __init__(self, code: str, words: str) -> None:
        super().__init__(words)
        self.code = grpc.StatusCode[code]


Code = grpc.StatusCode
TABLE: tuple[tuple[type[BrewlineError], grpc.StatusCode], ...] = (
    (BadRequest, Code.INVALID_ARGUMENT),
    (TaskError, Code.INVALID_ARGUMENT),
    (EmptyPrefix, Code.INVALID_ARGUMENT),
    (PrefixTooLong, Code.INVALID_ARGUMENT),
    (EmptyItem, Code.INVALID_ARGUMENT),
    (ItemTooLong, Code.INVALID_ARGUMENT),
    (UnknownAttribute, Code.INVALID_ARGUMENT),
    (ChangeRefused, Code.INVALID_ARGUMENT),
    (UnknownMember, Code.NOT_FOUND),
    (UnknownItem, Code.NOT_FOUND),
    (NoRanker, Code.FAILED_PRECONDITION),
    (SnapshotMismatch, Code.FAILED_PRECONDITION),
    (FingerprintMismatch, Code.FAILED_PRECONDITION),
    (CatalogError, Code.FAILED_PRECONDITION),
    (HybridError, Code.FAILED_PRECONDITION),
    (Overloaded, Code.RESOURCE_EXHAUSTED),
    (Late, Code.DEADLINE_EXCEEDED),
    (Draining, Code.UNAVAILABLE),
    (StoreUnavailable, Code.UNAVAILABLE),
    (StoreBusy, Code.UNAVAILABLE),
    (LogBroken, Code.UNAVAILABLE),
    (LogTrimmed, Code.FAILED_PRECONDITION),
    (LogDamaged, Code.DATA_LOSS),
    (MemberRecordError, Code.DATA_LOSS),
    (ExclusionError, Code.INTERNAL),
    (FilterIgnored, Code.INTERNAL),
    (ExclusionFailed, Code.INTERNAL),
    (BadScores, Code.INTERNAL),
)


def status_of(error: BaseException) -> grpc.StatusCode:
    """The status of an error: the first row of the table that it is an instance of, INTERNAL if there is none."""
    if isinstance(error, Handed):
        return error.code
    return next((code for kind, code in TABLE if isinstance(error, kind)), Code.INTERNAL)


def message_of(error: BaseException, request_id: str) -> str:
    """What the caller may read: our own words for our own errors, and for a bug only the name of the log entry."""
    if status_of(error) is Code.INTERNAL and not isinstance(error, Handed):
        return f"internal error; the server's log has it under request id {request_id}"
    return str(error)
