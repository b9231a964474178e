"""The GPU search in Triton's interpreter, bit for bit against numpy. `test_gpu_scan.py` runs this file in a process of its own:
TRITON_INTERPRET must be set before anything imports triton, and would change what other tests compile."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from index.bench_gpu import top_of_products_on_device
from index.certified import Certified
from index.certified_codes import BLOCK, Asked, code
from index.exact import exact_search
from index.filters import Filter, FilterError, RowSet
from index.gpu_code import GpuAsked, Held, code_on_device
from index.gpu_scan import GpuExact, Launch, ordered_dot, predicted
from index.gpu_steps import Group, KnownSets
from index.hits import ExclusionError, Hits, QueryError, SearchError

Floats = npt.NDArray[np.float32]
WHOLE_BLOCKS = Launch(tile=BLOCK, scored=1024)
"""Fewer and larger steps: the interpreter takes its time for each."""


def kinds(rng: np.random.Generator, kind: str, count: int, dims: int) -> Floats:
    made = rng.standard_normal((count, dims))
    if kind == "spread":
        made *= 10.0 ** rng.uniform(-5, 5, (count, 1))
        made[: count // 5] = 0
    if kind == "duplicates":
        made = made[rng.integers(0, max(1, count // 50), count)] if count else made
    if kind == "near ties":
        made = rng.standard_normal(dims) + 1e-6 * made
    if kind == "whole numbers":
        made = rng.integers(-2, 3, (count, dims))
    return made.astype(np.float32)


KINDS = ["normal", "spread", "duplicates", "near ties", "whole numbers"]


@pytest.fixture(autouse=True)
def _scan_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few vectors are scanned too, and the sample is not all of them."""
    monkeypatch.setattr("index.gpu_scan.SMALL", 0)
    monkeypatch.setattr("index.gpu_scan.SAMPLE", 700)


def check(hits: Hits, vectors: Floats, queries: Floats, k: int, permitted: list[npt.NDArray[np.bool_]]) -> None:
    """Each answer is the sorted list of what is permitted, to the last bit."""
    for query, allowed in enumerate(permitted):
        rows = np.flatnonzero(allowed)
        scores = ordered_dot(vectors[rows], queries[query])
        order = np.lexsort((rows, -scores))[:k]
        count = int(hits.counts[query])
        assert hits.rows[query, :count].tolist() == rows[order].tolist()
        assert (hits.scores[query, :count] == scores[order]).all()
        assert (hits.rows[query, count:] == -1).all() and (hits.scores[query, count:] == -np.inf).all()


@pytest.mark.parametrize("seed", range(24))
def test_any_question_has_the_sorted_list_for_an_answer(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    count, dims = int(rng.choice([0, 1, 900, BLOCK, 2 * BLOCK, 4_999])), int(rng.choice([1, 3, 24, 33, 130]))
    k = int(rng.choice([1, 9, 60, 2 * count + 1]))
    vectors = kinds(rng, str(rng.choice(KINDS)), count, dims)
    queries = np.concatenate([rng.standard_normal((2, dims)), vectors[:1], np.zeros((1, dims))]).astype(np.float32)
    shared = RowSet.where(rng.random(count) < rng.choice([0.0, 0.02, 0.5, 0.95]))
    sets = [shared, None, shared, RowSet.where(rng.random(count) < rng.random())][: len(queries)]
    allow = [None, shared, sets][int(rng.integers(3))]
    exclude = [rng.permutation(np.arange(-1, count))[: rng.choice([0, 30, count // 2])].astype(np.int64) for _ in queries]
    room, tight = Launch(tile=int(rng.choice([256, BLOCK])), asked=16, scored=1024), bool(rng.integers(2))
    if tight:
        monkeypatch.setattr(GpuExact, "_capacity", staticmethod(lambda k: k + 2))
    codes = "int8" if rng.integers(2) else "float16"
    search = GpuExact(vectors, device="cpu", codes=codes, on_host=bool(rng.integers(2)), launch=room)
    hits = search.search(queries, k, exclude, allow=allow)
    each = allow if isinstance(allow, list) else [allow] * len(queries)
    permitted = [mask(one, count) for one in each]
    for one, left_out in zip(permitted, exclude):
        one[left_out[left_out >= 0]] = False
    check(hits, vectors, queries, k, permitted)


def mask(one: RowSet | None, count: int) -> npt.NDArray[np.bool_]:
    return np.ones(count, bool) if one is None else one.has(np.arange(count))


@pytest.mark.parametrize("codes", ["int8", "float16"])
def test_whole_numbers_have_the_scores_of_the_honest_twins(codes: str) -> None:
    """Sums are exact, ties are everywhere: rows and scores are those of `exact_search` and of the scan on the processor."""
    rng = np.random.default_rng(1)
    vectors, queries = (kinds(rng, "whole numbers", count, 12) for count in (20_000, 3))
    exclude = [rng.permutation(20_000)[:500] for _ in range(3)]
    hits, proof = GpuExact(vectors, device="cpu", codes=codes, launch=WHOLE_BLOCKS).prove(queries, 80, exclude)
    for twin in (exact_search(vectors, queries, 80, exclude), Certified(vectors, threads=1).search(queries, 80, exclude)):
        assert np.array_equal(hits.rows, twin.rows) and np.array_equal(hits.scores, twin.scores)
    assert (proof.rounds >= 1).all() and (proof.scored < 20_000).all()


def test_scores_of_floats_are_those_of_the_twins_but_for_the_last_bits() -> None:
    rng = np.random.default_rng(2)
    vectors, queries = kinds(rng, "normal", 6_000, 48), kinds(rng, "normal", 40, 48)
    hits, proof = GpuExact(vectors, device="cpu", launch=Launch(tile=BLOCK, asked=16, scored=1024)).prove(queries, 30)
    twin = exact_search(vectors, queries, 30)
    assert (hits.rows == twin.rows).mean() > 0.99 and np.abs(hits.scores - twin.scores).max() < 1e-5
    assert (proof.rounds == 1).mean() > 0.9 and (proof.scored < 400).all(), "few are scored, in one round"
    alone = GpuExact(vectors, device="cpu", launch=Launch(tile=512, asked=64)).search(queries[7:8], 30)
    assert np.array_equal(alone.rows[0], hits.rows[7]) and np.array_equal(alone.scores[0], hits.scores[7])


def test_codes_are_those_of_the_processor() -> None:
    vectors = kinds(np.random.default_rng(3), "spread", 5_000, 20)
    theirs, search = code(vectors), GpuExact(vectors, device="cpu")
    ours = code_on_device(search.steps.held, "int8")
    assert np.array_equal(ours.codes.numpy()[:, :20], theirs.codes) and not ours.codes.numpy()[:, 20:].any()
    assert np.array_equal(ours.rows.numpy(), theirs.rows) and ours.bytes == search.memory.codes
    facts = np.stack([theirs.scales, theirs.lengths, theirs.losses])
    assert np.allclose(ours.facts.numpy(), facts, rtol=1e-12)
    queries = kinds(np.random.default_rng(4), "normal", 3, 20)
    wanted, bound = np.array([0.5, -1.0, 1e6]), Asked.of(queries, theirs)
    asked = GpuAsked.of(queries, torch.device("cpu"), "int8")
    want, length, loss = asked.wishes(torch.arange(3), torch.from_numpy(wanted), 16).numpy()[:, :3, None]
    bars = (want - length * facts[1] - loss * facts[2]) / facts[0]
    assert np.allclose(bars, (wanted[:, None] - bound.errors) / np.outer(bound.scales, theirs.scales), rtol=1e-12)


@pytest.mark.parametrize("codes", ["int8", "float16"])
@pytest.mark.parametrize("kind", ["normal", "spread", "near ties"])
def test_the_scan_keeps_whatever_can_reach_the_bar_and_no_forbidden_row(codes: str, kind: str) -> None:
    rng = np.random.default_rng(5)
    vectors, queries = kinds(rng, kind, 3_000, 40), kinds(rng, "normal", 2, 40)
    allowed = RowSet.where(rng.random(3_000) < 0.5)
    search = GpuExact(vectors, device="cpu", codes=codes, launch=WHOLE_BLOCKS)
    asked = GpuAsked.of(queries, search.device, search.kind)
    known = KnownSets(search.device, 375)
    group = Group.of(asked, [Filter(3_000, np.zeros(0, np.int64), one) for one in (allowed, None)], np.arange(3_000), known)
    truth = np.stack([ordered_dot(vectors, query) for query in queries])
    bars = np.quantile(truth, 0.9, axis=1)
    found, counts = search.steps.survivors(group, torch.arange(2), torch.from_numpy(bars), 3_000)
    for query, permitted in enumerate((mask(allowed, 3_000), np.ones(3_000, bool))):
        rows = found[query, : int(counts[query])].numpy()
        wanted = np.flatnonzero((truth[query] >= bars[query]) & permitted)
        assert len(set(rows.tolist())) == len(rows) and set(wanted.tolist()) <= set(rows.tolist()) and permitted[rows].all()
        assert kind != "normal" or len(rows) < 1.5 * len(wanted), "few come through for nothing"
        if codes == "int8":
            twin = code(vectors)
            bound = Asked.of(queries, twin)
            above = twin.codes.astype(np.int64) @ bound.codes[query] > np.repeat(bound.bars(bars, twin)[query], BLOCK)
            kept = twin.rows[above & (twin.rows >= 0)]
            assert sorted(rows.tolist()) == sorted(kept[permitted[kept]].tolist()), "just what the processor's scan keeps"
    bars[1] = 1e9
    short, same = search.steps.survivors(group, torch.arange(2), torch.from_numpy(bars), 7)
    assert (short[0] >= 0).all() and same.tolist() == [int(counts[0]), 0], "what found no room is counted"
    assert (short[1] == -1).all(), "and does not stand in the next list"
    assert short.untyped_storage().nbytes() == 4 * short.numel(), "queries that only fill up a program have no list"


@pytest.mark.parametrize("kind", ["normal", "near ties", "duplicates"])
def test_a_list_that_overflows_raises_the_bar_or_grows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    vectors, queries = kinds(rng, kind, 5_000, 16), kinds(rng, "normal", 3, 16)
    search = GpuExact(vectors, device="cpu", launch=WHOLE_BLOCKS)
    monkeypatch.setattr(search, "_foretell", lambda *_: np.full(3, -1e3))
    monkeypatch.setattr(search, "_capacity", lambda k: 8 * k)
    hits, proof = search.prove(queries, 40)
    check(hits, vectors, queries, 40, [np.ones(5_000, bool)] * 3)
    assert (proof.rounds > 1).all(), "proven by scans, not by scoring everything"


def test_a_bar_that_was_too_high_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    vectors, queries = kinds(rng, "normal", 5_000, 16), kinds(rng, "normal", 3, 16)
    search = GpuExact(vectors, device="cpu", launch=WHOLE_BLOCKS)
    truth = search.search(queries, 40)
    last = truth.scores[:, -1].astype(np.float64)
    monkeypatch.setattr(search, "_foretell", lambda *_: np.array([last[0], last[1] + 1e-6, 1e9]))
    hits, proof = search.prove(queries, 40)
    assert np.array_equal(hits.rows, truth.rows) and np.array_equal(hits.scores, truth.scores)
    assert proof.rounds.tolist() == [1, 2, 0] and proof.scored[2] == 5_000


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_what_is_refused() -> None:
    good = np.ones((10, 4), np.float32)
    search = GpuExact(good, device="cpu")
    with pytest.raises(QueryError, match="NaN"):
        search.search(np.full((1, 4), np.nan, np.float32), 1)
    with pytest.raises(ExclusionError):
        search.search(good[:1], 1, [np.array([10])])
    with pytest.raises(FilterError, match="another snapshot"):
        search.search(good[:1], 1, allow=RowSet.every(11))
    with pytest.raises(SearchError, match="k is 0"):
        search.search(good[:1], 0)
    with pytest.raises(SearchError, match="vector 3"):
        GpuExact(np.where(np.arange(10)[:, None] == 3, np.inf, good).astype(np.float32), device="cpu")
    with pytest.raises(SearchError, match="1025"):
        GpuExact(np.ones((2, 1025), np.float32), device="cpu")
    with pytest.raises(SearchError, match="infinite"):
        GpuExact(3e38 * good, device="cpu").search(good[:1], 2)
    assert search.search(good[:0], 3).rows.shape == (0, 3)


def test_memory_is_what_was_predicted() -> None:
    vectors = kinds(np.random.default_rng(8), "normal", 3_000, 40)
    search = GpuExact(vectors, device="cpu", codes="float16")
    held = search.steps.coded.bytes + sum(
        part.numel() * part.element_size() for part in (search._sample, search._sampled_here, search.steps.held.vectors)
    )
    memory = predicted(3_000, 40, codes="float16")
    assert search.bytes == held == memory.total - memory.scratch - memory.sets and memory.sets == 1_024 * 375
    search.search(vectors[:2], 5, allow=[RowSet.every(3_000) - RowSet.of(np.arange(60), 3_000)] * 2)
    assert held <= search.bytes <= held + 375
    assert GpuExact(vectors, device="cpu", on_host=True).memory.vectors == 0


def test_vectors_of_the_host_cross_in_pieces_however_long_a_list_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, pieces, take = np.random.default_rng(10), [], Held.take
    vectors, queries = kinds(rng, "normal", 700, 8), torch.from_numpy(kinds(rng, "normal", 3, 8))
    here, away = (GpuExact(vectors, device="cpu", on_host=away, launch=WHOLE_BLOCKS).steps for away in (False, True))
    rows = torch.from_numpy(rng.integers(-1, 700, (3, 250)).astype(np.int32))
    monkeypatch.setattr("index.gpu_steps._GATHERED", 100 * 8 * 4)
    monkeypatch.setattr(Held, "take", lambda held, asked: pieces.append(len(asked)) or take(held, asked))
    assert torch.equal(away.keys(rows, queries), here.keys(rows, queries))
    assert max(pieces) <= 100 and sum(pieces) == int((rows >= 0).sum())
    assert away.keys(rows[:, :0], queries).shape == (3, 0)


def test_the_contender_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.bench_gpu._SCORES", 800)
    rng = np.random.default_rng(9)
    vectors, queries = kinds(rng, "normal", 1_000, 8), kinds(rng, "normal", 4, 8)
    rows = top_of_products_on_device(torch.from_numpy(queries), torch.from_numpy(vectors), 20).numpy()
    assert np.array_equal(rows, exact_search(vectors, queries, 20).rows)
