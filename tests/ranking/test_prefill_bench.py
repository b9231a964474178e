"""The benchmark reports what it says: fresh requests, honest keys, a budget that is kept, a grid that explains itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ranking.cli import main as cli
from ranking.cli.bench import measure_grid
from ranking.cli.bench_report import draw, grid_table
from ranking.prefill.bench import BenchError, Wishes, bench_prefill, fresh_requests, model_of, twins
from ranking.prefill.contenders import WAYS
from ranking.prefill.figures import speedups
from ranking.prefill.machine import allocator, growth
from ranking.prefill.operations import PrefillShape
from retrieval.llama import Size, save_llama

SIZE = Size(hidden=32, layers=2, heads=4, kv_heads=2, mlp=48, vocabulary=64)
SHAPE = PrefillShape(16, 8, 4)
TINY = ["--layers=1", "--hidden=32", "--mlp=48", "--heads=4", "--kv-heads=2", "--vocab=64", "--repeats=1"]
WORDS = ["--prefix=16", "--items=8", "--length=4", *TINY]


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    return bench_prefill(model_of(SIZE, Wishes()), SHAPE, Wishes(arithmetic="float32", repeats=1))


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
    assert len({one.item() for one in items}) == 30 and not np.array_equal(prefix, other)
    with pytest.raises(BenchError, match="larger than 32"):
        fresh_requests(np.random.default_rng(0), 32, shape)


def test_mixed_lengths_have_the_same_sum_and_are_shuffled() -> None:
    shape = PrefillShape(5, 9, 4, "mixed")
    assert sorted(shape.item_lengths) == [2, 2, 3, 4, 4, 4, 5, 6, 6]
    (_, items), (_, others) = (next(fresh_requests(np.random.default_rng(seed), 64, shape)) for seed in (0, 1))
    lengths = [[len(one) for one in many] for many in (items, others)]
    assert all(sorted(some) == sorted(shape.item_lengths) for some in lengths) and lengths[0] != lengths[1]
    assert sum(PrefillShape(1, 50, 33, "mixed").item_lengths) == 50 * 33


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
    assert facts["seconds"] <= facts["seconds_p99"] <= facts["seconds_max"]
    assert facts["matmul_share"] < facts["attention_matmul_share"]
    assert facts["warm_share"] == pytest.approx(facts["warm_operation_ratio"] * facts["seconds"] / facts["seconds_warm"])
    assert facts["speedup_prefix_cache"] == facts["speedup_prefix_cache_same_arithmetic"]
    names = [one["name"] for one in facts["contenders"]]
    assert names == [*WAYS, "packed_dense"]
    assert all(1 <= one["batch"] <= one["largest_batch_tried"] == 8 for one in facts["contenders"][:3])
    assert facts["speedup_best_contender"] == min(one["seconds"] for one in facts["contenders"]) / facts["seconds"]
    assert facts["operation_ratio_one_by_one"] == facts["operations_one_by_one"] / facts["lower_bound_operations"] > 1
    assert all(one["max_abs_diff"] < 1e-5 and one["seconds"] > 0 for one in facts["contenders"])
    assert facts["contenders"][0]["seconds"] / facts["seconds"] == pytest.approx(facts["speedup_one_by_one"])


def test_a_speedup_is_against_those_of_the_same_dtype_that_were_timed() -> None:
    rows = [("a", "float32", 4.0), ("prefix_cache", "float32", 6.0), ("a", "bfloat16", 1.0), ("b", "float32", None)]
    told = speedups([dict(zip(("name", "dtype", "seconds"), row)) for row in rows], 2.0, {"": "float32", "_same": "bfloat16"})
    assert (told["speedup_best_contender"], told["best_contender"], told["speedup_prefix_cache"]) == (2.0, "a", 3.0)
    assert (told["speedup_best_contender_same"], told["speedup_prefix_cache_same"]) == (0.5, None)


def test_a_budget_without_room_leaves_the_engine_and_the_reasons() -> None:
    found = bench_prefill(model_of(SIZE, Wishes()), SHAPE, Wishes(arithmetic="float32", repeats=3, seconds=1e-6))
    assert found["repetitions"] == 1 and found["seconds"] > 0 and found["max_abs_diff"] < 1e-5
    assert all(one["seconds"] is None and "budget" in one["reason"] for one in found["contenders"])
    assert found["speedup_best_contender"] is None and found["speedup_one_by_one"] is None
    assert grid_table([{**found, "prefix": 16, "items": 8, "length": 4}]).row_count == 1


def test_int8_says_what_it_costs_and_has_no_contender_of_its_kind(facts: dict[str, object]) -> None:
    told = bench_prefill(model_of(SIZE, Wishes()), SHAPE, Wishes(arithmetic="int8", repeats=1))
    assert told["arithmetic"] == "int8" and 1e-5 < told["max_abs_diff"] < 0.1 * told["max_abs_logit"]
    assert told["max_abs_diff_hugging_face"] == 0 and 0 < told["matmul_share"] < told["attention_matmul_share"]
    assert all(one["dtype"] == "float32" and one["max_abs_diff"] < 1e-5 for one in told["contenders"])
    assert told["speedup_best_contender"] and told["speedup_best_contender_same_arithmetic"] is None
    assert told["weights_bytes"] < facts["weights_bytes"]


def test_the_command_tells_people_ways_then_shares_then_notes() -> None:
    done = CliRunner().invoke(cli.app, ["bench", "prefill", *WORDS, "--lengths=mixed", "--seconds=30"], catch_exceptions=False)
    places = [done.stdout.index(word) for word in ("(mixed)", "brewline", *WAYS, "packed_dense", "matmul_share", "allocator")]
    assert places == sorted(places)


def test_the_command_speaks_json_in_bfloat16(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    words = [*WORDS, "--dtype", "bfloat16", "--arithmetic", "float32", "--json", "--out", str(out)]
    done = CliRunner().invoke(cli.app, ["bench", "prefill", *words], catch_exceptions=False)
    found = json.loads(done.stdout)
    promised = "seconds seconds_p99 items_per_second speedup_one_by_one speedup_prefix_cache matmul_share peak_bytes backend "
    promised += "seconds_max speedup_prefix_packed speedup_best_contender speedup_best_contender_same_arithmetic lengths"
    assert all(isinstance(found[name], int | float | str) for name in promised.split())
    assert (found["dtype"], found["arithmetic"], found["layers"], found["one_by_one_items_timed"]) == (
        "bfloat16",
        "float32",
        1,
        8,
    )
    assert found["max_abs_diff"] < 1e-5 and found["max_abs_diff_hugging_face"] > found["max_abs_diff"]
    dtypes = [(one["name"], one["dtype"]) for one in found["contenders"]]
    assert len(dtypes) == len(set(dtypes)) == 7
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
    cells = [PrefillShape(2048, 400_000, 128), SHAPE, PrefillShape(16, 60, 1)]
    rows = measure_grid(cells, TINY, 60)
    assert [row["items"] for row in rows] == [8, 60, 400_000]
    assert rows[0]["backend"] and "skipped" not in rows[0]
    assert "vocabulary larger than 64" in str(rows[1]["skipped"]) and "foretold" in str(rows[2]["skipped"])
    assert grid_table(rows).row_count == 3
    draw([{**facts, "prefix": 16, "items": 8, "length": 4}, *rows], tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert math.isfinite(rows[0]["seconds"])
