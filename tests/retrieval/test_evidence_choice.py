"""Baselines by name; iALS, SASRec and a sentence model at tiny size, each against what it must know or must not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.data.schema import Dataset
from retrieval.evidence.als import Ials
from retrieval.evidence.baselines import Baseline, Past, history_matrix
from retrieval.evidence.choice import Choice, choose, choose_baselines, families
from retrieval.evidence.protocol import EvidenceError, Queries, last_after_cut
from retrieval.evidence.rank import rank_queries
from retrieval.evidence.sasrec import Network, Sasrec, training_rows
from retrieval.evidence.sentence import SentenceModel, load_sentence_model
from retrieval.tokens import Tokens

SMALL_SASREC = Sasrec(dims=16, length=12, epochs=80, rate=5e-3)
SMALL_IALS = Ials(penalty=1.0, alpha=10.0, factors=8)


@pytest.fixture(scope="module")
def asked(tiny_dataset: Dataset) -> tuple[Past, Queries]:
    return Past(tiny_dataset, "test"), last_after_cut(tiny_dataset)


@pytest.fixture(scope="module")
def sentence_folder(tiny_tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag of random word vectors: what shares words is near."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding

    weights = np.random.default_rng(0).normal(size=(len(tiny_tokens), 64)).astype(np.float32)
    folder = tmp_path_factory.mktemp("sentence") / "words"
    SentenceTransformer(
        modules=[StaticEmbedding(tiny_tokens.tokenizer, embedding_weights=weights)], device="cpu"
    ).save_pretrained(str(folder), safe_serialization=True)
    return folder


@pytest.mark.parametrize("baseline", [SMALL_IALS, SMALL_SASREC], ids=lambda one: one.name)
def test_what_learns_from_others_puts_the_own_topic_first_and_repeats_itself(
    asked: tuple[Past, Queries], baseline: Baseline
) -> None:
    past, queries = asked
    scores = baseline.fit(past)(queries)
    ranked = rank_queries(queries, lambda block: scores[np.searchsorted(queries.member, block.member)], 60, depth=5)
    assert ((ranked.rows % 4) == (queries.member % 4)[:, None]).mean() > 0.8
    np.testing.assert_array_equal(scores, baseline.fit(past)(queries))


@pytest.mark.parametrize("baseline", [SMALL_IALS, replace(SMALL_SASREC, epochs=2)], ids=lambda one: one.name)
def test_training_never_looks_past_the_cut(tiny_dataset: Dataset, baseline: Baseline) -> None:
    queries = last_after_cut(tiny_dataset)
    log = tiny_dataset.events
    early = log.timestamp < tiny_dataset.meta.cut_test
    other = replace(tiny_dataset, events=replace(log, item=np.where(early, log.item, (log.item + 13) % 60).astype(np.int32)))
    before, after = (baseline.fit(Past(data, "test"))(queries) for data in (tiny_dataset, other))
    np.testing.assert_array_equal(before, after)


def test_ials_folds_members_in_by_the_normal_equations(asked: tuple[Past, Queries]) -> None:
    """Scores of a member solve (Y'Y + alpha Y'_h Y_h + reg I) x = (1 + ...) for the items of the history, h."""
    from implicit.cpu.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    past, queries = asked
    scores = SMALL_IALS.fit(past)(queries)
    with threadpool_limits(1, "blas"):
        twin = AlternatingLeastSquares(8, 1.0, 10.0, iterations=15, num_threads=1, random_state=0)
        twin.fit(past.matrix, show_progress=False)
    items = twin.item_factors.astype(np.float64)
    for row in range(0, len(queries), 7):
        seen = np.flatnonzero(history_matrix(queries, 60)[row].toarray()[0])
        left = items.T @ items + (10.0 - 1) * items[seen].T @ items[seen] + 1.0 * np.eye(8)
        member = np.linalg.solve(left, 10.0 * items[seen].sum(axis=0))
        np.testing.assert_allclose(scores[row], items @ member, rtol=1e-3, atol=1e-4)


def test_each_event_before_the_cut_is_a_target_once(asked: tuple[Past, Queries]) -> None:
    past, _ = asked
    token_of = np.arange(60) + 2
    token_of[7] = 0
    rows = training_rows(past.events, token_of, 5)
    assert rows.shape[1] == 6 and (rows[:, 0] == 1).all()
    seen = rows[:, 1:][rows[:, 1:] > 0]
    np.testing.assert_array_equal(np.bincount(seen - 2, minlength=60), np.where(token_of > 0, past.counts, 0))
    member = int(past.events.member[0])
    own = token_of[past.events.item[past.events.member == member]]
    start = int(np.flatnonzero(rows[:, 1] == own[own > 0][0])[0])
    assert any(rows[at, 1:].tolist()[: len(own[own > 0])] == own[own > 0][:5].tolist() for at in range(start, len(rows)))


def test_a_later_token_changes_no_earlier_state() -> None:
    torch.manual_seed(0)
    network = Network(20, 16, 2, 8, 0.0).eval()
    tokens = torch.randint(1, 20, (3, 8))
    changed = tokens.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(network(tokens)[:, :5], network(changed)[:, :5])
    assert not torch.allclose(network(tokens)[:, 5:], network(changed)[:, 5:])


def test_sasrec_knows_no_item_without_a_past_and_none_outside_its_vocabulary(asked: tuple[Past, Queries]) -> None:
    past, queries = asked
    scores = replace(SMALL_SASREC, epochs=1, vocabulary=20).fit(past)(queries)
    popular = np.sort(np.argsort(-past.counts, kind="stable")[:20])
    assert np.isfinite(scores).all()
    assert set(np.flatnonzero(scores[0] > -1e8)) == set(popular.tolist())


def test_a_sentence_model_reads_the_words(asked: tuple[Past, Queries], sentence_folder: Path) -> None:
    past, queries = asked
    baseline = SentenceModel(load_sentence_model(sentence_folder), "words", newest=3)
    ranked = rank_queries(queries, baseline.fit(past), 60, depth=3)
    assert ((ranked.rows % 4) == (queries.member % 4)[:, None]).mean() > 0.8
    assert baseline.setting == "words, last 3 items"
    choice = choose(["sentence"], ["all"], sentence_folder)
    assert [one.name for one in choose_baselines(past.dataset, choice=choice)] == ["Sentence model"]


def test_a_sentence_model_must_be_a_local_folder(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="local sentence-transformers folder"):
        load_sentence_model(Path("org/some-hub-model"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "modules.json").write_text("{not json")
    with pytest.raises(EvidenceError, match="cannot read this folder"):
        load_sentence_model(broken)


def test_names_choose() -> None:
    assert "ials" in choose().names and "sasrec" not in choose().names
    assert choose(["sasrec"], ["all"]).names == {"sasrec"}
    assert choose([], ["knn", "freshness"]).names == choose().names - {"knn", "freshness"}
    assert choose(["knn"], ["all"]).left_out == {}


@pytest.mark.parametrize(
    ("wanted", "unwanted", "told"),
    [
        (["als"], [], "no baseline 'als'; there are random"),
        (["all"], [], "no baseline 'all'"),
        ([], ["svd"], "no baseline 'svd'"),
        (["sentence"], [], "--sentence-model"),
        ([], ["tfidf"], "tfidf is out: add --without blend"),
        ([], ["knn", "ease"], "knn or ease is out"),
    ],
)
def test_names_that_cannot_be_run_are_refused(wanted: list[str], unwanted: list[str], told: str) -> None:
    with pytest.raises(EvidenceError, match=told):
        choose(wanted, unwanted)


def test_only_the_chosen_are_tuned(tiny_dataset: Dataset) -> None:
    choice = Choice(frozenset({"random", "live", "bm25"}))
    assert len(families(tiny_dataset, choice)) == 5
    names = [one.name for one in choose_baselines(tiny_dataset, choice=choice)]
    assert names[0] == "Random" and names[-1] == "BM25" and "Blend" not in names


def test_without_implicit_the_table_says_so_and_asking_for_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "implicit", None)
    choice = choose()
    assert "ials" not in choice.names
    assert "brewline[evaluate]" in choice.left_out["ials"]
    with pytest.raises(EvidenceError, match=r"brewline\[evaluate\]"):
        choose(["ials"])
