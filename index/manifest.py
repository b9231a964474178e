"""What a snapshot says about itself: MANIFEST.json, its checks, and the errors of snapshots."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from index.codes import Codes, CodesError, codes_named
from index.errors import BrewlineError
from index.recipe import SHORT

FORMAT_VERSION, DIVIDED_VERSION, SHORT_VERSION = 1, 2, 3
"""Of a snapshot whose vectors stand in one file, of one that is divided, and of one that is searched by a short list, divided or
not: a program that knows only those before must not take it for damaged. Each other is written as it always was, to the byte."""
METRIC = "inner_product"
NAME_PATTERN = re.compile(r"\d{8}-[0-9a-f]{12}")
"""Day of `as_of` (UTC), then the first 12 hex digits of the manifest's SHA-256. The manifest hashes every other file, so
the folder's name vouches for the whole folder."""

Fact = str | int | float
T = TypeVar("T")


class SnapshotError(BrewlineError):
    """A snapshot cannot be written or read."""


class SnapshotNotFound(SnapshotError):
    """There is no snapshot at this place."""


class SnapshotTorn(SnapshotError):
    """A file of a snapshot is missing, truncated or changed."""


class SnapshotMismatch(SnapshotError):
    """A snapshot was made by another encoder than the one that asks."""


class SnapshotVersion(SnapshotError):
    """A snapshot was written in a format that this program does not know."""


@dataclass(frozen=True, slots=True)
class FileFact:
    """Content hash and size of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Share of the exact top k that the index returns: mean and 5th percentile over `queries` queries.

    `source` says where the queries came from: "items" (sampled rows of the snapshot) or "members" (real query vectors).
    """

    k: int
    mean: float
    p5: float
    queries: int
    source: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is true of a snapshot whenever and wherever it is read. Times live in RUN.json instead.

    `dtype` is what the vectors are kept in (`index.codes`). `shards` are the rows of each shard, none if the snapshot is not
    divided; `recipe` and `build` are then those of every shard's index, `recall` that of the merged answer.
    """

    count: int
    dims: int
    fingerprint: str
    as_of: int
    recipe: str
    build: Mapping[str, Fact]
    files: Mapping[str, FileFact]
    recall: Recall | None = None
    parent: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    dtype: Codes = "float32"
    metric: str = METRIC
    shards: tuple[int, ...] = ()
    format_version: int = field(init=False)

    def __post_init__(self) -> None:
        plain = DIVIDED_VERSION if self.shards else FORMAT_VERSION
        object.__setattr__(self, "format_version", SHORT_VERSION if self.recipe.endswith(SHORT) else plain)

    def to_bytes(self) -> bytes:
        """The manifest as JSON is returned: the same facts give the same bytes.

        Raises SnapshotError on NaN or infinite facts, which JSON cannot say.
        """
        facts = asdict(self)
        if not self.shards:
            del facts["shards"]
        try:
            return (json.dumps(facts, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
        except ValueError as error:
            raise SnapshotError(f"a fact for MANIFEST.json is NaN or infinite: {error}") from None

    @property
    def name(self) -> str:
        """The only name that a folder with this manifest may have."""
        return f"{_day(self.as_of)}-{digest(self.to_bytes())}"


def digest(manifest: bytes) -> str:
    """The first 12 hex digits of the SHA-256 of a manifest's bytes are returned: 2^48 names per day."""
    return hashlib.sha256(manifest).hexdigest()[:12]


def _day(as_of: int) -> str:
    try:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=as_of)
    except OverflowError:
        raise SnapshotError(f"as_of {as_of} is no time in seconds since 1970 (milliseconds, perhaps?)") from None
    return f"{moment.year:04d}{moment.month:02d}{moment.day:02d}"


def parse_manifest(content: bytes, folder_name: str) -> Manifest:
    """The manifest of the folder `folder_name` is returned, and its bytes are what the folder's name vouches for.

    Raises SnapshotTorn when the bytes are not the ones that were written or the folder was renamed, SnapshotVersion when
    the format is newer than this program.
    """
    if NAME_PATTERN.fullmatch(folder_name) is None or folder_name[9:] != digest(content):
        raise SnapshotTorn(
            f"snapshot {folder_name}: MANIFEST.json hashes to {digest(content)}, the folder's name says otherwise: "
            "the manifest was changed or the folder renamed; restore it or build the snapshot again"
        )
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise SnapshotTorn(f"snapshot {folder_name}: MANIFEST.json is not JSON ({error}); build it again") from None
    seen = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or seen not in (FORMAT_VERSION, DIVIDED_VERSION, SHORT_VERSION):
        raise SnapshotVersion(
            f"snapshot {folder_name} has format version {seen}, this program reads {FORMAT_VERSION} to {SHORT_VERSION}: "
            "use the program that wrote it, or build it again"
        )
    return _from_json(raw, folder_name)


def _from_json(raw: dict[str, Any], folder_name: str) -> Manifest:
    def get(key: str, kind: type[T]) -> T:
        value = raw.get(key)
        if type(value) is not kind:
            raise SnapshotTorn(f"snapshot {folder_name}: MANIFEST.json says {key}={value!r}, expected a {kind.__name__}")
        return value

    try:
        files = {name: FileFact(**fact) for name, fact in get("files", dict).items()}
        recall = None if raw.get("recall") is None else Recall(**get("recall", dict))
        codes = codes_named(get("dtype", str))
    except TypeError as error:
        raise SnapshotTorn(f"snapshot {folder_name}: MANIFEST.json is not complete: {error}") from None
    except CodesError as error:
        raise SnapshotVersion(f"snapshot {folder_name}: {error}; use the program that wrote it, or build it again") from None
    version = raw["format_version"]
    divided = version == DIVIDED_VERSION or (version == SHORT_VERSION and "shards" in raw)
    return Manifest(
        count=get("count", int),
        dims=get("dims", int),
        fingerprint=get("fingerprint", str),
        as_of=get("as_of", int),
        recipe=get("recipe", str),
        build=get("build", dict),
        files=files,
        recall=recall,
        parent=get("parent", str),
        extra=get("extra", dict),
        dtype=codes,
        metric=get("metric", str),
        shards=_shards(raw, folder_name) if divided else (),
    )


def _shards(raw: dict[str, Any], folder_name: str) -> tuple[int, ...]:
    """The rows of each shard of a divided snapshot, which are its rows together. Raises SnapshotTorn."""
    found, count = raw.get("shards"), raw.get("count")
    good = isinstance(found, list) and found and all(type(rows) is int and rows >= 0 for rows in found)
    if not good or sum(raw["shards"]) != count:
        raise SnapshotTorn(f"snapshot {folder_name}: MANIFEST.json says shards={found!r}, expected counts that make up {count!r}")
    return tuple(raw["shards"])
