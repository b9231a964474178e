"""What was put in and withdrawn by day, as a night takes it over from the log into its snapshot.

A data folder knows the world up to its cut, the last event that it holds. What was put in or withdrawn since then wins over the
folder; of anything earlier the folder has had the chance to know, and it wins. An item's time is that of its putting in; a
withdrawal's, which the log does not tell, that of the first night that took it over, so it is never taken as older than it was.

  `changes.bin`  of a snapshot: the changes up to its `live_position` that still win, for the nights to come
  STORE/NIGHT.json  how far in the log the night at work reads: one that was killed and runs again makes the same bytes
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from index.changes import Folded, fold
from index.durable import write_durably
from index.live import LIVE_DIR, POSITION_FACT, folded_position
from index.manifest import NAME_PATTERN, SnapshotError
from index.snapshot import Snapshot, snapshots_dir
from index.wal import segments
from retrieval.data.schema import FACETS, MISSING_TIME, Dataset, Item, Items
from retrieval.live_catalog import PutItem
from retrieval.yesterday import Yesterday

CHANGES_PART, STATE_FILE = "changes.bin", "NIGHT.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begun:
    """A night of a time that follows a snapshot: it reads the log up to a position, and began at a time (seconds)."""

    as_of: int
    parent: str
    upto: int
    at: int


@dataclass(frozen=True)
class TakenOver:
    """The changes up to a position that win over the folder; `since` when each withdrawal was first taken over (seconds)."""

    folded: Folded = field(default_factory=Folded)
    since: Mapping[str, int] = field(default_factory=dict)

    @property
    def items(self) -> dict[str, PutItem]:
        """The items that were put in, by id. Raises CatalogError."""
        return {one: PutItem.parse(put.record) for one, put in sorted(self.folded.upserts.items())}

    def made(self, fingerprint: str) -> dict[str, tuple[str, npt.NDArray[np.float32]]]:
        """Prompt digest and vector by id of the items that this encoder read when they were put in."""
        puts = self.folded.upserts.items()
        return {one: (PutItem.parse(put.record).digest, put.vector) for one, put in puts if put.fingerprint == fingerprint}

    def to_bytes(self) -> bytes:
        """The bytes of `changes.bin`; `parse` reads them back."""
        return json.dumps({"since": dict(sorted(self.since.items()))}).encode() + b"\n" + self.folded.to_bytes()

    @classmethod
    def parse(cls, content: bytes) -> TakenOver:
        """What `to_bytes` wrote."""
        head, _, rest = content.partition(b"\n")
        return cls(Folded.parse(rest), {one: int(at) for one, at in json.loads(head)["since"].items()})

    def then(self, fresh: Folded, at: int) -> TakenOver:
        """These changes and the ones since, whose withdrawals are taken over at a time (seconds)."""
        touched = fresh.upserts.keys() | fresh.withdrawn
        upserts = {one: put for one, put in self.folded.upserts.items() if one not in touched} | fresh.upserts
        since = {one: then for one, then in self.since.items() if one not in touched} | dict.fromkeys(fresh.withdrawn, at)
        return TakenOver(Folded(fresh.position, upserts, set(since)), since)

    def winning(self, cut: int) -> TakenOver:
        """The changes that a folder with this cut (seconds) cannot know."""
        upserts = {one: put for one, put in self.folded.upserts.items() if PutItem.parse(put.record).at >= cut}
        since = {one: at for one, at in self.since.items() if at >= cut}
        return TakenOver(Folded(self.folded.position, upserts, set(since)), since)

    def over(self, dataset: Dataset) -> tuple[Dataset, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The folder with these items in place of its own or behind them, the rows that were put in and those withdrawn."""
        put, known = self.items, dataset.items.row_of
        places = [known[one] for one in put if one in known]
        new = [one for one in put if one not in known]
        items = _with_items(dataset.items, [put[one].item for one in put if one in known], places, [put[one].item for one in new])
        rows = [*places, *range(len(dataset.items), len(items))]
        gone = [known[one] for one in self.folded.withdrawn if one in known]
        return replace(dataset, items=items) if put else dataset, np.array(rows, np.int64), np.array(gone, np.int64)


def take_over(store_dir: Path, yesterday: Yesterday, as_of: int, cut: int, clock: Callable[[], float]) -> TakenOver:
    """What a night of `as_of` takes over: what yesterday's still wins, and the log since. The same again if the night is resumed.

    For the night that is alone with the store. Raises LogDamaged, LogTrimmed, CatalogError.
    """
    live = store_dir / LIVE_DIR
    before = _before(store_dir, yesterday)
    begun = _resumed(store_dir / STATE_FILE, as_of, yesterday.parent)
    fresh = fold(live, before.folded.position, None if begun is None else begun.upto)
    if begun is None:
        begun = Begun(as_of, yesterday.parent, fresh.position, int(clock()))
        write_durably(store_dir / STATE_FILE, json.dumps(asdict(begun)).encode())
    return before.then(fresh, begun.at).winning(cut)


def ended(store_dir: Path) -> None:
    """The next night decides for itself how far it reads."""
    (store_dir / STATE_FILE).unlink(missing_ok=True)


def facts_of(taken: TakenOver) -> dict[str, str]:
    """What a manifest says of the changes; nothing in a store that never took any."""
    return {POSITION_FACT: str(taken.folded.position)} if taken.folded.position else {}


def cut_of(dataset: Dataset, as_of: int) -> int:
    """The last moment (seconds) before `as_of` that a folder knows: its last event, else its newest item; 0 if neither."""
    times = dataset.events.timestamp if len(dataset.events) else dataset.items.created_at
    known = times[(times < as_of) & (times != MISSING_TIME)]
    return int(known.max()) if len(known) else 0


def _before(store_dir: Path, yesterday: Yesterday) -> TakenOver:
    """What the snapshot before took over. If it cannot be read, the whole one that knows most of the log stands in for it."""
    if yesterday.snapshot is not None:
        return _of(yesterday.snapshot)
    whole = []
    for path in sorted(snapshots_dir(store_dir).glob("*")):
        if NAME_PATTERN.fullmatch(path.name):
            try:
                whole.append(_of(Snapshot.open(path)))
            except SnapshotError as error:
                log.warning("not looked at for changes: %s", error)
    if whole:
        return max(whole, key=lambda taken: taken.folded.position)
    first = segments(store_dir / LIVE_DIR)[:1]
    start = first[0][0] - 1 if first else 0
    if start:
        log.warning("the changes 1 to %d left the log and no whole snapshot holds them: the folder decides about them", start)
    return TakenOver(Folded(start))


def _of(snapshot: Snapshot) -> TakenOver:
    if CHANGES_PART not in snapshot.parts:
        return TakenOver(Folded(folded_position(snapshot.manifest, snapshot.name)))
    return TakenOver.parse(snapshot.part(CHANGES_PART).read_bytes())


def _resumed(path: Path, as_of: int, parent: str) -> Begun | None:
    """How the same night began, if it did not end."""
    try:
        begun = Begun(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        log.warning("%s cannot be read (%s): the night begins anew", path, error)
        return None
    return begun if (begun.as_of, begun.parent) == (as_of, parent) else None


def _with_items(items: Items, replaced: list[Item], places: list[int], new: list[Item]) -> Items:
    """The items with some replaced at their places and new ones behind them; numbers that the folder lacks are left out."""

    def column(name: str, values: list[str]) -> list[str]:
        found = list(values)
        for place, item in zip(places, replaced):
            found[place] = _word(item, name, found[place])
        return [*found, *(_word(item, name, "") for item in new)]

    created = np.concatenate([items.created_at, np.zeros(len(new), np.int64)])
    numbers = {name: np.concatenate([known, np.zeros(len(new))]) for name, known in items.numbers.items()}
    for place, item in [*zip(places, replaced), *enumerate(new, len(items))]:
        created[place] = MISSING_TIME if item.created_at is None else item.created_at
        for name, known in numbers.items():
            known[place] = item.numbers.get(name, np.nan)
    ids = [*items.item_id, *(item.item_id for item in new)]
    words = {name: column(name, getattr(items, name)) for name in ("title", "text", "category", "creator")}
    facets = {name: column(name, known) for name, known in items.facets.items()}
    return Items(ids, words["title"], words["text"], words["category"], words["creator"], created, numbers, facets)


def _word(item: Item, name: str, before: str) -> str:
    """A word of an item put in by day; what nobody can say by day stays as the folder said it."""
    return item.facets.get(name, before) if name in FACETS else str(getattr(item, name))
