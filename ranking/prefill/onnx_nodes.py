"""ONNX nodes laid down one by one, over weights that several graphs read from one file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ranking.prefill.onnx_folder import FLOATS, RESULT, WEIGHTS, Dimensions
from retrieval.export import ExportError

OPSET, IR = 18, 9
PAGE = 4096
STEPS = 64
"""Largest int8 weight. Seven bits, because without VNNI the products of two pairs are summed in 16 bits, which eight overflow."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the weights file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    length: int


class Store:
    """Tensors by name in one file, each from the beginning of a page; one is held in memory at a time."""

    def __init__(self, file: BinaryIO, quantize: bool) -> None:
        self.places: dict[str, Place] = {}
        self._file, self._quantize = file, quantize

    def put(self, name: str, values: np.ndarray) -> None:
        """The tensor is in the file under a name."""
        self._file.write(bytes(-self._file.tell() % PAGE))
        content = np.ascontiguousarray(values)
        self.places[name] = Place(str(content.dtype), content.shape, self._file.tell(), content.nbytes)
        self._file.write(content.data)

    def linear(self, name: str, weight: np.ndarray) -> None:
        """A weight float32 [inputs, outputs] is in the file as it is, or as int8 with a scale for each output."""
        if self._quantize:
            scale = np.maximum(np.abs(weight).max(0) / np.float32(STEPS), np.finfo(np.float32).tiny)
            self.put(f"{name}.scale", scale)
            weight = np.rint(weight / scale).astype(np.int8)
        self.put(name, weight)


class Graph:
    """Nodes in order, the small constants among them, and the weights that they name."""

    def __init__(self, store: Store, name: str, signature: Mapping[str, Dimensions]) -> None:
        """`signature` input or RESULT -> dimensions, as `ranking.prefill.onnx_folder.EngineFacts.signature` gives them."""
        self.store, self.name, self.signature = store, name, signature
        self.nodes: list[tuple[str, list[str], list[str], Mapping[str, Any]]] = []
        self.constants: dict[str, np.ndarray] = {}

    def one(self, op: str, *inputs: str, attributes: Mapping[str, Any] | None = None) -> str:
        """The name of a new node's only result."""
        return self.many(op, inputs, 1, attributes)[0]

    def many(self, op: str, inputs: Sequence[str], results: int, attributes: Mapping[str, Any] | None = None) -> list[str]:
        """The names of a new node's results."""
        names = [f"{op}_{len(self.nodes)}_{number}" for number in range(results)]
        self.nodes.append((op, list(inputs), names, attributes or {}))
        return names

    def ints(self, *values: int) -> str:
        """The name of a constant vector int64."""
        return self.constant(np.array(values, np.int64))

    def constant(self, values: np.ndarray | np.generic) -> str:
        """The name of a constant; equal ones are one."""
        array = np.asarray(values)
        name = f"{array.dtype}{list(array.shape)}_{hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
        self.constants[name] = array
        return name

    def number(self, value: float) -> str:
        """The name of a constant scalar float32."""
        return self.constant(np.float32(value))

    def split(self, x: str, *sizes: int) -> list[str]:
        """Parts of the last axis."""
        return self.many("Split", (x, self.ints(*sizes)), len(sizes), {"axis": -1})

    def rows(self, x: str, numbers: str, axis: int = 0) -> str:
        """Rows of an axis; without that axis for a scalar."""
        return self.one("Gather", x, numbers, attributes={"axis": axis})

    def stack(self, *parts: str, axis: int = 0) -> str:
        """Parts one after another."""
        return self.one("Concat", *parts, attributes={"axis": axis})

    def turned(self, x: str, *order: int) -> str:
        """Axes in another order."""
        return self.one("Transpose", x, attributes={"perm": order})

    def linear(self, x: str, name: str) -> str:
        """x @ weight + bias. In int8 the rows of the pass share one scale and zero point, taken from their extremes."""
        if f"{name}.scale" in self.store.places:
            rows, scale, zero = self.many("DynamicQuantizeLinear", (x,), 3)
            counts = self.one("Cast", self.one("MatMulInteger", rows, name, zero), attributes={"to": 1})
            y = self.one("Mul", counts, self.one("Mul", scale, f"{name}.scale"))
        else:
            y = self.one("MatMul", x, name)
        return self.one("Add", y, f"{name}.bias") if f"{name}.bias" in self.store.places else y

    def norm(self, x: str, gain: str, epsilon: float) -> str:
        """RMSNorm over the last axis, in the form that onnxruntime fuses."""
        squares = self.one("ReduceMean", self.one("Pow", x, self.number(2)), self.ints(-1), attributes={"keepdims": 1})
        root = self.one("Sqrt", self.one("Add", squares, self.number(epsilon)))
        return self.one("Mul", self.one("Div", x, root), gain)

    def end(self, op: str, *inputs: str) -> None:
        """A last node gives the graph's result."""
        self.nodes.append((op, list(inputs), [RESULT], {}))


def save(graph: Graph, path: Path, metadata: Mapping[str, str]) -> None:
    """The graph is a file beside the weights file that it names, with entries of metadata.

    Raises ExportError if the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError(f"exporting needs the package onnx ({error}); pip install 'brewline[dev]'") from error
    helper = onnx.helper
    kinds = onnx.TensorProto
    used = {name for _, inputs, _, _ in graph.nodes for name in inputs}
    tensors = [onnx.numpy_helper.from_array(values, name) for name, values in graph.constants.items()]
    for name, place in graph.store.places.items():
        if name in used:
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(place.kind))
            tensor = kinds(name=name, data_type=kind, dims=place.shape, data_location=kinds.EXTERNAL)
            for key, value in (("location", WEIGHTS), ("offset", place.offset), ("length", place.length)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
    ports = {
        name: helper.make_tensor_value_info(name, kinds.FLOAT if name in FLOATS else kinds.INT64, dimensions)
        for name, dimensions in graph.signature.items()
    }
    result = ports.pop(RESULT)
    nodes = [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in graph.nodes]
    made = helper.make_graph(nodes, graph.name, [*ports.values()], [result], tensors)
    model = helper.make_model(made, ir_version=IR, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="brewline")
    helper.set_model_props(model, dict(metadata))
    path.write_bytes(model.SerializeToString())
