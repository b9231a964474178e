"""Passes over buffers of fixed size score as plain ones do, whatever stands in their padding; what does not fit says why.

On a CPU a recorded pass is the same function called again on the same buffers; the CUDA graph itself is not tested here.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from ranking.prefill import graphs, seats
from ranking.prefill.attend import BackendMissing
from ranking.prefill.engine import Engine
from ranking.prefill.graphs import Bucket
from ranking.prefill.load import ready
from ranking.prefill.request import Limits, Request
from retrieval.llama import add_lora

LABELS = (5, 9)
ROOM = 1 << 28


def recorded(model: Any, **more: Any) -> Engine:
    return Engine(model, LABELS, graph_bytes=ROOM, **more)


def recordings(engine: Engine) -> dict[Bucket, graphs.Recording]:
    assert isinstance(engine._lean, graphs.Recorded)
    return dict(engine._lean._held)


SIZES = [(1, [1]), (63, [1] * 40), (64, [16] * 8), (65, [3, 1, 9, 3, 5]), (128, [33, 1]), (130, [7] * 9), (200, [2, 64, 65])]


@pytest.mark.parametrize("backend", ["cpu_flash", "reference"])
@pytest.mark.parametrize(("prefix", "lengths"), SIZES)
def test_padded_to_a_bucket_equals_as_it_is(prefix: int, lengths: list[int], backend: str, toy: Any) -> None:
    """Within 1e-5 in float32: a matrix product may add in another order when it has more rows."""
    model, asked = toy.model("llama"), toy.request(prefix, lengths)
    plain, engine = Engine(model, LABELS, backend=backend), recorded(model, backend=backend)
    for state in ("cold", "warm"):
        np.testing.assert_allclose(engine.score([asked])[0], plain.score([asked])[0], atol=1e-5, err_msg=state)
    assert engine.graphs is not None and engine.graphs.recorded == 2 and engine.graphs.replayed == 3 and not engine.graphs.plain
    np.testing.assert_allclose(engine.score([asked])[0], toy.alone(model, asked), atol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_grown_prefixes_several_requests_and_vectors_pass_through_recordings(kind: str, toy: Any) -> None:
    model, first = toy.model(kind), toy.request(70, [3, 5])
    engine, grown = recorded(model), Request([*first.prefix, *range(40)], first.items)
    table = model.get_input_embeddings().weight.detach()
    vectors = Request(first.prefix, [[-1, 3, 4], [-2, 4]], table[[17, 23]].numpy())
    spelled = Request(first.prefix, [[17, 3, 4], [23, 4]])
    engine.score([first])
    asked = [grown, toy.request(9, [1], 5), spelled, toy.request(100, [20, 3, 3], 6)]
    for got, one in zip(engine.score(asked), asked):
        np.testing.assert_allclose(got, toy.alone(model, one), atol=1e-5)
    np.testing.assert_allclose(engine.score([vectors])[0], toy.alone(model, spelled), atol=1e-5)
    assert engine.graphs is not None and not engine.graphs.plain
    assert {bucket.known for bucket in recordings(engine) if not bucket.items} >= {0, 128}


def test_what_stands_in_the_padding_reaches_no_score(toy: Any) -> None:
    """NaN in every buffer of every recording before it runs again; rows without an owner get NaN from attention anyway."""
    engine, asked = recorded(toy.model()), toy.request(90, [3, 1, 9, 3, 5])
    longer = Request([*asked.prefix, *range(30)], asked.items)
    want = [engine.score([one])[0] for one in (asked, longer)]
    assert len(recordings(engine)) == 3  # from nothing, grown, and one for both reads
    engine.cache.clear()
    with torch.inference_mode():
        for one in recordings(engine).values():
            for buffer in (one.x, *one._angles, one.keys.tensor, *one._lean._space._flat.values()):
                buffer.fill_(float("nan"))
            one._seats.numbers.fill_(1 << 30)
    before = engine.graphs.replayed if engine.graphs else 0
    found = [engine.score([one])[0] for one in (asked, longer)]
    np.testing.assert_array_equal(np.stack(found), np.stack(want))
    assert engine.graphs is not None and engine.graphs.recorded == 3 and engine.graphs.replayed == before + 4


def test_a_smaller_request_after_a_larger_one_in_the_same_bucket_sees_nothing_of_it(toy: Any) -> None:
    model = toy.model()
    engine, large, small = recorded(model), toy.request(128, [12, 12, 12, 12, 12]), toy.request(70, [2, 1], 4)
    engine.score([large])
    fresh = recorded(model).score([small])[0]
    np.testing.assert_array_equal(engine.score([small])[0], fresh)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ROWS", 128)
    monkeypatch.setattr(graphs, "KNOWN", 256)
    monkeypatch.setattr(graphs, "REQUESTS", 2)


@pytest.mark.usefixtures("narrow")
def test_what_fits_no_bucket_goes_the_plain_way_and_is_counted(toy: Any) -> None:
    model = toy.model()
    many, long, three = toy.request(60, [9] * 20), toy.request(290, [3]), [toy.request(20, [3], seed) for seed in range(3)]
    past = Request(toy.request(60, [3], 8).prefix, [[1, 2, 3]], history=(10, 30, 50))
    engine = recorded(model)
    for asked, wanted in (
        ([many], {"rows": 1}),
        ([long], {"rows": 2, "known keys": 1}),
        (three, {"rows": 2, "known keys": 1, "requests": 1}),
    ):
        for got, one in zip(engine.score(asked), asked):
            np.testing.assert_allclose(got, toy.alone(model, one), atol=1e-5, rtol=1e-5)
        assert engine.graphs is not None and engine.graphs.plain == wanted
    np.testing.assert_allclose(engine.score([past])[0], Engine(model, LABELS).score([past])[0], atol=1e-5)
    assert engine.graphs is not None and engine.graphs.plain["history"] == 1


def test_recordings_stay_within_their_bytes_and_number(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = toy.model(), [toy.request(prefix, [3]) for prefix in (20, 100, 200)]
    engine = recorded(model, cache_bytes=0)
    for one in asked:
        engine.score([one])
    held = engine.graphs
    assert held is not None and held.recorded == 6 and held.bytes == sum(one.bytes for one in recordings(engine).values()) > 0
    tight = Engine(model, LABELS, graph_bytes=held.bytes // 2, cache_bytes=0)
    for one in asked:
        np.testing.assert_allclose(tight.score([one])[0], toy.alone(model, one), atol=1e-5)
    seen = tight.graphs
    assert seen is not None and 0 < seen.bytes <= held.bytes // 2 and seen.evicted == 6 - len(recordings(tight))
    least = min(one.bytes for one in recordings(engine).values())
    for room, recorded_once in ((1, 0), (least - 1, 2)):  # too little for what goes in; for what is found at the first run
        nothing = Engine(model, LABELS, graph_bytes=room, cache_bytes=0)
        for _ in range(2):
            np.testing.assert_allclose(nothing.score([asked[0]])[0], toy.alone(model, asked[0]), atol=1e-5)
        seen = nothing.graphs
        assert seen is not None and seen.plain == {"bytes": 4 - recorded_once} and seen.recorded == recorded_once
        assert seen.bytes == 0 and not recordings(nothing)
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    few = recorded(model, cache_bytes=0)
    for one in asked:
        few.score([one])
    assert few.graphs is not None and few.graphs.evicted == 4 and len(recordings(few)) == 2


@pytest.mark.parametrize(("dtype", "small"), [(torch.bfloat16, "float8"), (torch.float32, "int8")])
def test_small_layers_pass_through_recordings(dtype: torch.dtype, small: str, toy: Any) -> None:
    model, asked = toy.model().to(dtype), toy.request(70, [3, 1, 9, 3, 5])
    ready(model, float8=small == "float8", int8=small == "int8")
    engine, plain = recorded(model), Engine(model, LABELS)
    want = plain.score([asked])[0]
    assert np.abs(engine.score([asked])[0] - want).max() < 0.05 * np.abs(want).max()


def test_new_weights_pass_through_recordings(toy: Any) -> None:
    other, asked = toy.model(), toy.request(70, [3, 1, 9, 3, 5])
    engine = recorded(other)
    before = engine.score([asked])[0]
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    after = engine.score([asked])[0]
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, toy.alone(other, asked), atol=1e-5)


@pytest.mark.parametrize("closing", [False, True])
def test_a_first_run_without_memory_goes_the_plain_way_and_is_not_tried_again(
    closing: bool, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def short(recording: graphs.Recording) -> torch.Tensor:
        tries.append(recording.bucket)
        try:
            raise torch.OutOfMemoryError("nothing left")
        finally:
            if closing:
                raise RuntimeError("the capture was invalid")

    monkeypatch.setattr(graphs.Recording, "_pass", short)
    model, asked = toy.model(), toy.request(70, [3, 1])
    engine = recorded(model, cache_bytes=0)
    for _ in range(2):
        np.testing.assert_allclose(engine.score([asked])[0], toy.alone(model, asked), atol=1e-5)
    assert len(tries) == len(set(tries)) == 2 and not recordings(engine)
    assert engine.graphs is not None and engine.graphs.plain == {"bytes": 4} and engine.graphs.recorded == 0


def test_a_first_run_that_fails_leaves_nothing_behind(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = toy.model(), toy.request(70, [3, 1])
    engine = recorded(model)
    with monkeypatch.context() as broken:
        broken.setattr(graphs.Recording, "_pass", lambda _: torch.ones(2) @ torch.ones(3))
        with pytest.raises(RuntimeError):
            engine.score([asked])
    assert not recordings(engine) and engine.graphs is not None and engine.graphs.bytes == engine.graphs.recorded == 0
    np.testing.assert_allclose(engine.score([asked])[0], toy.alone(model, asked), atol=1e-5)
    assert len(recordings(engine)) == 2


def test_a_dropped_recording_gives_its_memory_back_at_once(toy: Any) -> None:
    engine = recorded(toy.model())
    engine.score([toy.request(70, [3, 1])])
    held = [weakref.ref(one) for one in recordings(engine).values()]
    assert isinstance(engine._lean, graphs.Recorded) and len(held) == 2
    gc.disable()
    try:
        engine._lean._held.clear()
        assert not any(one() for one in held)
    finally:
        gc.enable()


def test_an_engine_that_may_not_follow_its_model_refuses_every_time(toy: Any) -> None:
    model, asked = toy.model(), toy.request(70, [3, 1])
    engine = recorded(model)
    engine.score([asked])
    add_lora(model, 2)
    for _ in range(2):
        with pytest.raises(BackendMissing, match="merge the LoRA first"):
            engine.score([asked])


def test_what_cannot_be_recorded_is_refused(toy: Any) -> None:
    with pytest.raises(BackendMissing, match="choose one of both"):
        recorded(toy.model(), deterministic=True)
    with pytest.raises(BackendMissing, match='need the backend "cuda_varlen"'):
        seats.placed("flex", torch.device("cuda"))
    assert Engine(toy.model(), LABELS, limits=Limits(64)).graphs is None


def test_a_segment_longer_than_the_kernel_was_told_is_an_error_on_a_cpu() -> None:
    """A GPU kernel would leave its end out in silence."""
    run, q, k = seats.placed("cpu_flash", torch.device("cpu")), torch.randn(8, 4, 16), torch.randn(8, 2, 16)
    bounds = torch.tensor([0, 3, 7, 7, 7], dtype=torch.int32)
    out, lse = run(q, k, k, (bounds, 4), (bounds, 4), True)
    assert bool(out[:7].isfinite().all()) and bool(out[7].isnan().all()) and bool(lse[7].isnan().all())
    with pytest.raises(ValueError, match="4 rows where at most 3"):
        run(q, k, k, (bounds, 3), (bounds, 4), True)
