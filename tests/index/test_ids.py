from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import index.ids
from index.ids import Ids
from index.manifest import SnapshotError

hostile = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=120, deadline=None)
@given(st.lists(hostile, max_size=20), st.lists(hostile, max_size=8), st.booleans(), st.booleans(), st.sampled_from((3, 1_000)))
def test_rows_and_ids_are_inverse(texts: list[str], strangers: list[str], few: bool, collide: bool, together: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index.ids, "_FEW", 32 if few else 0)
        patch.setattr(index.ids, "_TOGETHER", together)
        patch.setattr(index.ids, "_BYTES", together)
        if collide:
            patch.setattr(index.ids, "hash_ids", lambda encoded: np.array([len(one) % 3 for one in encoded], np.uint64))
        check_rows_and_ids(texts, strangers)


def check_rows_and_ids(texts: list[str], strangers: list[str]) -> None:
    ids = Ids.of(texts)
    assert list(ids) == texts and len(ids) == len(texts)
    asked = strangers + texts
    assert ids.rows(asked).tolist() == [texts.index(one) if one in texts else -1 for one in asked]
    assert ids.duplicates() == sorted({one for one in texts if texts.count(one) > 1}, key=lambda one: one.encode())


@pytest.mark.parametrize("few", [0, 32])
def test_colliding_hashes_never_give_a_wrong_row(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index.ids, "_FEW", few)
    monkeypatch.setattr(index.ids, "hash_ids", lambda encoded: np.full(len(encoded), 7, np.uint64))
    ids = Ids.of(["a", "b", "c", "b"])
    assert ids.rows(["c", "b", "z", "a"]).tolist() == [2, 1, -1, 0]
    assert ids.duplicates() == ["b"]


def test_padding_rows_are_refused_not_read_from_the_end() -> None:
    ids = Ids.of(["a", "b"])
    assert ids.many(np.array([1, 0])) == ["b", "a"] and ids[0] == "a" and "b" in ids
    for rows in ([-1], [0, 2]):
        with pytest.raises(IndexError):
            ids.many(rows)


@pytest.mark.parametrize("bad", ["\ud800", 7, None])
def test_an_id_that_is_no_text_is_named(bad: object) -> None:
    with pytest.raises(SnapshotError, match="row 1"):
        Ids.of(["fine", bad])  # type: ignore[list-item]


def test_a_broken_id_is_unknown_when_asked() -> None:
    assert Ids.of(["a"]).rows(["\ud800", "a"]).tolist() == [-1, 0]
