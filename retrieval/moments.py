"""The moment a night stands at, as a person writes it and as a person reads it."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from index.errors import BrewlineError
from retrieval.data.schema import DAY, MISSING_TIME, Dataset

QUIET_DAYS = 30
"""Days without any event, after which a night is probably not meant to be then."""

log = logging.getLogger(__name__)


class NightError(BrewlineError):
    """A night cannot be run on this data or at this time."""


def read_as_of(text: str, dataset: Dataset, now: float) -> int:
    """Seconds since 1970 (UTC) of what a person wrote: "now", "end" (the day after the last event), seconds, or an ISO time.

    A time without a zone is UTC. Raises NightError.
    """
    if text == "now":
        return int(now)
    if text == "end":
        return end_of(dataset)
    if text.lstrip("-").isdigit():
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise NightError(f"--as-of {text!r} is no time; write now, end, seconds since 1970, or 2013-10-12[T08:00]") from error
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def warn_if_quiet(text: str, as_of: int, dataset: Dataset) -> None:
    """A night (as_of, written as `text`) that is far from the last event is told as a warning. Raises NightError for no time."""
    words = checked_words(as_of)
    last = dataset.events.timestamp[-1:].tolist() if dataset.meta.order == "timestamp" else []
    if last and (days := (as_of - last[0]) // DAY) > QUIET_DAYS:
        why = "an item says that it was made later" if text == "end" else "historical data want --as-of end"
        log.warning("the last event is %s days before %s, so all recent counts are 0: %s", f"{days:,}", words, why)


def checked_words(as_of: int) -> str:
    """The time as a person reads it. Raises NightError if it is none."""
    try:
        return moment_words(as_of)
    except (OverflowError, ValueError, OSError) as error:
        raise NightError(f"--as-of {as_of} is no time in seconds since 1970 (milliseconds, perhaps?): {error}") from error


def end_of(dataset: Dataset) -> int:
    """The start of the day after the last event or item: everything in the data set is known then."""
    created = dataset.items.created_at
    known = [*dataset.events.timestamp[-1:].tolist(), *created[created != MISSING_TIME].tolist()]
    return (max(known, default=0) // DAY + 1) * DAY


def moment_words(timestamp: int) -> str:
    """A time as a person reads it, in UTC."""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
