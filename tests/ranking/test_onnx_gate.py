"""An exported folder is believed when it is whole and agrees with itself, int8 only on numbers that were measured on it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ranking.prefill.engine import Engine
from ranking.prefill.errors import LabelError
from ranking.prefill.onnx_engine import OnnxEngine
from ranking.prefill.onnx_folder import EngineFolderError, NotAdmitted
from ranking.prefill.onnx_gate import quality_gate
from ranking.prefill.onnx_graphs import export_engine
from ranking.prefill.request import Request

LABELS = (5, 9, 40)
honest_gate = partial(quality_gate, min_kendall=0.95, min_overlap=0.9, max_apart=0.1)
"""Demands what the int8 twin of this tiny model reaches."""
Spoil = Callable[[Path], object]


def made(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    return Qwen3ForCausalLM(config).eval()


def request(items: int, seed: int) -> Request:
    rng = np.random.default_rng(seed)
    return Request(rng.integers(0, 50, 12).tolist(), rng.integers(0, 50, (items, 4)).tolist())


ASKED = [request(40, seed) for seed in range(6)]


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return made()


@pytest.fixture(scope="module")
def original(model: Qwen3ForCausalLM) -> Engine:
    return Engine(model, LABELS)


@pytest.fixture(scope="module")
def plain(model: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_engine(model, LABELS, tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def untried(model: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_engine(model, LABELS, tmp_path_factory.mktemp("int8"), quantize=True)


@pytest.fixture(scope="module")
def admitted(untried: Path, original: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(untried, tmp_path_factory.mktemp("admitted"))
    honest_gate(original, trial(folder), ASKED)
    return folder


def copied(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to, dirs_exist_ok=True)


def trial(folder: Path) -> OnnxEngine:
    return OnnxEngine(folder, threads=1, on_trial=True)


def facts(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "engine.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def gate(**changes: object) -> Spoil:
    return lambda folder: facts(gate={**json.loads((folder / "engine.json").read_text())["gate"], **changes})(folder)


def graph(change: Callable[[onnx.ModelProto], object]) -> Spoil:
    """items.onnx is changed and the facts name its new hash."""

    def spoil(folder: Path) -> None:
        path = folder / "items.onnx"
        read = onnx.load(path, load_external_data=False)
        change(read)
        path.write_bytes(read.SerializeToString())
        files = json.loads((folder / "engine.json").read_text())["files"]
        facts(files={**files, "items.onnx": sha256(path.read_bytes()).hexdigest()})(folder)

    return spoil


def elsewhere(read: onnx.ModelProto) -> None:
    held = next(tensor for tensor in read.graph.initializer if tensor.external_data)
    next(entry for entry in held.external_data if entry.key == "location").value = "other.bin"


def hidden(read: onnx.ModelProto) -> None:
    """A tensor in another file that no list of initializers shows: the value of a constant node."""
    read.graph.node.append(onnx.helper.make_node("Constant", [], ["more"], value=onnx.TensorProto(data_type=1, dims=[1])))
    tensor = read.graph.node[-1].attribute[0].t
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def deeper(read: onnx.ModelProto) -> None:
    past = next(port for port in read.graph.input if port.name == "past")
    past.type.tensor_type.shape.dim[1].dim_value = 3


SPOILED: dict[str, Spoil] = {
    "no facts": lambda folder: (folder / "engine.json").unlink(),
    "half the facts": lambda folder: (folder / "engine.json").write_text((folder / "engine.json").read_text()[:200]),
    "facts that are a list": lambda folder: (folder / "engine.json").write_text("[1]"),
    "facts that are bytes": lambda folder: (folder / "engine.json").write_bytes(b"\xff\xfe\x00"),
    "facts nested deeply": lambda folder: (folder / "engine.json").write_text("[" * 200_000),
    "another format": facts(format=99),
    "layers that are words": facts(layers="two"),
    "a layer more": facts(layers=3),
    "a larger vocabulary": facts(vocabulary=51),
    "more positions": facts(max_positions=4096),
    "files that are a number": facts(files=3),
    "files that are lists": facts(files={"items.onnx": [[1]]}),
    "a revision that is a list": facts(revision=[1]),
    "labels that are words": facts(labels=["yes"]),
    "labels outside of the vocabulary": facts(labels=[999999, -4]),
    "a label that is infinite": facts(labels=[float("inf"), 5]),
    "labels in another order": facts(labels=[9, 5, 40]),
    "a label more": facts(labels=[*LABELS, 3]),
    "int8 that says float32, or the reverse": facts(quantized=True),
    "a gate that is a list": facts(gate=[1]),
    "a gate that says so": facts(gate={"passed": True}),
    "no weights": lambda folder: (folder / "weights.bin").unlink(),
    "half the weights": lambda folder: os.truncate(folder / "weights.bin", 5000),
    "one byte more": lambda folder: os.truncate(folder / "weights.bin", (folder / "weights.bin").stat().st_size + 1),
    "a graph of noise": lambda folder: (folder / "items.onnx").write_bytes(bytes(range(256))),
    "the other graph": lambda folder: (folder / "items.onnx").write_bytes((folder / "prefix.onnx").read_bytes()),
    "a graph with weights elsewhere": graph(elsewhere),
    "a graph with a hidden tensor": graph(hidden),
    "a graph of another shape": graph(deeper),
    "a graph that says nothing": graph(lambda read: read.ClearField("metadata_props")),
    "a graph that cannot be opened": graph(lambda read: read.graph.node.pop(3)),
}


@pytest.mark.parametrize("what", list(SPOILED))
def test_a_spoiled_folder_is_refused(what: str, plain: Path, tmp_path: Path) -> None:
    folder = copied(plain, tmp_path)
    (folder / "other.bin").write_bytes((folder / "weights.bin").read_bytes())
    SPOILED[what](folder)
    with pytest.raises(EngineFolderError, match="export it again"):
        OnnxEngine(folder, threads=1)


def test_what_is_not_spoiled_opens(plain: Path, tmp_path: Path) -> None:
    folder = copied(plain, tmp_path)
    graph(lambda read: read.graph.ClearField("doc_string"))(folder)
    OnnxEngine(folder, threads=1)


FORGED: dict[str, tuple[Spoil, type[Exception], str]] = {
    "says float32": (facts(quantized=False), EngineFolderError, "quantized"),
    "no gate": (facts(gate=None), NotAdmitted, "has not passed"),
    "passed is no number": (gate(passed=True), EngineFolderError, "passed"),
    "poor order": (gate(kendall=0.89, min_kendall=0.0), NotAdmitted, "Kendall.*at least 0.9000"),
    "poorer than demanded": (gate(kendall=0.94), NotAdmitted, "Kendall.*at least 0.9500"),
    "no number": (gate(kendall=float("nan")), NotAdmitted, "Kendall"),
    "poor overlap": (gate(overlap=0.79, min_overlap=0.0), NotAdmitted, "overlap.*at least 0.8000"),
    "far apart": (gate(apart=0.21, max_apart=1.0), NotAdmitted, "at most 0.2000"),
    "on little": (gate(items=199), NotAdmitted, "at least 200"),
    "words for numbers": (gate(items="many"), EngineFolderError, "record"),
    "other files": (gate(files={}), NotAdmitted, "other files"),
    "another original": (gate(revision="0" * 64), NotAdmitted, "another original"),
}


@pytest.mark.parametrize("what", list(FORGED))
def test_an_edited_record_opens_nothing(what: str, admitted: Path, tmp_path: Path) -> None:
    spoil, error, message = FORGED[what]
    folder = copied(admitted, tmp_path)
    OnnxEngine(folder, threads=1)
    spoil(folder)
    with pytest.raises(error, match=message):
        OnnxEngine(folder, threads=1)


def test_int8_is_refused_until_the_gate_has_passed(untried: Path, original: Engine, tmp_path: Path) -> None:
    folder = copied(untried, tmp_path)
    with pytest.raises(NotAdmitted, match="has not passed"):
        OnnxEngine(folder)
    candidate = trial(folder)
    with pytest.raises(NotAdmitted, match="Kendall"):
        quality_gate(original, candidate, ASKED, min_kendall=0.999)
    with pytest.raises(NotAdmitted, match=r"at least 0\.9990"):
        OnnxEngine(folder)
    record = honest_gate(original, candidate, ASKED, pairs=[(0, 1), (0, 2)])
    assert (record.requests, record.items, record.top) == (6, 240, 10)
    assert 0.95 < record.kendall < 1 and 0.9 <= record.overlap <= 1 and 0 < record.apart < 0.1
    opened = OnnxEngine(folder, threads=1)
    assert opened.facts.gate == record
    np.testing.assert_array_equal(opened.score(ASKED[:1])[0], candidate.score(ASKED[:1])[0])


def test_lax_bounds_admit_nothing_worse_than_the_floor(tmp_path: Path) -> None:
    """One input of every product is a thousand times smaller and its weights larger: the same model, but not in int8."""
    model = made()
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            layer.input_layernorm.weight[0] /= 1000
            layer.post_attention_layernorm.weight[0] /= 1000
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                part.weight[:, 0] *= 1000
    export_engine(model, LABELS, tmp_path, quantize=True)
    with pytest.raises(NotAdmitted, match=r"at least 0\.9000"):
        quality_gate(Engine(model, LABELS), trial(tmp_path), ASKED, min_kendall=-9, min_overlap=0, max_apart=1)
    with pytest.raises(NotAdmitted, match=r"at least 0\.9000"):
        OnnxEngine(tmp_path)


def test_only_the_exported_weights_are_a_reference(plain: Path, untried: Path, original: Engine) -> None:
    candidate, before = trial(untried), (untried / "engine.json").read_bytes()
    for reference in (candidate, trial(untried), OnnxEngine(plain, threads=1)):
        with pytest.raises(NotAdmitted, match="torch engine"):
            quality_gate(reference, candidate, ASKED)  # type: ignore[arg-type]
    with pytest.raises(NotAdmitted, match="was exported from"):
        quality_gate(Engine(made(1), LABELS), candidate, ASKED)
    with pytest.raises(LabelError, match="the candidate"):
        quality_gate(Engine(original.model, (5, 9)), candidate, ASKED)
    with pytest.raises(LabelError, match="columns"):
        quality_gate(original, candidate, ASKED, pairs=[(0, 3)])
    assert (untried / "engine.json").read_bytes() == before


def test_the_gate_knows_when_there_is_too_little_to_compare(plain: Path, original: Engine, tmp_path: Path) -> None:
    candidate = trial(copied(plain, tmp_path))
    tied = Request([1, 2], [[3, 4]] * 300)
    for asked, top in (([], 10), (ASKED[:4], 10), (ASKED[:1] * 9, 10), ([tied], 10), ([request(1, n) for n in range(300)], 1)):
        with pytest.raises(NotAdmitted, match="200 items"):
            quality_gate(original, candidate, asked, top=top)
    with pytest.raises(NotAdmitted, match="top 0"):
        quality_gate(original, candidate, ASKED, top=0)
    with pytest.raises(NotAdmitted, match="200 items"):
        quality_gate(original, candidate, ASKED, pairs=[(0, 1), (2, 2)])


def test_short_requests_get_a_smaller_top(plain: Path, original: Engine, tmp_path: Path) -> None:
    record = quality_gate(original, trial(copied(plain, tmp_path)), [*(request(7, seed) for seed in range(40)), ASKED[0]])
    assert (record.top, record.requests, record.items) == (3, 41, 320)
    assert record.kendall > 0.999 and record.overlap > 0.99 and record.apart < 1e-5
