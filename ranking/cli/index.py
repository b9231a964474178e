"""`brewline index`: the snapshots of a store, their checks, and the way back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from index.errors import BrewlineError
from ranking.cli.output import emit, words
from ranking.cli.tune import tune

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from index.check import GateResult
    from index.diff import Difference
    from index.publish import SnapshotInfo
    from index.snapshot import Snapshot

app = typer.Typer(
    no_args_is_help=True, help="Look after the snapshots of a store: list, show, compare, verify, roll back, sweep, tune."
)
app.command()(tune)

Store = Annotated[Path, typer.Option("--store", help="The snapshot store.", metavar="DIR")]
Name = Annotated[str, typer.Argument(help="A snapshot's name; the served one if none is given.", metavar="[SNAPSHOT]")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


class NoSuchStore(BrewlineError):
    """The folder given as a store is not there, or nothing was published in it."""


@app.command("list")
def list_(store: Store, as_json: AsJson = False) -> None:
    """List every snapshot, oldest first, with the served one and the one that a rollback goes to.

    One that a gate refused, or that was rolled back, is not in the line of served ones (`in_line` is false in the JSON).

    brewline index list --store store/
    """
    from index.publish import list_snapshots

    found = list_snapshots(_existing(store))
    emit({"snapshots": [asdict(info) for info in found]}, as_json=as_json, table=lambda: _list_table(found))


@app.command()
def show(store: Store, name: Name = "", as_json: AsJson = False) -> None:
    """Show what a snapshot says about itself: counts, encoder, recipe, recall, parts, times.

    brewline index show --store store/ 20260131-0123456789ab
    """
    snapshot = _open(store, name)
    facts = asdict(snapshot.manifest)
    emit(
        {"name": snapshot.name, **facts, "parts": snapshot.parts, "run": snapshot.run()},
        as_json=as_json,
        table=lambda: _show_table(snapshot),
    )


@app.command()
def diff(
    store: Store,
    before: Annotated[str, typer.Argument(help="The older; where a rollback goes if none is given.", metavar="[OLD]")] = "",
    after: Annotated[str, typer.Argument(help="The newer; the served one if none is given.", metavar="[NEW]")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare two snapshots: which ids came and went, how many vectors moved and how far.

    brewline index diff --store store/
    """
    from index.diff import compare

    found = compare(_open(store, before or _way_back(store)), _open(store, after))
    emit(asdict(found), as_json=as_json, table=lambda: _diff_table(found))


@app.command()
def verify(store: Store, name: Name = "", as_json: AsJson = False) -> None:
    """Run every gate again: checksums, norms, ids, self-retrieval, recall, and the log of changes since. Status 2 if one fails.

    brewline index verify --store store/
    """
    from index.check import GateResult, require_gates, run_gates
    from index.manifest import SnapshotTorn
    from index.snapshot import Snapshot, snapshots_dir

    path = snapshots_dir(_existing(store)) / name if name else _served(store)
    try:
        snapshot = Snapshot.open(path, verify=False)
        results = [*run_gates(snapshot, None), _live_log(store, snapshot)]
    except SnapshotTorn as error:
        results = [GateResult("checksums", False, str(error), "a snapshot that can be opened")]
    emit(
        {"name": path.name, "passed": all(one.passed for one in results), "gates": [asdict(one) for one in results]},
        as_json=as_json,
        table=lambda: _gates_table(path.name, results),
    )
    require_gates(results)


@app.command()
def rollback(store: Store, as_json: AsJson = False) -> None:
    """Serve the snapshot that was served before. Running servers follow within a second or two (`--swap-poll-seconds`).

    brewline index rollback --store store/
    """
    from index.publish import rollback as go_back

    name = go_back(_existing(store))
    emit({"served": name}, as_json=as_json, table=lambda: _one_line(f"served now: {name}"))


@app.command()
def gc(
    store: Store,
    keep: Annotated[
        int, typer.Option(help="How many of the newest snapshots stay, beside the served one and its way back.", min=0)
    ] = 7,
    as_json: AsJson = False,
) -> None:
    """Remove old snapshots and what crashed nights left behind. The served one and the one before it always stay.

    brewline index gc --store store/ --keep 2
    """
    from index.publish import collect_garbage

    gone = collect_garbage(_existing(store), keep)
    emit({"removed": gone}, as_json=as_json, table=lambda: _one_line(f"removed {len(gone)}: {', '.join(gone) or 'nothing'}"))


def _existing(store: Path) -> Path:
    if not store.is_dir():
        raise NoSuchStore(f"--store {store}: no such folder; `brewline nightly` makes one")
    return store


def _served(store: Path) -> Path:
    from index.publish import current

    path = current(_existing(store))
    if path is None:
        raise NoSuchStore(f"--store {store}: nothing was published; run `brewline nightly`, or name a snapshot")
    return path


def _open(store: Path, name: str) -> Snapshot:
    from index.snapshot import Snapshot, snapshots_dir

    return Snapshot.open(snapshots_dir(_existing(store)) / name if name else _served(store), verify=False)


def _live_log(store: Path, snapshot: Snapshot) -> GateResult:
    """Whether every change since the snapshot can be read."""
    from index.changes import fold
    from index.check import GateResult
    from index.live import LIVE_DIR, folded_position
    from index.wal import LogError

    expected = "every change since the snapshot as it was written"
    try:
        folded = fold(store / LIVE_DIR, folded_position(snapshot.manifest, snapshot.name))
    except LogError as error:
        return GateResult("live log", False, str(error), expected)
    seen = f"{len(folded.upserts)} items put in and {len(folded.withdrawn)} withdrawn, up to change {folded.position}"
    return GateResult("live log", True, seen, expected)


def _way_back(store: Path) -> str:
    from index.publish import list_snapshots

    names = [info.name for info in list_snapshots(_existing(store)) if info.rollback]
    if not names:
        raise NoSuchStore(f"--store {store}: no snapshot was served before this one; name the two to compare")
    return names[0]


def _list_table(found: Sequence[SnapshotInfo]) -> Table:
    from retrieval.moments import moment_words

    table = Table("snapshot", "state", "items", "as of", "encoder", "MiB")
    for info in found:
        past = "" if info.in_line else "not in the line of served ones"
        state = "served" if info.current else "rollback goes here" if info.rollback else past
        facts = (f"{info.count:,}", moment_words(info.as_of), info.fingerprint, f"{info.bytes / 2**20:,.1f}")
        table.add_row(info.name, *((f"damaged: {info.problem}", "", "", "", "") if info.problem else (state, *facts)))
    return table


def _show_table(snapshot: Snapshot) -> Table:
    from retrieval.moments import moment_words

    facts = snapshot.manifest
    recall = facts.recall
    table = Table("fact", "value", title=f"Snapshot {snapshot.name}", title_justify="left", show_header=False)
    table.add_row("items", f"{facts.count:,} of {facts.dims} dims, {facts.dtype}, {facts.metric}")
    table.add_row("as of", moment_words(facts.as_of))
    table.add_row("encoder", facts.fingerprint)
    table.add_row("index", f"{facts.recipe} ({', '.join(f'{key} {value}' for key, value in facts.build.items())})")
    if facts.shards:
        table.add_row(
            "shards", f"{len(facts.shards)} of {min(facts.shards):,} to {max(facts.shards):,} items, each with that index"
        )
    measured = (
        "not measured" if recall is None else f"@{recall.k} mean {recall.mean}, 5th percentile {recall.p5}, on {recall.source}"
    )
    table.add_row("recall", measured)
    table.add_row("parts", ", ".join(snapshot.parts) or "none")
    table.add_row("parent", facts.parent or "none")
    table.add_row("files", f"{len(facts.files)}, {sum(fact.bytes for fact in facts.files.values()) / 2**20:,.1f} MiB")
    return table


def _diff_table(found: Difference) -> Table:
    def some(count: int, ids: Sequence[str]) -> Text:
        return words(f"{count:,}" + (f": {', '.join(ids)}{', ...' if count > len(ids) else ''}" if ids else ""))

    table = Table("", "", title=f"From {found.before} to {found.after}", title_justify="left", show_header=False)
    table.add_row("came", some(found.added, found.added_ids))
    table.add_row("went", some(found.removed, found.removed_ids))
    told = "not compared: another encoder" if found.moved is None else f"{found.moved:,}, the farthest by {found.largest:.3g}"
    table.add_row("stayed", f"{found.kept:,}")
    table.add_row("of them moved", told)
    table.add_row("parts that changed", ", ".join(found.parts) or "none")
    return table


def _gates_table(name: str, results: Sequence[GateResult]) -> Table:
    table = Table("gate", "", "seen", "expected", title=f"Snapshot {name}", title_justify="left")
    for one in results:
        table.add_row(one.name, "passed" if one.passed else "FAILED", one.seen, one.expected)
    return table


def _one_line(text: str) -> Table:
    table = Table.grid()
    table.add_row(text)
    return table
