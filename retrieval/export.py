"""The query side for onnxruntime: id rows and lengths in, unit vectors out, the same numbers as the encoder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from index.errors import BrewlineError
from retrieval.encoder import Encoder, Vectors, encode
from retrieval.llama import pad_rows

PARITY_ROWS = 64


class ExportError(BrewlineError):
    """The export cannot be made or does not belong to the encoder."""


class _Query(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model, self.pooling = encoder.model, encoder.pooling

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return encode(self.model, ids, lengths, self.pooling)


def export_query(encoder: Encoder, path: Path) -> None:
    """Writes the encoder as one ONNX graph with free batch size and length; its metadata names the encoder's fingerprint.

    Raises ExportError if the exporter's packages (extra `dev`) are missing.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter needs it and says so less clearly
    except ImportError as error:
        raise ExportError(f"exporting needs the packages onnx and onnxscript ({error}); pip install 'brewline[dev]'") from error
    example = (torch.zeros(2, 8, dtype=torch.int64), torch.tensor([8, 5]))
    free = torch.export.Dim.DYNAMIC
    dynamic = ({0: free, 1: free}, {0: free})
    program = torch.onnx.export(
        _Query(encoder).eval(),
        example,
        dynamo=True,
        dynamic_shapes=dynamic,
        input_names=["ids", "lengths"],
        output_names=["vectors"],
        verbose=False,
    )
    if program is None:
        raise ExportError("torch.onnx.export returned no program; this torch lacks the dynamo exporter")
    model = program.model_proto
    onnx.helper.set_model_props(model, {"fingerprint": encoder.fingerprint})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))


class OnnxQuery:
    """The exported query side of one encoder, run by onnxruntime on CPU."""

    def __init__(self, path: Path, encoder: Encoder, threads: int = 0) -> None:
        """Raises ExportError if the file was exported from another encoder."""
        # Read when onnxruntime is first imported: without it, it writes a device id and calls home from native code.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        seen = self._session.get_modelmeta().custom_metadata_map.get("fingerprint")
        if seen != encoder.fingerprint:
            raise ExportError(f"{path} was exported from encoder {seen}, expected {encoder.fingerprint}; export it again")
        self._pad = encoder.writer.tokens.pad

    def embed(self, rows: list[list[int]]) -> Vectors:
        """Unit vectors [n, D] of id rows."""
        ids, lengths = pad_rows(rows, self._pad)
        if ids.shape[1] < 2:  # the graph was traced for at least two tokens
            ids = torch.nn.functional.pad(ids, (0, 2 - ids.shape[1]), value=self._pad)
        (vectors,) = self._session.run(None, {"ids": ids.numpy(), "lengths": lengths.numpy()})
        return np.asarray(vectors, np.float32)


def parity(encoder: Encoder, path: Path) -> float:
    """The largest absolute difference between the two runtimes' vectors over random id rows of mixed length."""
    rng = np.random.default_rng(0)
    vocabulary = len(encoder.writer.tokens)
    rows = [rng.integers(0, vocabulary, rng.integers(1, encoder.writer.budgets.member)).tolist() for _ in range(PARITY_ROWS)]
    return float(np.abs(OnnxQuery(path, encoder).embed(rows) - encoder.embed(rows)).max())
