"""The folder of an exported engine: what its facts say, and when they are believed. No torch.

`engine.json` is for people and for the gate; whatever decides how scores are read stands a second time in the metadata of both
graphs, whose hashes the facts name, and the two must agree. The graphs that onnxruntime opens are the very bytes that were
hashed. `weights.bin` is not: onnxruntime maps it by its path once it was hashed, so that it is held in memory once; whoever can
exchange a file of the folder between the two can exchange the weights. Nothing here is signed: the folder is checked against
damage, mix-ups and hand editing, not against somebody who rewrites all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from index.durable import sha256_of
from index.errors import BrewlineError
from ranking.prefill.errors import LabelError
from ranking.prefill.request import check_labels

FORMAT = 2
FACTS, WEIGHTS = "engine.json", "weights.bin"
PREFIX, ITEMS = GRAPHS = ("prefix.onnx", "items.onnx")
RESULT = "result"
FLOATS = frozenset(("past", RESULT))
"""Inputs and outputs of the graphs that are float32; the others are int64."""
DESCRIBED = "brewline"
"""The graphs' metadata entry that repeats the facts."""
LEAST_KENDALL, LEAST_OVERLAP, MOST_APART, LEAST_ITEMS = 0.9, 0.8, 0.2, 200
"""No gate admits what is worse, or was measured on less, whatever its caller demanded."""

_RECORDED = {"int": int, "float": float, "str": str, "Mapping[str, str]": dict}
"""What a field of GateRecord is once it was JSON."""

Dimensions = list[str | int]


class EngineFolderError(BrewlineError):
    """A folder is not a complete exported engine of this version."""


class NotAdmitted(BrewlineError):
    """A quantized engine has not passed the gate that compares it with its original."""


@dataclass(frozen=True)
class GateRecord:
    """What one `quality_gate` measured, on which files, and what its caller demanded.

    `revision` is of the reference's weights. Of several pairs of labels the worst numbers are recorded: `kendall` and `overlap`
    (of the first `top`) are means over a pair's requests, `apart` is the largest difference of a probability, `items` of the
    requests were told apart by the reference.
    """

    files: Mapping[str, str]
    revision: str
    requests: int
    items: int
    top: int
    kendall: float
    overlap: float
    apart: float
    min_kendall: float
    min_overlap: float
    max_apart: float


@dataclass(frozen=True)
class EngineFacts:
    """What `engine.json` says. `labels` token ids in the order of the logits; `revision` a sha256 of the exported weights;
    `files` name -> sha256; `gate` the last `quality_gate`, None before the first."""

    format: int
    labels: tuple[int, ...]
    layers: int
    heads: int
    kv_heads: int
    dims: int
    hidden: int
    vocabulary: int
    max_positions: int
    revision: str
    quantized: bool
    files: Mapping[str, str]
    gate: GateRecord | None

    def described(self) -> str:
        """What the graphs' metadata repeat: all but the files and the gate."""
        return json.dumps({part.name: getattr(self, part.name) for part in fields(self) if part.name not in ("files", "gate")})

    def signature(self, graph: str) -> dict[str, Dimensions]:
        """Dimensions of a graph's inputs and of RESULT, a name for a free one."""
        kept = [self.layers, 2, self.kv_heads, self.dims]
        if graph == PREFIX:
            return {"ids": ["t"], "positions": ["t"], "past": ["h", *kept], RESULT: ["t", *kept]}
        ports: dict[str, Dimensions] = {"ids": ["T"], "positions": ["T"], "items": ["T"], "past": ["P", *kept], "last": ["n"]}
        return {**ports, RESULT: ["n", len(self.labels)]}


def refusal(facts: EngineFacts) -> str | None:
    """Why an engine may not serve, judged by the recorded numbers alone; None if it may. In float32 it needs no gate."""
    gate = facts.gate
    if gate is None:
        return "it is quantized and has not passed quality_gate; run the gate on it" if facts.quantized else None
    if gate.files != facts.files or gate.revision != facts.revision:
        return "quality_gate measured other files than these, or another original; run the gate on it"
    kendall, overlap = max(LEAST_KENDALL, gate.min_kendall), max(LEAST_OVERLAP, gate.min_overlap)
    apart = min(MOST_APART, gate.max_apart)
    for good, what in (  # NaN passes none of them
        (gate.items >= LEAST_ITEMS and gate.top >= 1, f"{gate.items} items were compared (at least {LEAST_ITEMS})"),
        (kendall <= gate.kendall <= 1, f"Kendall's tau is {gate.kendall:.4f} (at least {kendall:.4f})"),
        (overlap <= gate.overlap <= 1, f"the overlap of the first {gate.top} is {gate.overlap:.4f} (at least {overlap:.4f})"),
        (0 <= gate.apart <= apart, f"a probability is {gate.apart:.4f} off (at most {apart:.4f})"),
    ):
        if not good:
            return f"it has not passed quality_gate: {what}"
    return None


def open_folder(folder: Path, threads: int) -> tuple[EngineFacts, list[Any]]:
    """The facts of an exported folder that is whole, and onnxruntime's sessions of GRAPHS. Raises EngineFolderError."""
    facts = read_facts(folder)
    try:
        graphs = {name: (folder / name).read_bytes() for name in GRAPHS}
        found = {name: hashlib.sha256(graph).hexdigest() for name, graph in graphs.items()}
        found[WEIGHTS] = sha256_of(folder / WEIGHTS)
    except OSError as error:
        raise EngineFolderError(f"{folder}: not a complete exported engine ({error}); export it again") from error
    for name, here in found.items():
        if here != facts.files.get(name):
            raise EngineFolderError(f"{folder / name}: sha256 {here}, {FACTS} says {facts.files.get(name)}; export it again")
    return facts, [_opened(folder / name, graph, facts, threads) for name, graph in graphs.items()]


def read_facts(folder: Path) -> EngineFacts:
    """What `engine.json` says, if it makes sense by itself. Raises EngineFolderError."""
    path = folder / FACTS
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, this version reads {FORMAT}")
        return _sensible(EngineFacts(**{part.name: found[part.name] for part in fields(EngineFacts)}), found["gate"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, LabelError) as error:
        raise EngineFolderError(
            f"{path}: not the facts of an exported engine ({type(error).__name__}: {error}); export it again"
        ) from error


def _sensible(facts: EngineFacts, gate: Any) -> EngineFacts:
    """The facts with their parts in the types that they promise; raises whatever does not fit."""
    sizes = (facts.layers, facts.heads, facts.kv_heads, facts.dims, facts.hidden, facts.vocabulary, facts.max_positions)
    if not all(type(size) is int and size > 0 for size in sizes) or type(facts.quantized) is not bool:
        raise ValueError("a size is not a positive number, or it is not said whether it is quantized")
    if not all(type(label) is int for label in facts.labels):
        raise ValueError("the labels are not token ids")
    if not all(type(value) is str for value in (facts.revision, *facts.files.values())):
        raise ValueError("a hash is not a word")
    record = None if gate is None else GateRecord(**gate)
    if record and not all(type(getattr(record, part.name)) is _RECORDED[str(part.type)] for part in fields(record)):
        raise ValueError("the gate's record holds something else than its numbers")
    return replace(facts, labels=check_labels(facts.labels, facts.vocabulary), files=dict(facts.files), gate=record)


def _opened(path: Path, graph: bytes, facts: EngineFacts, threads: int) -> Any:
    _check_external(path, graph)
    session = _session(path, graph, threads)
    seen = session.get_modelmeta().custom_metadata_map.get(DESCRIBED)
    if seen != facts.described():
        raise EngineFolderError(f"{path}: it says {seen}, {FACTS} says {facts.described()}; export it again")
    expected = {name: _typed(name, size) for name, size in facts.signature(path.name).items()}
    ports = (*session.get_inputs(), *session.get_outputs())
    if (found := {port.name: (port.type, _sizes(port.shape)) for port in ports}) != expected:
        raise EngineFolderError(f"{path}: it takes and gives {found}, expected {expected}; export it again")
    return session


def _typed(name: str, dimensions: Dimensions) -> tuple[str, list[int | None]]:
    return f"tensor({'float' if name in FLOATS else 'int64'})", _sizes(dimensions)


def _sizes(dimensions: Dimensions) -> list[int | None]:
    return [size if isinstance(size, int) else None for size in dimensions]


def _session(path: Path, graph: bytes, threads: int) -> Any:
    # Read when onnxruntime is first imported: without it, it writes a device id and calls home from native code.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # a plan of memory is kept for every shape it has seen, and here nearly every shape is new
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class; the cause is kept
        version = onnxruntime.__version__
        raise EngineFolderError(f"{path}: onnxruntime {version} cannot open it ({error}); export it again") from error


def _check_external(path: Path, graph: bytes) -> None:
    """Raises EngineFolderError unless every tensor outside of a graph lies in WEIGHTS.

    Wherever a tensor stands, its file is named in an entry whose key "location" lies in one piece among the bytes. So if the
    initializers of the main graph hold as many such entries as the bytes hold the word, there is no other.
    """
    try:
        entries = [
            dict(_parts(entry)) for entry in _under(_under(_under([graph], 7), 5), 13)
        ]  # graph, initializer, external_data
    except (ValueError, IndexError) as error:
        raise EngineFolderError(f"{path}: not an ONNX graph ({error}); export it again") from error
    named = [entry.get(2, b"") for entry in entries if entry.get(1) == b"location"]
    if set(named) - {WEIGHTS.encode()} or graph.count(b"location") != len(named):
        raise EngineFolderError(f"{path}: it reads from other files than {WEIGHTS}; export it again")


def _under(messages: Iterable[bytes], number: int) -> Iterator[bytes]:
    return (content for message in messages for field, content in _parts(message) if field == number)


def _parts(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Field numbers and contents of a protobuf message's fields of variable length; raises ValueError and IndexError."""
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        kind, size = tag & 7, {0: 0, 1: 8, 5: 4}.get(tag & 7, -1)
        if kind in (0, 2):
            value, at = _number(message, at)
            size = value if kind == 2 else 0
        if size < 0 or tag >> 32 or at + size > len(message):
            raise ValueError(f"damaged at byte {at} of a part")
        if kind == 2:
            yield tag >> 3, message[at : at + size]
        at += size


def _number(message: bytes, at: int) -> tuple[int, int]:
    """A protobuf varint and the place after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number does not end")
