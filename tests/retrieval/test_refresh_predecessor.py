"""A night replaces whatever was published before it, however broken, and says that it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from index.build import build
from index.publish import current, publish
from index.snapshot import Snapshot
from index.store import StoreUnavailable
from index.writer import SnapshotWriter
from ranking.cli import main as cli
from retrieval.catalog import CATALOG_PART, Catalog, write_catalog
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import Encoder
from retrieval.moments import NightError, end_of
from retrieval.refresh import nightly

Damage = Callable[[Path, Path], object]
"""What happens to (the store, the served snapshot's folder)."""


def halve(name: str) -> Damage:
    def damage(_store: Path, folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 2])

    return damage


def flip(name: str) -> Damage:
    def damage(_store: Path, folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (folder / name).write_bytes(content)

    return damage


def remove(name: str) -> Damage:
    return lambda _store, folder: (folder / name).unlink()


def point(content: bytes) -> Damage:
    return lambda store, _folder: (store / "CURRENT").write_bytes(content)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "half a catalogue": (halve("catalog.arrow"), "catalog.arrow has"),
    "no manifest": (remove("MANIFEST.json"), "no MANIFEST.json"),
    "another manifest": (flip("MANIFEST.json"), "MANIFEST.json hashes to"),
    "flipped vectors": (flip("vectors.npy"), "vectors.npy has sha256"),
    "half the vectors": (halve("vectors.npy"), "vectors.npy has"),
    "no vectors": (remove("vectors.npy"), "vectors.npy is missing"),
    "no folder": (lambda _store, folder: shutil.rmtree(folder), "which is not there"),
    "garbage in CURRENT": (point(b"\x00\xffgarbage [bold]\n"), "CURRENT holds"),
    "nothing in CURRENT": (point(b""), "holds 0 lines"),
}


@pytest.fixture(scope="module")
def encoder(encoder_folders: tuple[Path, Path]) -> Encoder:
    return Encoder.load(encoder_folders[0])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset, encoder: Encoder) -> Path:
    """A store with one good night. Shared: copy it."""
    store = tmp_path_factory.mktemp("first") / "store"
    nightly(tiny_dataset, encoder, None, store, end_of(tiny_dataset))
    return store


@pytest.fixture
def store(tmp_path: Path, first: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "store"))


def served(store: Path) -> Snapshot:
    path = current(store)
    assert path is not None
    snapshot = Snapshot.open(path)
    assert len(Catalog.open(snapshot)) == snapshot.manifest.count
    return snapshot


@pytest.mark.parametrize("later", [0, DAY])
@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_the_next_night_publishes_a_good_snapshot(
    store: Path,
    tiny_dataset: Dataset,
    encoder: Encoder,
    caplog: pytest.LogCaptureFixture,
    damage: Damage,
    words: str,
    later: int,
) -> None:
    good = served(store)
    right = np.array(good.vectors)
    damage(store, good.path)
    moment = end_of(tiny_dataset) + later
    report = nightly(tiny_dataset, encoder, None, store, moment)
    assert (report.embedded, report.published, report.items_before) == (60, True, None)
    assert report.predecessor.startswith("unreadable: ") and words in report.predecessor
    (warning,) = [record.getMessage() for record in caplog.records if "encoded anew" in record.message]
    assert words in warning
    if not later:
        np.testing.assert_allclose(served(store).vectors, right, atol=1e-6)
    caplog.clear()
    again = nightly(tiny_dataset, encoder, None, store, moment)
    assert (again.snapshot, again.published, again.embedded) == (report.snapshot, False, 0)
    assert (again.predecessor, again.items_before) == (report.snapshot, 60)
    assert not caplog.records


@pytest.mark.parametrize(
    ("dims", "catalogue", "words"), [(8, True, "8 dims under encoder"), (32, False, "no part catalog.arrow")]
)
def test_a_whole_snapshot_that_cannot_be_used_is_replaced(
    tmp_path: Path, tiny_dataset: Dataset, encoder: Encoder, dims: int, catalogue: bool, words: str
) -> None:
    items, moment = tiny_dataset.items, end_of(tiny_dataset)
    vectors = np.eye(60, dims, dtype=np.float32)
    built = build(vectors)
    with SnapshotWriter(tmp_path, fingerprint=encoder.fingerprint, as_of=moment) as writer:
        writer.vectors(vectors)
        writer.ids(items.item_id)
        writer.index(built.index, recipe=str(built.recipe))
        if catalogue:
            writer.part(CATALOG_PART, write_catalog(items, {}, [""] * 60, moment))
    publish(tmp_path, writer.name)
    report = nightly(tiny_dataset, encoder, None, tmp_path, moment)
    assert words in report.predecessor and report.embedded == 60
    assert served(tmp_path).manifest.dims == 32


def test_garbage_in_history_stops_no_night(
    store: Path, tiny_dataset: Dataset, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    (store / "HISTORY").write_text("who knows\n")
    report = nightly(tiny_dataset, encoder, None, store, end_of(tiny_dataset) + DAY)
    assert report.published and served(store).name == report.snapshot
    assert report.items_before == 60
    assert "HISTORY is now HISTORY.unreadable" in caplog.text
    assert (store / "HISTORY.unreadable").read_text() == "who knows\n"
    assert (store / "HISTORY").read_text() == f"{report.predecessor}\n"


def test_what_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, tiny_folder: Path, encoder_folders: tuple[Path, Path]
) -> None:
    command = ["nightly", str(tiny_folder), "--encoder", str(encoder_folders[0]), "--as-of", "end", "--store"]
    (tmp_path / "file").touch()
    shown = CliRunner().invoke(cli.app, [*command, str(tmp_path / "file")])
    assert isinstance(shown.exception, NightError) and "cannot be made" in str(shown.exception)
    shown = CliRunner().invoke(cli.app, [*command, str(tmp_path / "store"), "--members", "redis://127.0.0.1:1"])
    assert isinstance(shown.exception, StoreUnavailable)
    assert not list((tmp_path / "store").iterdir())


def test_the_command_shows_it_and_ends_well(store: Path, tiny_folder: Path, encoder_folders: tuple[Path, Path]) -> None:
    command = ["nightly", str(tiny_folder), "--encoder", str(encoder_folders[0]), "--store", str(store), "--as-of", "end"]
    point(b"[bold]gar/bage\n")(store, store)
    shown = CliRunner().invoke(cli.app, [*command, "--json"], catch_exceptions=False)
    assert shown.exit_code == 0
    report = json.loads(shown.stdout)
    assert "CURRENT holds '[bold]gar/bage'" in report["predecessor"] and report["items_before"] is None
    (served(store).path / "MANIFEST.json").unlink()
    shown = CliRunner().invoke(cli.app, command, env={"COLUMNS": "400"}, catch_exceptions=False)
    assert shown.exit_code == 0
    assert "unreadable: " in shown.stdout and "nothing to be compared with" in shown.stdout
    shown = CliRunner().invoke(cli.app, command, env={"COLUMNS": "400"}, catch_exceptions=False)
    assert f"{served(store).name}; 60 items, tonight's count was compared with that" in shown.stdout
