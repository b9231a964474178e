"""A `Dataset` becomes a data folder: written beside its place, then moved there in one step.

`read_dataset(write_dataset(dataset))` gives the same data set back, as long as the data set is one that a folder can
hold (events in time order, numbers finite or NaN, `numbers` without the names in COUNT_COLUMNS).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.data.meta import META_FIELDS
from retrieval.data.read import ITEM_COLUMNS
from retrieval.data.schema import (
    COUNT_COLUMNS,
    MISSING_TIME,
    Connections,
    DataError,
    Dataset,
    Events,
    Items,
    Members,
    Meta,
)

FILES = frozenset((
    "dataset.json", "items.parquet", "interactions.parquet", "members.parquet", "connections.parquet",
    "item_stats_at_test.parquet", "truth",
))  # fmt: skip
"""What may be in a folder that is replaced: the schema's files, and those that describe an invented world."""
SPLIT_NAMES = ("train", "valid", "test")


def write_dataset(dataset: Dataset, folder: Path) -> None:
    """The folder holds exactly this data set; a reader sees the old folder or the new one, never half of it.

    An existing data folder is replaced. Raises DataError if the place holds anything else, or if the data set has
    something that the schema cannot carry.
    """
    folder = Path(folder).resolve()
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        draft.chmod(0o755)
        _write_files(dataset, draft)
        _swap(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name a new folder to write the data set to")
    names = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in names if name not in FILES]
    if foreign or (names and "dataset.json" not in names):
        what = foreign[0] if foreign else names[0]
        raise DataError(f"{folder} holds {what!r} and is not (only) a data folder; nothing was written, name another folder")


def _swap(draft: Path, folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        draft.replace(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.replace(old)
    try:
        draft.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old)


def _write_files(dataset: Dataset, draft: Path) -> None:
    _write_table(draft / "items.parquet", _items_table(dataset.items))
    if len(dataset.members):
        _write_table(draft / "members.parquet", _members_table(dataset.members))
    if len(dataset.events):
        _write_table(draft / "interactions.parquet", _events_table(dataset))
    if dataset.connections is not None:
        _write_table(draft / "connections.parquet", _connections_table(dataset.connections, dataset.members))
    (draft / "dataset.json").write_text(_meta_json(dataset.meta), encoding="utf-8")


def _write_table(path: Path, table: pa.Table) -> None:
    # Without Arrow's own schema a dictionary column is read back as plain strings, by every reader.
    pq.write_table(table, path, compression="zstd", store_schema=False)


def _strings(column: list[str], name: str) -> pa.Array:
    try:
        return pa.array(column, pa.large_string())
    except (UnicodeEncodeError, pa.ArrowInvalid) as error:
        raise DataError(f"column {name!r} holds text that UTF-8 cannot carry ({error}); replace those characters") from error


def _times(column: npt.NDArray[np.int64]) -> pa.Array:
    return pa.array(column, pa.int64(), mask=column == MISSING_TIME)


def _named(codes: npt.NDArray[np.integer], names: tuple[str, ...] | list[str], name: str) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32(), mask=codes < 0), _strings(list(names), name))


def _numbers(numbers: dict[str, npt.NDArray[np.float64]], taken: frozenset[str]) -> dict[str, pa.Array]:
    clash = sorted(name for name in numbers if name in taken or name in COUNT_COLUMNS)
    if clash:
        raise DataError(f"a number column is named {clash[0]!r}, which the schema uses for something else; rename it")
    return {name: pa.array(column, pa.float64(), mask=np.isnan(column)) for name, column in numbers.items()}


def _items_table(items: Items) -> pa.Table:
    texts = {"item_id": items.item_id, "title": items.title, "text": items.text, "category": items.category}
    facets = {name: column for name, column in items.facets.items() if any(column)}
    columns = {name: _strings(column, name) for name, column in {**texts, "creator": items.creator, **facets}.items()}
    return pa.table({**columns, "created_at": _times(items.created_at), **_numbers(items.numbers, ITEM_COLUMNS | facets.keys())})


def _members_table(members: Members) -> pa.Table:
    if "member_id" in members.profile:
        raise DataError("a profile field is named 'member_id', which the schema uses for something else; rename it")
    words = {name: _strings(column, name) for name, column in members.profile.items()}
    numbers = _numbers(members.numbers, frozenset(("member_id", *words)))
    return pa.table({"member_id": _strings(members.member_id, "member_id"), **words, **numbers})


def _events_table(dataset: Dataset) -> pa.Table:
    events = dataset.events
    columns = {
        "event_id": pa.array(events.event_id, pa.int64()),
        "member_id": _named(events.member, dataset.members.member_id, "member_id"),
        "item_id": _named(events.item, dataset.items.item_id, "item_id"),
        "timestamp": pa.array(events.timestamp, pa.int64()),
        "action": _named(events.action, events.actions, "action"),
        "split": _named(events.split, SPLIT_NAMES, "split"),
    }
    return pa.table({**columns, **_optional_columns(events)})


def _optional_columns(events: Events) -> dict[str, pa.Array]:
    """The columns that a folder may lack, where at least one event has a value."""
    columns: dict[str, pa.Array] = {}
    if (events.label >= 0).any():
        columns["label"] = pa.array(events.label, pa.int8(), mask=events.label < 0)
    if not np.isnan(events.value).all():
        columns["value"] = pa.array(events.value, pa.float32(), mask=np.isnan(events.value))
    if (events.request >= 0).any():
        columns["request_id"] = _named(events.request, events.requests, "request_id")
    if (events.position >= 0).any():
        columns["position"] = pa.array(events.position, pa.int16(), mask=events.position < 0)
    if (events.surface >= 0).any():
        columns["surface"] = _named(events.surface, events.surfaces, "surface")
    return columns


def _connections_table(edges: Connections, members: Members) -> pa.Table:
    return pa.table({
        "member_id": _named(edges.member, members.member_id, "member_id"),
        "other_id": _strings(edges.other_id, "other_id"),
        "kind": _strings(edges.kind, "kind"),
        "since": _times(edges.since),
    })  # fmt: skip


def _meta_json(meta: Meta) -> str:
    clash = sorted(set(meta.extra) & set(META_FIELDS))
    if clash:
        raise DataError(f"the extra facts of the data set name {clash[0]!r}, which the schema uses; rename it")
    facts = {
        "name": meta.name, "order": meta.order, "retrieval_actions": list(meta.retrieval_actions),
        "label": meta.label, "value": meta.value, "cut_valid": meta.cut_valid, "cut_test": meta.cut_test, **meta.extra,
    }  # fmt: skip
    try:
        return json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"the extra facts of the data set are not JSON ({error}); keep words and finite numbers") from error
