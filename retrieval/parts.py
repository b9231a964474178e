"""The parts of a snapshot that hold words: Arrow's file format, one record batch, facts about itself in the schema.

Opening a part maps its file and reads nothing but the schema. The same content gives the same bytes. Nothing is pickled, and
nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from index.errors import BrewlineError

FORMAT = 1


class CatalogError(BrewlineError):
    """A part is missing, damaged, of another format, or (tokens) of another ranker."""


def part_bytes(batch: pa.RecordBatch, part: str, facts: Mapping[str, object]) -> bytes:
    """The bytes of a part that says its name, its format and these facts about itself."""
    told = json.dumps({"part": part, "format": FORMAT, **facts}, sort_keys=True)
    schema = batch.schema.with_metadata({"brewline": told})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    return bytes(sink.getvalue().to_pybytes())


def map_part(path: Path) -> pa.RecordBatch:
    """The record batch of a part's file, mapped. Raises CatalogError if the file is no part."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            raise CatalogError(f"{path.name} holds {reader.num_record_batches} record batches instead of 1")
        return reader.get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise CatalogError(f"{path.name} cannot be read ({error}); publish a new night or roll back") from error


def part_facts(batch: pa.RecordBatch, part: str, columns: Mapping[str, pa.DataType]) -> dict[str, object]:
    """What a part says about itself, once it is of this format and has these columns. Raises CatalogError."""
    try:
        found = json.loads((batch.schema.metadata or {}).get(b"brewline", b"{}"))
        kind = (found["part"], found["format"])
    except (ValueError, KeyError, TypeError):
        found, kind = {}, ("nothing", "unknown")
    if kind != (part, FORMAT):
        raise CatalogError(f"{part} says it is {kind[0]} of format {kind[1]}, expected format {FORMAT}; publish a new night")
    types = dict(zip(batch.schema.names, batch.schema.types))
    wrong = [name for name, kind in columns.items() if types.get(name) != kind]
    if wrong:
        raise CatalogError(f"{part} has no column {', '.join(wrong)} of the right type; publish a new night")
    return dict(found)
