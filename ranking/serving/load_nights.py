"""The two nights of a load that swaps: which snapshots they are, whose models made them, and links that lead to those models."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from index.errors import BrewlineError
from index.publish import SnapshotInfo, list_snapshots
from index.snapshot import Snapshot, snapshots_dir
from ranking.serving.load_server import ServerWish
from retrieval.catalog import Catalog

PARTS = ("snapshot", "encoder", "ranker")

Point = Callable[[bool], None]
"""Called with whether the models of the other night are to be served."""


class NoSecondSnapshot(BrewlineError):
    """A store has nothing to swap to."""


@dataclass(frozen=True)
class Night:
    """A snapshot by name, and the fingerprints of the models that made it, as an answer names them. No ranker: ""."""

    snapshot: str
    encoder: str
    ranker: str

    def differs(self, other: Night) -> dict[str, bool]:
        """For each of `PARTS` whether it is another one."""
        mine, others = (self.snapshot, self.encoder, self.ranker), (other.snapshot, other.encoder, other.ranker)
        return {part: one != two for part, one, two in zip(PARTS, mine, others, strict=True)}


@dataclass(frozen=True)
class Models:
    """The folders of the other night's models."""

    encoder: Path
    ranker: Path | None


def pair_of(server: ServerWish, other: Models | None = None, *, running: bool = False) -> tuple[Night, Night]:
    """The served night, and the newest other one of the same models, or of `other`.

    A server without a ranker serves nights of any; of one that was `running` before it is not known whether it has one.
    Raises NoSecondSnapshot, and the encoder's own errors if it is no such folder.
    """
    store = server.store
    whole = [info for info in list_snapshots(store) if not info.problem]
    served = next((info for info in whole if info.current), None)
    if served is None:
        raise NoSecondSnapshot(f"--store {store} serves nothing that is whole; run `brewline nightly` first")
    now = _night(store, served)
    wanted = _made_by(other.encoder) if other is not None else now.encoder.partition("-")[0]
    others = [_night(store, info) for info in whole if not info.current and _fits(info, served, wanted)]
    if other is not None and other.ranker != server.ranker:
        others = [night for night in others if night.ranker not in ("", now.ranker)]
    elif server.ranker is not None or running:
        others = [night for night in others if night.ranker == now.ranker]
    if not others:
        models = "--other-encoder and --other-ranker" if other is not None else "the same models"
        raise NoSecondSnapshot(
            f"--store {store} holds no second snapshot of encoder {wanted} and its ranker, and a swap needs two: "
            f"run `brewline nightly` with {models} and another --as-of, then `brewline index rollback`"
        )
    return now, others[-1]


def _fits(info: SnapshotInfo, served: SnapshotInfo, encoder: str) -> bool:
    return info.fingerprint.partition("-")[0] == encoder and (info.fingerprint != served.fingerprint or info.dims == served.dims)


def _made_by(encoder: Path) -> str:
    from retrieval.encoder import stored_fingerprint

    return stored_fingerprint(encoder)


def _night(store: Path, info: SnapshotInfo) -> Night:
    snapshot = Snapshot.open(snapshots_dir(store) / info.name, verify=False, searched_here=False)
    return Night(info.name, info.fingerprint, Catalog.open(snapshot).tokens_of)


@contextmanager
def linked(server: ServerWish, other: Models | None) -> Iterator[tuple[ServerWish, Point]]:
    """Inside the block a server as wished, but for links to its models, can be led to `other` and back: both by one rename.

    A server that looks between that and the move of the store's pointer finds models and snapshot that do not go together,
    refuses them and looks again.
    """
    if other is None:
        yield server, lambda _: None
        return
    with tempfile.TemporaryDirectory(prefix="brewline-swap-") as folder:
        home = Path(folder)
        for name, models in (("first", Models(server.encoder, server.ranker)), ("second", other)):
            (home / name).mkdir()
            (home / name / "encoder").symlink_to(models.encoder.resolve())
            if models.ranker is not None:
                (home / name / "ranker").symlink_to(models.ranker.resolve())

        def point(away: bool) -> None:
            beside = home / "next"
            beside.symlink_to(home / ("second" if away else "first"))
            beside.replace(home / "now")

        point(False)
        ranker = None if server.ranker is None else home / "now" / "ranker"
        yield replace(server, encoder=home / "now" / "encoder", ranker=ranker), point
