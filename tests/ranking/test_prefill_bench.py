"""The benchmark measures what it says: contenders that agree, counts that can be checked by hand and by torch, honest keys."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from ranking.cli import main as cli
from ranking.cli.bench import draw, grid_table, measure_grid
from ranking.prefill.bench import BenchError, Wishes, allocator, bench_prefill, body_of, fresh_requests, growth, model_of, twins
from ranking.prefill.contenders import BATCHES, MaskTooLarge, Plain, Products, UnfairContender, best_batch
from ranking.prefill.engine import Engine
from ranking.prefill.joint import PREFIX_ROWS
from ranking.prefill.load import ready
from ranking.prefill.operations import (
    Body,
    PrefillShape,
    attention_operations,
    joint_operations,
    linear_operations,
    lower_bound,
    one_by_one,
    prefix_cached,
    warm_lower_bound,
)
from ranking.prefill.plan import Request
from retrieval.llama import Size, save_llama

SIZE = Size(hidden=32, layers=2, heads=4, kv_heads=2, mlp=48, vocabulary=64)
SHAPE = PrefillShape(16, 8, 4)
TINY = ["--layers=1", "--hidden=32", "--mlp=48", "--heads=4", "--kv-heads=2", "--vocab=64", "--repeats=1"]
WORDS = ["--prefix=16", "--items=8", "--length=4", *TINY]
LABELS = (2, 3)
ONE_BILLION = Body(layers=16, hidden=2048, mlp=8192, heads=32, kv_heads=8, dims=64)


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    return bench_prefill(model_of(SIZE, Wishes()), SHAPE, Wishes(arithmetic="float32", repeats=1))


def drawn(shape: PrefillShape = SHAPE, vocabulary: int = 64) -> tuple[np.ndarray, np.ndarray]:
    return next(fresh_requests(np.random.default_rng(1), vocabulary, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_every_contender_agrees_with_one_item_per_pass(dtype: torch.dtype, batch: int) -> None:
    """Weights 10 times larger than at birth: an item that lost its prefix or its place would be seen."""
    model = model_of(SIZE, Wishes())
    for weight in model.parameters():
        weight.data = weight.data * 10 if weight.ndim > 1 else weight.data
    models = twins(model, dtype, {torch.float32})
    prefix, items = drawn()
    exact = Plain(models[torch.float32], LABELS).one_by_one(prefix, items, 1)
    with torch.inference_mode():
        rows = [[*prefix, *item] for item in items]
        slow = np.stack([models[torch.float32](torch.tensor([row])).logits[0, -1, list(LABELS)].numpy() for row in rows])
    np.testing.assert_allclose(exact, slow, atol=1e-4)
    assert exact.std(0).min() > 0.1
    plain = Plain(models[dtype], LABELS)
    bound = 1e-4 if dtype == torch.float32 else 0.05 * np.abs(exact).max()
    for found in (
        plain.one_by_one(prefix, items, batch),
        plain.prefix_cache(prefix, items, batch),
        plain.packed_dense(prefix, items, plain.dense_mask(SHAPE)),
    ):
        np.testing.assert_allclose(found, exact, atol=bound)


def test_a_dense_mask_shows_each_item_its_prefix_and_itself() -> None:
    mask = Plain(model_of(SIZE, Wishes()), LABELS).dense_mask(PrefillShape(2, 2, 2))[0, 0]
    seen = (mask == 0).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_a_dense_mask_has_a_limit() -> None:
    with pytest.raises(MaskTooLarge, match="17024 x 17024"):
        Plain(model_of(SIZE, Wishes()), LABELS).dense_mask(PrefillShape(1024, 500, 32))


def test_contenders_run_under_sdpa() -> None:
    model = model_of(SIZE, Wishes())
    model.set_attn_implementation("eager")
    with pytest.raises(UnfairContender, match="eager"):
        Plain(model, LABELS)


def test_twins_have_the_same_weights_and_float32_rotations() -> None:
    model = model_of(SIZE, Wishes())
    found = twins(model, torch.bfloat16, {torch.float32})
    for rounded, exact in zip(found[torch.bfloat16].parameters(), found[torch.float32].parameters()):
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded.float(), exact)
    assert found[torch.bfloat16].model.rotary_emb.inv_freq.dtype == torch.float32


def test_requests_are_fresh_and_distinct() -> None:
    shape = PrefillShape(5, 30, 1)
    requests = fresh_requests(np.random.default_rng(0), 64, shape)
    (prefix, items), (other, _) = next(requests), next(requests)
    assert len(np.unique(items, axis=0)) == 30 and items.shape == (30, 1) and not np.array_equal(prefix, other)
    with pytest.raises(BenchError, match="larger than 32"):
        fresh_requests(np.random.default_rng(0), 32, shape)


def test_the_best_batch_is_the_quickest_one() -> None:
    tried: list[int] = []

    def way(_prefix: np.ndarray, items: np.ndarray, batch: int) -> np.ndarray:
        tried.append(batch)
        spins = 2_000_000 if batch != 4 else 1
        sum(range(spins))
        return items

    assert best_batch(way, *drawn(), 8) == 4
    assert set(tried) == {batch for batch in BATCHES if batch <= 8}


@pytest.mark.parametrize("warm", [False, True])
def test_operations_by_hand(warm: bool) -> None:
    """hidden 4, MLP 5, 2 heads over 1 key head of 2 dims, 2 layers; P=3, N=2, L=2: 7 rows, 4 of them without the prefix.

    k, v: 2*4*2 = 16 weights; q, o: 2*4*4 = 32; MLP 3*4*5 = 60; a pair costs 4*2*2 = 16.
    """
    body, shape = Body(2, 4, 5, 2, 1, 2), PrefillShape(3, 2, 2)
    rows, prefix_pairs = (4, 0) if warm else (7, 6)
    assert linear_operations(body, shape, warm=warm) == 2 * (2 * rows * 16 + rows * 92 + 2 * 92)
    assert attention_operations(body, shape, warm=warm) == 16 * (prefix_pairs + (12 + 6) + 2 * 5)
    assert joint_operations(body, shape, 2, warm=warm) == 16 * ((0 if warm else 2 * 2 + 1 * 3) + (12 + 8) + 2 * 5)
    bound = warm_lower_bound if warm else lower_bound
    assert bound(body, shape) == linear_operations(body, shape, warm=warm) + attention_operations(body, shape, warm=warm)
    assert one_by_one(body, shape) == 2 * 2 * (2 * 5 * 108 + 16 * 15)
    assert prefix_cached(body, shape) == 2 * (2 * 7 * 108 + 16 * (6 + 12 + 6))


def test_operations_of_a_billion_weights() -> None:
    """Known counts of the 1B shape at P=1024, N=500, L=32: 35.4e12, at least 33.3e12, warm 31.4e12; one by one is 30.1 times."""
    shape = PrefillShape(1024, 500, 32)
    counts = [count(ONE_BILLION, shape) / 1e12 for count in (prefix_cached, lower_bound, warm_lower_bound)]
    assert [round(count, 1) for count in counts] == [35.4, 33.3, 31.4]
    assert round(one_by_one(ONE_BILLION, shape) / prefix_cached(ONE_BILLION, shape), 1) == 30.1


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("shape", [PrefillShape(16, 8, 4), PrefillShape(300, 5, 3), PrefillShape(7, 3, 1)])
@pytest.mark.parametrize("warm", [False, True])
def test_the_engine_multiplies_no_more_than_its_formula(layers: int, shape: PrefillShape, warm: bool) -> None:
    """Counted by torch under the engine: the linear layers' lower bound exactly, blocked attention, and the label rows."""
    size = Size(hidden=32, layers=layers, heads=4, kv_heads=2, mlp=48, vocabulary=64)
    model = ready(model_of(size, Wishes()))
    engine, body = Engine(model, LABELS), body_of(model)
    assert engine.backend == "cpu_joint"
    prefix, items = drawn(shape)
    if warm:
        engine.prefill(prefix.tolist())
    with FlopCounterMode(display=False) as counter:
        engine.score([Request(prefix.tolist(), items.tolist())])
    labels = 2 * shape.items * size.hidden * len(LABELS)
    linear = linear_operations(body, shape, warm=warm)
    assert counter.get_total_flops() == linear + joint_operations(body, shape, PREFIX_ROWS, warm=warm) + labels


def test_bare_products_are_those_of_the_linear_layers() -> None:
    """Odd prefix and length, where the mean number of keys is whole: both counts are exact."""
    model, shape = ready(model_of(SIZE, Wishes())), PrefillShape(17, 6, 3)
    products, body = Products(Engine(model, LABELS), body_of(model), shape), body_of(model)
    with FlopCounterMode(display=False) as linear:
        products.linear()
    with FlopCounterMode(display=False) as attention:
        products.attention()
    assert linear.get_total_flops() == linear_operations(body, shape)
    assert attention.get_total_flops() == attention_operations(body, shape)


def test_memory_growth_is_seen() -> None:
    found = growth(lambda: np.ones(8 << 20))
    assert found is not None and found > 32 << 20


def test_the_allocator_is_read_from_the_process(tmp_path: Path) -> None:
    assert allocator(tmp_path / "missing") == "unknown"
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 00000000 08:01 1 /usr/lib/libtcmalloc_minimal.so.4\n")
    assert allocator(tmp_path) == "tcmalloc"
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 00000000 08:01 1 /usr/lib/libc.so.6\n")
    assert allocator(tmp_path) == "glibc"


def test_the_facts_fit_together(facts: dict[str, object]) -> None:
    assert facts["max_abs_diff"] < 1e-5 < facts["max_abs_logit"]
    assert facts["max_abs_diff_hugging_face"] == 0
    assert facts["items_per_second"] == pytest.approx(8 / facts["seconds"])
    assert facts["seconds"] <= facts["seconds_p99"]
    assert facts["matmul_share"] < facts["attention_matmul_share"]
    assert facts["warm_share"] == pytest.approx(facts["warm_operation_ratio"] * facts["seconds"] / facts["seconds_warm"])
    assert facts["speedup_prefix_cache"] == facts["speedup_prefix_cache_same_arithmetic"]
    names = [one["name"] for one in facts["contenders"]]
    assert names == ["one_by_one", "prefix_cache", "packed_dense"]
    assert all(one["max_abs_diff"] < 1e-5 and one["seconds"] > 0 for one in facts["contenders"])
    assert facts["contenders"][0]["seconds"] / facts["seconds"] == pytest.approx(facts["speedup_one_by_one"])


def test_the_command_speaks_json_in_bfloat16(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    words = [*WORDS, "--dtype", "bfloat16", "--arithmetic", "float32", "--json", "--out", str(out)]
    done = CliRunner().invoke(cli.app, ["bench", "prefill", *words], catch_exceptions=False)
    found = json.loads(done.stdout)
    promised = "seconds seconds_p99 items_per_second speedup_one_by_one speedup_prefix_cache matmul_share peak_bytes backend"
    assert all(isinstance(found[name], int | float | str) for name in promised.split())
    assert (found["dtype"], found["arithmetic"], found["layers"], found["one_by_one_items_timed"]) == (
        "bfloat16",
        "float32",
        1,
        8,
    )
    assert found["max_abs_diff"] < 1e-5 and found["max_abs_diff_hugging_face"] > found["max_abs_diff"]
    dtypes = [(one["name"], one["dtype"]) for one in found["contenders"]]
    assert len(dtypes) == len(set(dtypes)) == 5
    assert json.loads((out / "prefill.json").read_text()) == found
    assert (out / "prefill.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_can_be_measured(tmp_path: Path) -> None:
    save_llama(model_of(SIZE, Wishes()), tmp_path)
    words = ["--prefix", "8", "--items", "4", "--length", "2", "--repeats", "1", "--json"]
    done = CliRunner().invoke(cli.app, ["bench", "prefill", *words, "--base", str(tmp_path)], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert (found["hidden"], found["vocab"], found["base"]) == (32, 64, str(tmp_path))


def test_a_shape_that_cannot_be_is_refused() -> None:
    with pytest.raises(BenchError, match="multiple"):
        model_of(Size(hidden=30, heads=4), Wishes())


def test_a_grid_measures_cells_and_says_why_it_leaves_some_out(facts: dict[str, object], tmp_path: Path) -> None:
    """The first cell runs in a process of its own; the second is refused by the vocabulary; the last is foretold too long."""
    pytest.importorskip("matplotlib")
    cells = [PrefillShape(2048, 4000, 128), SHAPE, PrefillShape(16, 60, 1)]
    rows = measure_grid(cells, TINY, 60)
    assert [row["items"] for row in rows] == [8, 60, 4000]
    assert rows[0]["backend"] and "skipped" not in rows[0]
    assert "vocabulary larger than 64" in str(rows[1]["skipped"]) and "foretold" in str(rows[2]["skipped"])
    assert grid_table(rows).row_count == 3
    draw([{**facts, "prefix": 16, "items": 8, "length": 4}, *rows], tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert math.isfinite(rows[0]["seconds"])
