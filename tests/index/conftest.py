from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from index.build import build
from index.recipe import Recipe
from index.snapshot import Snapshot
from index.writer import SnapshotWriter

MakeSnapshot = Callable[..., Snapshot]


def unit_vectors(count: int, dims: int, seed: int = 0) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dims)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Waking a second thread costs more than these sizes take."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture
def unit() -> Callable[..., npt.NDArray[np.float32]]:
    return unit_vectors


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def make_snapshot(store: Path) -> MakeSnapshot:
    """Writes a small whole snapshot; each argument that is given replaces what would be made."""

    def make(
        count: int = 40,
        *,
        seed: int = 0,
        vectors: npt.NDArray[np.float32] | None = None,
        ids: Sequence[str] | None = None,
        fingerprint: str = "encoder-one",
        as_of: int = 1_700_000_000,
        recipe: str = "Flat",
        indexed: npt.NDArray[np.float32] | None = None,
        where: Path | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> Snapshot:
        chosen = unit_vectors(count, 8, seed) if vectors is None else vectors
        built = build(chosen if indexed is None else indexed, recipe=Recipe.parse(recipe), seed=seed, k=10, samples=8)
        with SnapshotWriter(
            where or store, fingerprint=fingerprint, as_of=as_of, extra={"ranker": "r1", **(extra or {})}
        ) as writer:
            writer.vectors(chosen)
            writer.ids([f"item-{row}" for row in range(len(chosen))] if ids is None else ids)
            writer.index(built.index, recipe=recipe, facts=built.facts, recall=built.recall)
            writer.part("catalog.arrow", b"opaque\x00bytes")
        return Snapshot.open(writer.path)

    return make
