"""Events told one by one, by name, become columns with the codes of a data folder that they are to be added to."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from retrieval.data.events import SMALL
from retrieval.data.schema import DataError, Dataset, Events, Members


class Columns:
    """Events in the order in which they were added; -1 and "" mean unknown."""

    def __init__(self) -> None:
        self.number, self.timestamp = array("q"), array("q")
        self.label, self.position = array("b"), array("h")
        self.member: list[str] = []
        self.item: list[str] = []
        self.action: list[str] = []
        self.request: list[str] = []
        self.surface: list[str] = []

    def add(
        self,
        number: int,
        member: str,
        item: str,
        timestamp: int,
        action: str,
        label: int,
        request: str,
        position: int,
        surface: str,
    ) -> None:
        """The event is the next one."""
        self.number.append(number)
        self.member.append(member)
        self.item.append(item)
        self.timestamp.append(timestamp)
        self.action.append(action)
        self.label.append(label)
        self.request.append(request)
        self.position.append(position)
        self.surface.append(surface)

    @property
    def members(self) -> list[str]:
        """Every member once, in order of appearance."""
        return list(dict.fromkeys(self.member))


def grown_members(members: Members, named: Sequence[str]) -> tuple[Members, Mapping[str, int]]:
    """The members with those that are new behind them (empty profile), and the row of each."""
    new = [name for name in named if name not in members.row_of]
    grown = replace(
        members,
        member_id=[*members.member_id, *new],
        profile={name: [*column, *[""] * len(new)] for name, column in members.profile.items()},
        numbers={name: np.append(column, np.full(len(new), np.nan)) for name, column in members.numbers.items()},
    )
    return grown, grown.row_of


def events_of(columns: Columns, base: Dataset, member: Mapping[str, int]) -> tuple[Events, npt.NDArray[np.int32]]:
    """The events with the codes of the base folder's log, new names behind its own; also the item rows, -1 for unknown items.

    Raises DataError for more actions or surfaces than a folder may have.
    """
    log = base.events
    action, actions = _coded(columns.action, log.actions)
    request, requests = _coded(columns.request, log.requests)
    surface, surfaces = _coded(columns.surface, log.surfaces)
    _few(actions, "actions", log.actions)
    _few(surfaces, "surfaces", log.surfaces)
    item = np.array([base.items.row_of.get(name, -1) for name in columns.item], np.int32)
    events = Events(
        event_id=np.array(columns.number, np.int64),
        member=np.array([member[name] for name in columns.member], np.int32),
        item=item,
        timestamp=np.array(columns.timestamp, np.int64),
        action=action.astype(np.int16),
        label=np.array(columns.label, np.int8),
        value=np.full(len(item), np.nan, np.float32),
        split=np.full(len(item), -1, np.int8),
        request=request,
        position=np.array(columns.position, np.int16),
        surface=surface.astype(np.int16),
        actions=actions,
        requests=requests,
        surfaces=surfaces,
    )
    return events, item


def identity(events: Events) -> npt.NDArray[np.void]:
    """What makes two events the same whatever their numbers: member, item, time and action, as one value each [E]."""
    rows = np.stack([events.member, events.item, events.timestamp, events.action], axis=1).astype(np.int64)
    return np.ascontiguousarray(rows).view([("", np.int64)] * 4)[:, 0]


def _coded(names: Sequence[str], known: tuple[str, ...]) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    codes = {name: code for code, name in enumerate(known)}
    found = [codes.setdefault(name, len(codes)) if name else -1 for name in names]
    return np.array(found, np.int32), tuple(codes)


def _few(names: tuple[str, ...], what: str, known: tuple[str, ...]) -> None:
    if len(names) > SMALL:
        first = names[len(known)]
        raise DataError(
            f"what was served names {len(names):,} distinct {what}, a folder holds at most {SMALL:,}; the first new one is "
            f"{first[:80]!r}: callers must send names of a few {what}, not ids; move the journal's files that have them elsewhere"
        )
