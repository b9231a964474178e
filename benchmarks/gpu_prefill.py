"""Times the prefill engine on a GPU beside the plain ways of Hugging Face, after checking that all of them agree.

    PYTHONPATH=. python benchmarks/gpu_prefill.py --out results          # needs torch, transformers and a CUDA device
    PYTHONPATH=. python benchmarks/gpu_prefill.py --out results --tiny   # toy sizes on a CPU: shows that the script runs

Random bfloat16 weights. Times are medians of 10 calls after 3, planning and the answer's way back included. What fails is written
down with its reason, the rest goes on and the exit code is 1. `results/gpu_prefill.json` is written anew after every step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from ranking.prefill import lean
from ranking.prefill.attend import BACKENDS, probe, reference
from ranking.prefill.engine import Engine
from ranking.prefill.load import ready
from ranking.prefill.operations import Body, PrefillShape, lower_bound, warm_lower_bound
from ranking.prefill.plan import Limits, Request
from retrieval.llama import Size, new_config

LABELS, WARM_UPS, REPEATS = (2, 3), 3, 10
BACKEND = {"cuda": "cuda_varlen", "cpu": None}
Report = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """A model, a request and what is tried: items per pass of the plain ways, rows of a block and tokens of a pass of ours."""

    size: Size
    shape: PrefillShape
    singles: tuple[int, ...] = (1, 4, 16, 64)
    batches: tuple[int, ...] = (32, 125, 500)
    rows: tuple[int, ...] = (2048, 8192, 32768)
    tokens: tuple[int, ...] = (8192, 32768)


ASKED = PrefillShape(prefix=1024, items=500, length=32)
SMALL = Size(hidden=256, layers=3, heads=8, kv_heads=2, mlp=512, vocabulary=1000)
SETTINGS = {
    "1B": Setting(Size(hidden=2048, layers=16, heads=32, kv_heads=8, mlp=8192, vocabulary=128_256), ASKED),
    "3B": Setting(Size(hidden=3072, layers=28, heads=24, kv_heads=8, mlp=8192, vocabulary=128_256), ASKED),
    "tiny": Setting(SMALL, PrefillShape(40, 12, 8), (1, 4), (4, 12), (32, 2048), (64, 4096)),
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


class Plain:
    """The plain model's ways: no head over the vocabulary, label rows in float32, ids on the device beforehand."""

    def __init__(self, model: LlamaForCausalLM, request: Request) -> None:
        self.prefix, self.items = (torch.tensor(ids, device=model.device) for ids in (request.prefix, request.items))
        self._body, self._labels = model.model, model.get_output_embeddings().weight[list(LABELS)].float()

    @torch.inference_mode()
    def singles(self, batch: int) -> np.ndarray:
        """The first `batch` items as full prompts in one pass."""
        rows = torch.cat([self.prefix.expand(batch, -1), self.items[:batch]], 1)
        return self._read(self._body(input_ids=rows, use_cache=False).last_hidden_state[:, -1])

    @torch.inference_mode()
    def prefix_cache(self, batch: int) -> np.ndarray:
        """The prefix once, then all items over views of its keys and values, `batch` in a pass."""
        kept, parts = DynamicCache(), []
        self._body(input_ids=self.prefix[None], past_key_values=kept, use_cache=True)
        for some in self.items.split(batch):
            cache = DynamicCache()
            for number, layer in enumerate(kept.layers):
                cache.update(layer.keys[:, :, :0], layer.values[:, :, :0], number)
                wide = cache.layers[number]
                wide.keys, wide.values = (part.expand(len(some), -1, -1, -1) for part in (layer.keys, layer.values))
            parts.append(self._read(self._body(input_ids=some, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]))
        return np.concatenate(parts)

    @torch.inference_mode()
    def packed(self, mask: torch.Tensor) -> np.ndarray:
        """One sequence with restarted positions under a dense mask."""
        (count, length), first = self.items.shape, len(self.prefix)
        places = torch.cat([torch.arange(first), torch.arange(first, first + length).repeat(count)]).to(mask.device)
        ids = torch.cat([self.prefix, self.items.flatten()])[None]
        found = self._body(input_ids=ids, attention_mask=mask, position_ids=places[None], use_cache=False)
        return self._read(found.last_hidden_state[0, first + length - 1 :: length])

    def mask(self) -> torch.Tensor:
        """[1, 1, T, T], added to the scores."""
        first, rows = len(self.prefix), len(self.prefix) + self.items.numel()
        row = torch.arange(rows, device=self.items.device)
        item = torch.where(row < first, -1, (row - first) // self.items.shape[1])
        hidden = (row[:, None] < row) | ((item != -1) & (item[:, None] != item))
        return torch.zeros(1, 1, rows, rows, dtype=self._body.dtype, device=row.device).masked_fill_(hidden, float("-inf"))

    def _read(self, hidden: torch.Tensor) -> np.ndarray:
        return (hidden.float() @ self._labels.T).cpu().numpy()


def seconds(run: Callable[[], object], device: str, before: Callable[[], object] = int) -> float:
    """The median time of a call; `before` runs untimed before each."""
    found = []
    for _ in range(WARM_UPS + REPEATS):
        before()
        began = time.perf_counter()
        if device == "cpu":
            run()
            found.append(time.perf_counter() - began)
            continue
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1000)
    return statistics.median(found[WARM_UPS:])


def tried(run: Callable[[], Report]) -> Report:
    """What a step found, or why it failed."""
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:400]}"}


def timed(run: Callable[[], object], device: str, times: float = 1) -> Report:
    return tried(lambda: {"seconds": seconds(run, device) * times})


def product_rates(device: str, size: int) -> Report:
    """Operations per second of a size^3 matrix product on random numbers: bfloat16, and FP8 with a scale for each row."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    x, y, ones = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones(size, 1, device=device)
    rate, float8 = 2 * size**3 / seconds(lambda: a @ b, device), "CUDA only"
    if device == "cuda":
        float8 = timed(lambda: torch._scaled_mm(x, y, scale_a=ones, scale_b=ones.t(), out_dtype=a.dtype), device)
    return {"size": size, "bfloat16": rate, "operations": 2 * size**3, "float8": float8}


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


def ours(model: LlamaForCausalLM, setting: Setting, request: Request, device: str, rate: float) -> Report:
    """The engine cold and warm. `share`: the fewest operations that answer the request, over the time, of the product rate."""
    report: Report = {}
    size, shape = setting.size, setting.shape
    body = Body(size.layers, size.hidden, size.mlp, size.heads, size.kv_heads, size.hidden // size.heads)
    for rows, tokens in itertools.product(setting.rows, setting.tokens):
        lean.ROWS = rows
        engine = Engine(model, LABELS, backend=BACKEND[device], limits=Limits(max_tokens=tokens), cache_bytes=4 << 30)
        for state, before, bound in (("cold", engine.cache.clear, lower_bound), ("warm", int, warm_lower_bound)):
            spent = seconds(lambda engine=engine: engine.score([request]), device, before)
            found = {"seconds": spent, "share": bound(body, shape) / spent / rate}
            report[f"{engine.backend}, {rows} rows, {tokens} tokens, {state}"] = found
    return report


def theirs(plain: Plain, setting: Setting, device: str) -> Report:
    """The plain ways. Full prompts are timed for one pass and scaled to all items."""
    items, report = setting.shape.items, {}
    for n in setting.singles:
        report[f"one by one, {n} in a pass, scaled"] = timed(lambda n=n: plain.singles(n), device, items / n)
    for n in setting.batches:
        report[f"prefix cache, {n} in a pass"] = timed(lambda n=n: plain.prefix_cache(n), device)
    mask = plain.mask()
    return {**report, "packed, dense mask": timed(lambda: plain.packed(mask), device)}


def with_float8(model: LlamaForCausalLM, plain: Plain, setting: Setting, device: str) -> Report:
    """The plain prefix cache with torchao's FP8 layers, scales by row. The model is another one afterwards."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError:
        return {"plain prefix cache": "torchao is not installed"}
    quantize_(model.model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return {"plain prefix cache": timed(lambda: plain.prefix_cache(setting.batches[-1]), device)}


def measured(setting: Setting, device: str, rate: float) -> Iterator[tuple[str, Report]]:
    """The steps of one setting."""
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
    yield "float8", tried(lambda: with_float8(model, plain, setting, device))


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
        for step, found in measured(SETTINGS[name], device, float(str(rates["bfloat16"]))):
            note(f"{name}: {step}", found)
    return int('"failed"' in json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
