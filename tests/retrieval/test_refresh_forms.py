"""Nights that keep vectors shorter or in fewer bits: what is reused is what would be made anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from index.codes import Codes, rounded
from index.publish import current
from index.snapshot import Snapshot
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import NightReport, SnapshotForm, nightly


@pytest.fixture(scope="module")
def encoder(encoder_folders: tuple[Path, Path]) -> Encoder:
    return Encoder.load(encoder_folders[0])


def night(dataset: Dataset, encoder: Encoder, store: Path, codes: Codes, days: int = 0) -> tuple[NightReport, Snapshot]:
    report = nightly(dataset, encoder, None, store, end_of(dataset) + days * DAY, form=SnapshotForm(codes))
    path = current(store)
    assert path is not None
    return report, Snapshot.open(path)


@pytest.mark.parametrize(
    ("before", "after", "reused"),
    [
        ("int8", "int8", True),
        ("float16", "float16", True),
        ("float32", "int8", True),
        ("int8", "float32", False),
        ("float16", "int8", False),
    ],
)
def test_yesterdays_vectors_are_kept_only_if_they_lose_nothing(
    tiny_dataset: Dataset, encoder: Encoder, tmp_path: Path, before: Codes, after: Codes, reused: bool
) -> None:
    night(tiny_dataset, encoder, tmp_path / "store", before)
    report, kept = night(tiny_dataset, encoder, tmp_path / "store", after)
    assert report.embedded == (0 if reused else 60) and report.codes == kept.manifest.dtype == after
    _, fresh = night(tiny_dataset, encoder, tmp_path / "fresh", after)
    np.testing.assert_allclose(kept.vectors, fresh.vectors, atol=1e-6)


def test_many_nights_in_few_bits_drift_nowhere(tiny_dataset: Dataset, encoder: Encoder, tmp_path: Path) -> None:
    _, first = night(tiny_dataset, encoder, tmp_path, "int8")
    encoded = [night(tiny_dataset, encoder, tmp_path, "int8", days)[0].embedded for days in range(1, 4)]
    last = night(tiny_dataset, encoder, tmp_path, "int8", 4)[1]
    whole = encoder.items([tiny_dataset.items[row] for row in range(60)], numbers_of(tiny_dataset, 4))
    assert sum(encoded) > 0 and last.name != first.name
    np.testing.assert_allclose(last.vectors, rounded(whole, "int8"), atol=1e-6)


def numbers_of(dataset: Dataset, days: int) -> dict[str, np.ndarray]:
    from retrieval.counts import Counts

    moment = end_of(dataset) + days * DAY
    return Counts.from_dataset(dataset, before=moment).as_of(moment)


def test_a_shorter_encoder_fills_a_shorter_snapshot(tiny_dataset: Dataset, encoder: Encoder, tmp_path: Path) -> None:
    night(tiny_dataset, encoder, tmp_path, "float32")
    report, short = night(tiny_dataset, encoder.truncated(8), tmp_path, "float32")
    assert (report.dims, report.embedded, report.encoder) == (8, 60, f"{encoder.fingerprint}-8")
    np.testing.assert_allclose(np.linalg.norm(short.vectors, axis=1), 1, atol=1e-5)
