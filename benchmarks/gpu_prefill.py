"""Times the prefill engine on a GPU beside the plain ways of Hugging Face, after checking that all of them agree.

    PYTHONPATH=. python benchmarks/gpu_prefill.py --out results          # needs torch, transformers and a CUDA device
    PYTHONPATH=. python benchmarks/gpu_prefill.py --out results --tiny   # toy sizes on a CPU: shows that the script runs

Random bfloat16 weights, then the same in FP8; small requests also from recordings (CUDA graphs). Times are medians of 10 calls
after 3, planning and the answer's way back included. What fails is written down with its reason, the rest goes on and the exit
code is 1. `results/gpu_prefill.json` is written anew after every step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks.gpu_plain import LABELS, Plain, Report, seconds, timed, tried
from ranking.prefill import lean
from ranking.prefill.attend import BACKENDS, probe, reference
from ranking.prefill.bench import body_of
from ranking.prefill.engine import Engine
from ranking.prefill.float8 import Float8, scaled
from ranking.prefill.joint import weight_bytes
from ranking.prefill.load import ready
from ranking.prefill.operations import PrefillShape, lower_bound, warm_lower_bound
from ranking.prefill.plan import Limits, Request
from retrieval.llama import Size, new_config

GRAPH_BYTES = 4 << 30
BACKEND = {"cuda": "cuda_varlen", "cpu": None}
ASKED, FEW = PrefillShape(prefix=1024, items=500, length=32), PrefillShape(prefix=256, items=8, length=16)


@dataclass(frozen=True)
class Setting:
    """A model, a request and what is tried: items per pass of the plain ways, rows of a block and tokens of a pass of ours."""

    size: Size
    shape: PrefillShape
    singles: tuple[int, ...] = (1, 4, 16, 64)
    batches: tuple[int, ...] = (32, 125, 500)
    rows: tuple[int, ...] = (2048, 8192, 32768)
    tokens: tuple[int, ...] = (8192, 32768)
    small: PrefillShape = FEW


SMALL = Size(hidden=256, layers=3, heads=8, kv_heads=2, mlp=512, vocabulary=1000)
SETTINGS = {
    "1B": Setting(Size(hidden=2048, layers=16, heads=32, kv_heads=8, mlp=8192, vocabulary=128_256), ASKED),
    "3B": Setting(Size(hidden=3072, layers=28, heads=24, kv_heads=8, mlp=8192, vocabulary=128_256), ASKED),
    "tiny": Setting(SMALL, PrefillShape(40, 12, 8), (1, 4), (4, 12), (32, 2048), (64, 4096), PrefillShape(40, 3, 5)),
}


def new_model(size: Size, device: str, dtype: torch.dtype, spread: float = 0.02) -> LlamaForCausalLM:
    """A LLaMA with tied embeddings whose random weights (standard deviation `spread`) were made on the device."""
    config = new_config(size, size.vocabulary)
    config.initializer_range = spread
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return ready(model)


def new_request(shape: PrefillShape, vocabulary: int) -> Request:
    drawn = np.random.default_rng(0).integers(0, vocabulary, shape.prefix + shape.item_rows)
    return Request(drawn[: shape.prefix].tolist(), drawn[shape.prefix :].reshape(shape.items, shape.length).tolist())


def product_rates(device: str, size: int) -> Report:
    """Operations per second of a size^3 matrix product on random numbers: bfloat16, and FP8 with a scale for each row."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    layer, x, out = Float8(*scaled(b), None), scaled(a), torch.empty_like(a)
    rate = 2 * size**3 / seconds(lambda: torch.mm(a, b.t(), out=out), device)
    float8 = tried(lambda: {"rate": 2 * size**3 / seconds(lambda: layer.into(x, out), device)})
    return {"size": size, "operations": 2 * size**3, "bfloat16": {"rate": rate}, "float8": float8}


def kernels_apart(device: str) -> Report:
    """For every backend and precision the largest distance from the float32 reference on the same rounded inputs."""
    lengths = [300, *range(1, 40), 32, 32, 32, 8, 8]
    cu, single = np.cumsum([0, *lengths], dtype=np.int32), np.arange(len(lengths) + 1, dtype=np.int32)
    drawn = [torch.randn(sum(lengths), heads, 64) for heads in (8, 2, 2)]
    report: Report = {}
    for dtype, name in itertools.product((torch.float32, torch.bfloat16), BACKENDS):
        q, k, v = (rows.to(device, dtype) for rows in drawn)
        if reason := probe(name, device, dtype):
            report[f"{name} {dtype}"] = reason
            continue
        worst = [0.0, 0.0]
        for rows, cu_q, causal in ((q, cu, True), (q, cu, False), (q[: len(lengths)], single, False)):
            want = reference(rows.float(), k.float(), v.float(), cu_q, cu, causal)
            got = BACKENDS[name].attend(rows, k, v, cu_q, cu, causal)
            worst = [max(was, float((x.float() - y).abs().max())) for was, x, y in zip(worst, got, want)]
        report[f"{name} {dtype}"] = {"out": worst[0], "lse": worst[1]}
    return report


def engines_apart(device: str) -> Report:
    """Label logits of every backend against one item per pass of the plain model in float32, and bfloat16's own distance."""
    exact, rounded = (new_model(SMALL, device, dtype, spread=0.08) for dtype in (torch.float32, torch.bfloat16))
    rounded.load_state_dict(exact.state_dict())
    request = new_request(PrefillShape(200, 24, 16), 1000)
    truth = Plain(exact, request).singles(24)

    def one(model: LlamaForCausalLM, name: str | None) -> Report:
        engine = Engine(model, LABELS, backend=name)
        cold, warm = (float(np.abs(engine.score([request])[0] - truth).max()) for _ in range(2))
        return {"backend": engine.backend, "cold": cold, "warm": warm}

    rounding = float(np.abs(Plain(rounded, request).singles(24) - truth).max())
    found: Report = {"spread of the logits": float(truth.std()), "plain bfloat16": rounding}
    for model in (exact, rounded):
        for name in (None, *(name for name in BACKENDS if not probe(name, device, model.dtype))):
            found[f"{name or 'default'} {model.dtype}"] = tried(lambda model=model, name=name: one(model, name))
    return found


def timed_engine(engine: Engine, shape: PrefillShape, request: Request, device: str, rate: float) -> Report:
    """The engine cold and warm. `share`: the fewest operations that answer the request, over the time, of the product rate."""
    body, report = body_of(engine.model), {}
    for state, before, bound in (("cold", engine.cache.clear, lower_bound), ("warm", int, warm_lower_bound)):
        spent = seconds(lambda: engine.score([request]), device, before)
        report[state] = {"p50_ms": 1000 * spent, "share": bound(body, shape) / spent / rate}
    return report


def ours(model: LlamaForCausalLM, setting: Setting, request: Request, device: str, rate: float) -> Report:
    """The engine at every size of its blocks and passes."""

    def one(rows: int, tokens: int) -> Report:
        lean.ROWS = lean.ROWS_ELSEWHERE = rows
        engine = Engine(model, LABELS, backend=BACKEND[device], limits=Limits(max_tokens=tokens), cache_bytes=4 << 30)
        return {"backend": engine.backend, **timed_engine(engine, setting.shape, request, device, rate)}

    cuts = itertools.product(setting.rows, setting.tokens)
    return {f"{rows} rows, {tokens} tokens": tried(lambda cut=(rows, tokens): one(*cut)) for rows, tokens in cuts}


def theirs(plain: Plain, setting: Setting, device: str) -> Report:
    """The plain ways. Full prompts are timed for one pass and scaled to all items."""
    items, report = setting.shape.items, {}
    for n in setting.singles:
        report[f"one by one, {n} in a pass, scaled"] = timed(lambda n=n: plain.singles(n), device, items / n)
    for n in setting.batches:
        report[f"prefix cache, {n} in a pass"] = timed(lambda n=n: plain.prefix_cache(n), device)
    mask = plain.mask()
    return {**report, "packed, dense mask": timed(lambda: plain.packed(mask), device)}


def small_request(model: LlamaForCausalLM, setting: Setting, device: str, rate: float) -> Report:
    """A small request pass by pass and from recordings (CUDA graphs on a GPU): times, what was recorded, largest distance."""
    request, report, answers = new_request(setting.small, setting.size.vocabulary), {}, []
    for name, room in (("pass by pass", 0), ("recorded", GRAPH_BYTES)):
        engine = Engine(model, LABELS, backend=BACKEND[device], graph_bytes=room)
        answers.append(engine.score([request])[0])
        found: Report = timed_engine(engine, setting.small, request, device, rate)
        report[name] = found
        if (seen := engine.graphs) is not None:
            report["recordings"] = {**asdict(seen), "plain": dict(seen.plain)}
    return {**report, "largest distance": float(np.abs(answers[0] - answers[1]).max())}


def in_float8(model: LlamaForCausalLM, setting: Setting, request: Request, device: str, rate: float) -> Report:
    """The engine with FP8 layers; `rate` is that of FP8 products. The model is another one afterwards."""
    wide, answer = weight_bytes(model), Engine(model, LABELS, backend=BACKEND[device]).score([request])[0]
    ready(model.to(torch.bfloat16), float8=True)
    engine = Engine(model, LABELS, backend=BACKEND[device], limits=Limits(max_tokens=max(setting.tokens)))
    apart = float(np.abs(engine.score([request])[0] - answer).max())
    report: Report = {"bytes": {"before": wide, "after": weight_bytes(model)}, "largest distance": apart}
    report["engine"] = timed_engine(engine, setting.shape, request, device, rate)
    return {**report, "small request": tried(lambda: small_request(model, setting, device, rate))}


def goals(found: dict[str, Report]) -> Report:
    """Whether issue 3's goals for the 1B shape hold; None where a figure is missing."""
    cold = [row["cold"] for row in found["engine"].values() if isinstance(row, dict) and "cold" in row]
    best = min(cold, key=lambda row: row["p50_ms"], default=None)
    float8 = found["float8"].get("engine")
    spent = float8["cold"]["p50_ms"] if isinstance(float8, dict) and "cold" in float8 else None
    return {
        "bfloat16 p50_ms": best and best["p50_ms"],
        "at most 70 ms": best and best["p50_ms"] <= 70,
        "share": best and best["share"],
        "at least 0.60": best and best["share"] >= 0.60,
        "float8 p50_ms": spent,
        "at most 45 ms": spent and spent <= 45,
    }


def measured(setting: Setting, device: str, rates: Report) -> Iterator[tuple[str, Report]]:
    """The steps of one setting."""
    rate, rate8 = (float(rates[name].get("rate", "nan")) for name in ("bfloat16", "float8"))
    model = new_model(setting.size, device, torch.bfloat16 if device == "cuda" else torch.float32)
    request = new_request(setting.shape, setting.size.vocabulary)
    plain = Plain(model, request)
    truth = plain.singles(max(setting.singles))

    def apart() -> Report:
        answers = {
            "engine": Engine(model, LABELS, backend=BACKEND[device]).score([request])[0],
            "packed": plain.packed(plain.mask()),
        }
        answers["prefix cache"] = plain.prefix_cache(max(setting.batches))
        return {name: float(np.abs(found[: len(truth)] - truth).max()) for name, found in answers.items()}

    yield "largest distance from one by one", tried(apart)
    yield "engine", tried(lambda: ours(model, setting, request, device, rate))
    yield "plain", tried(lambda: theirs(plain, setting, device))
    yield "small request", tried(lambda: small_request(model, setting, device, rate))
    yield "float8", tried(lambda: in_float8(model, setting, request, device, rate8))


def lines(name: str, found: object) -> Iterator[str]:
    """A line for every group of numbers, with the names that lead to it."""
    if isinstance(found, dict) and any(isinstance(part, dict) for part in found.values()):
        for part in found:
            yield from lines(f"{name}; {part}", found[part])
    else:
        parts = found.items() if isinstance(found, dict) else [("", found)]
        yield f"{name:84} " + "  ".join(f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_prefill.json")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--settings", default="1B,3B", help="which of 1B and 3B, separated by commas")
    asked = parser.parse_args()
    if not asked.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs on a CPU")
    asked.out.mkdir(parents=True, exist_ok=True)
    device, where = ("cpu", "CPU") if asked.tiny else ("cuda", torch.cuda.get_device_name())
    report: Report = {"torch": torch.__version__, "transformers": transformers.__version__, "device": where}

    def note(name: str, found: Report) -> None:
        report[name] = found
        (asked.out / "gpu_prefill.json").write_text(json.dumps(report, indent=1))
        sys.stdout.write("\n".join([*lines(name, found), ""]))

    rates = product_rates(device, 256 if asked.tiny else 8192)
    note("products per second", rates)
    note("kernels, distance from the float32 reference", tried(lambda: kernels_apart(device)))
    note("engines, distance from one by one in float32", tried(lambda: engines_apart(device)))
    for name in ["tiny"] if asked.tiny else asked.settings.split(","):
        steps: dict[str, Report] = {}
        for step, found in measured(SETTINGS[name], device, rates):
            steps[step] = found
            note(f"{name}: {step}", found)
        if name != "3B":
            note("1B: goals" if name == "1B" else "tiny: goals, as if these were the figures of 1B", goals(steps))
    return int('"failed"' in json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
