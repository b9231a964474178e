"""What was seen or excluded never comes back, and what comes back is what exact search finds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from index.exact import exact_search
from index.hits import Hits
from index.live_view import LiveView
from index.publish import current
from index.snapshot import Snapshot
from retrieval.data.schema import Dataset, Engagement, Member, MemberView
from retrieval.encoder import Encoder, save_encoder
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.moments import end_of
from retrieval.refresh import nightly
from retrieval.retrieve import ExclusionFailed, Retriever, seen_items
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer


@pytest.fixture(scope="module")
def retriever(
    tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset, tiny_quantizer: Quantizer, tiny_tokens: Tokens
) -> Retriever:
    folder = tmp_path_factory.mktemp("retrieve")
    torch.manual_seed(3)
    size = Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48)
    writer = Writer(tiny_tokens, tiny_quantizer, Budgets(item=32, member=96), ("like",))
    save_encoder(folder / "encoder", new_llama(size, len(tiny_tokens), causal_lm=False), writer, {})
    encoder = Encoder.load(folder / "encoder")
    nightly(tiny_dataset, encoder, None, folder / "store", end_of(tiny_dataset))
    path: Path | None = current(folder / "store")
    assert path is not None
    snapshot = Snapshot.open(path, fingerprint=encoder.fingerprint)
    return Retriever.of(snapshot, encoder)


@pytest.fixture
def view(tiny_dataset: Dataset) -> MemberView:
    done = tuple(Engagement(tiny_dataset.items[row], 10 + row, "like", 1) for row in (1, 5, 9))
    return MemberView(Member("m1", {"role": "fond of railway"}), done)


def test_candidates_are_those_of_exact_search(retriever: Retriever, view: MemberView, tiny_dataset: Dataset) -> None:
    vector = retriever.describe(view)
    assert vector.shape == (retriever.encoder.dims,)
    assert abs(float(np.linalg.norm(vector)) - 1) < 1e-5
    found = retriever.retrieve(vector, 10, ["i3"])
    vectors = retriever.encoder.items(
        [retriever.catalog.item(row) for row in range(60)],
        {name: np.array([retriever.catalog.numbers(row)[name] for row in range(60)]) for name in retriever.catalog.numbers(0)},
    )
    exact = exact_search(vectors, vector[None], 10, [np.array([3])])
    np.testing.assert_array_equal(found.rows, exact.rows[0])
    np.testing.assert_allclose(found.scores, exact.scores[0], atol=1e-5)
    assert found.ids == [tiny_dataset.items.item_id[row] for row in found.rows]


def test_excluded_items_stay_away_and_the_rest_is_complete(retriever: Retriever, view: MemberView) -> None:
    vector = retriever.describe(view)
    everything = retriever.retrieve(vector, 2_000)
    assert len(everything) == 60
    seen = seen_items(view)
    assert seen == ["i1", "i5", "i9"]
    best = everything.ids[0]
    rest = retriever.retrieve(vector, 2_000, [*seen, best, "nobody", best])
    assert rest.ids == [item_id for item_id in everything.ids if item_id not in {*seen, best}]
    assert (np.diff(rest.scores) <= 0).all()
    assert len(retriever.retrieve(vector, 2_000, everything.ids)) == 0


def test_an_item_that_was_only_shown_is_not_seen(tiny_dataset: Dataset) -> None:
    shown = Engagement(tiny_dataset.items[0], 1, "impression", 0)
    liked = Engagement(tiny_dataset.items[1], 2, "like", 1)
    assert seen_items(MemberView(Member("m"), (shown, liked))) == ["i1"]


def test_a_search_that_ignores_exclusions_gives_no_answer(retriever: Retriever, view: MemberView) -> None:
    class Deaf(LiveView):
        def search(self, queries: np.ndarray, k: int, *_exclude: object, **_allow: object) -> Hits:
            return retriever.moment.search(queries, k)

    moment = Deaf(**{one.name: getattr(retriever.moment, one.name) for one in fields(LiveView)})
    deaf = Retriever(retriever.encoder, moment, retriever.catalog)
    with pytest.raises(ExclusionFailed):
        deaf.retrieve(retriever.describe(view), 60, ["i3"])


def test_an_empty_member_still_has_a_vector(retriever: Retriever) -> None:
    vector = retriever.describe(MemberView(Member("")))
    assert np.isfinite(vector).all()
    assert len(retriever.retrieve(vector, 5)) == 5
