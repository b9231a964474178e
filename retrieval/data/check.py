"""A data folder in numbers: sizes, splits, refused rows, and whatever looks like the future leaking into the past."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from retrieval.data.columns import is_number, is_text
from retrieval.data.leaks import Warned, folder_warnings, warnings_of
from retrieval.data.read import ITEM_COLUMNS, read_dataset_report
from retrieval.data.schema import COUNT_COLUMNS, FACETS, Dataset, action_kind

SHOWN_REFUSALS = 20
HISTORY_LENGTHS = ((1, 1), (2, 4), (5, 20), (21, None))
SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class CheckReport:
    """What `brewline data check` says of a folder; `as_json` is the same as one plain object.

    `sizes` items, members, events, engagements, connections. `span` first and last day of the log. `splits`, `labels`,
    `actions` (before the colon) and `history_lengths` (distinct items engaged with, over the members that have events)
    count rows. `cold_items` is the share of items without an engagement before `cut_test`. `ignored_columns` are there
    and not read. `refused` counts rows by file and reason, `first_refusals` shows up to 20 of them.
    """

    name: str
    order: str
    sizes: dict[str, int]
    span: tuple[str, str] | None
    cuts: tuple[str, str] | None
    splits: dict[str, int]
    labels: dict[str, int]
    actions: dict[str, int]
    history_lengths: dict[str, int]
    cold_items: float | None
    texts: dict[str, float]
    numbers: dict[str, float]
    ignored_columns: dict[str, list[str]]
    refused: dict[str, int]
    first_refusals: list[str]
    warnings: list[Warned] = field(default_factory=list)

    @property
    def refused_rows(self) -> int:
        """Rows left out, over all files."""
        return sum(self.refused.values())

    def as_json(self) -> dict[str, object]:
        """The report as an object that `json.dumps` takes."""
        return {**asdict(self), "refused_rows": self.refused_rows}


def check_folder(folder: Path) -> CheckReport:
    """What the folder holds and what in it should worry its owner. Raises DataError if it is malformed."""
    folder = Path(folder)
    dataset, refusals = read_dataset_report(folder)
    events = dataset.events
    return CheckReport(
        name=dataset.meta.name,
        order=dataset.meta.order,
        sizes={
            "items": len(dataset.items),
            "members": len(dataset.members),
            "events": len(events),
            "engagements": int(dataset.is_engagement.sum()),
            "connections": 0 if dataset.connections is None else len(dataset.connections.member),
        },
        span=(_day(int(events.timestamp[0])), _day(int(events.timestamp[-1]))) if len(events) else None,
        cuts=(_day(dataset.meta.cut_valid), _day(dataset.meta.cut_test)) if len(events) else None,
        splits={name: int((events.split == code).sum()) for code, name in enumerate(SPLIT_NAMES)},
        labels={name: int((events.label == code).sum()) for name, code in (("1", 1), ("0", 0), ("unknown", -1))},
        actions=_actions(dataset),
        history_lengths=_history_lengths(dataset),
        cold_items=_cold_items(dataset),
        texts=_filled_texts(dataset),
        numbers={name: float(np.mean(~np.isnan(column))) for name, column in dataset.items.numbers.items()},
        ignored_columns=_ignored_columns(folder),
        refused=refusals.counts(),
        first_refusals=[str(refusal) for refusal in refusals[:SHOWN_REFUSALS]],
        warnings=[*folder_warnings(folder), *warnings_of(dataset)],
    )


def _day(timestamp: int) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d")


def _actions(dataset: Dataset) -> dict[str, int]:
    found = np.bincount(dataset.events.action, minlength=len(dataset.events.actions))
    total: Counter[str] = Counter()
    for action, count in zip(dataset.events.actions, found.tolist()):
        total[action_kind(action)] += count
    return dict(total.most_common())


def _history_lengths(dataset: Dataset) -> dict[str, int]:
    """ "2-4" -> members that engaged with so many distinct items; "0": members with events but no engagement."""
    events = dataset.engagements
    pairs = np.unique(events.member.astype(np.int64) * max(len(dataset.items), 1) + events.item)
    lengths = np.bincount(pairs // max(len(dataset.items), 1), minlength=len(dataset.members))
    found = {"0": int((lengths == 0).sum())}
    for least, most in HISTORY_LENGTHS:
        inside = (lengths >= least) & (lengths <= (most or np.inf))
        name = f"{least}+" if most is None else str(least) if least == most else f"{least}-{most}"
        found[name] = int(inside.sum())
    return found


def _cold_items(dataset: Dataset) -> float | None:
    if not len(dataset.events):
        return None
    warm = np.unique(dataset.engagements.before(dataset.meta.cut_test).item)
    return 1.0 - len(warm) / len(dataset.items)


def _filled_texts(dataset: Dataset) -> dict[str, float]:
    """Field -> share of items (members) that have it."""
    items = dataset.items
    words = {"title": items.title, "text": items.text, "category": items.category, "creator": items.creator, **items.facets}
    filled = {name: _share(column) for name, column in words.items()}
    return {**filled, **{f"members: {name}": _share(column) for name, column in dataset.members.profile.items()}}


def _share(column: Iterable[str]) -> float:
    found = [bool(word) for word in column]
    return sum(found) / len(found) if found else 0.0


def _ignored_columns(folder: Path) -> dict[str, list[str]]:
    """File -> columns that are neither words nor numbers the schema knows, and so are not read."""
    ignored = {}
    schema = pq.read_schema(folder / "items.parquet")
    extra = [f for f in schema if f.name not in ITEM_COLUMNS and f.name not in COUNT_COLUMNS]
    ignored["items.parquet"] = [f.name for f in extra if not (is_number(f.type) or (f.name in FACETS and is_text(f.type)))]
    if (folder / "members.parquet").exists():
        schema = pq.read_schema(folder / "members.parquet")
        ignored["members.parquet"] = [f.name for f in schema if not is_number(f.type) and not is_text(f.type)]
    return {file: names for file, names in ignored.items() if names}
