"""Times as the sources write them, read without the locale of the machine; all of them UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_WRITTEN = re.compile(r"^(?P<month>[A-Z][a-z]{2,8})\.? (?P<day>\d{1,2}),? (?P<year>\d{4})$", re.ASCII)
_AMERICAN = re.compile(r"^(\d{1,2})/(\d{1,2})/(\d{4}) (1[0-2]|0?\d):([0-5]\d):([0-5]\d) (AM|PM)$", re.ASCII)
_MILLISECONDS_FROM = 100_000_000_000


def written_day(text: str) -> int | None:
    """ "November 5, 2011" (or "Nov 5, 2011") -> the first second of that day; None for anything else."""
    match = _WRITTEN.match(text.strip())
    if match is None or match["month"][:3] not in _MONTHS:
        return None
    return _seconds(int(match["year"]), _MONTHS.index(match["month"][:3]) + 1, int(match["day"]))


def iso_time(text: str) -> int | None:
    """ "2018-01-04", "2018-01-04 10:00:00" or with an offset -> seconds; None for anything else."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return int(moment.timestamp())


def any_time(text: str) -> int | None:
    """Seconds, milliseconds (numbers from 10^11 up), or an ISO date or time -> seconds; None for anything else."""
    word = text.strip()
    if re.fullmatch(r"-?\d{1,16}(\.0+)?", word, re.ASCII):
        number = int(word.partition(".")[0])
        return number // 1000 if number >= _MILLISECONDS_FROM else number
    return iso_time(word)


def american_time(text: str) -> int | None:
    """ "11/13/2019 8:36:57 AM" -> seconds; None for anything else."""
    match = _AMERICAN.match(text.strip())
    if match is None:
        return None
    month, day, year, hour, minute, second = (int(match[place]) for place in range(1, 7))
    hour = hour % 12 + (12 if match[7] == "PM" else 0)
    start = _seconds(year, month, day)
    return None if start is None else start + hour * 3600 + minute * 60 + second


def _seconds(year: int, month: int, day: int) -> int | None:
    try:
        return int(datetime(year, month, day, tzinfo=UTC).timestamp())
    except ValueError:
        return None
