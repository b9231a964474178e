"""Tonight's items as vectors: only those that read differently since yesterday are encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from index.codes import Codes
from index.manifest import Manifest
from retrieval.tonight import Tonight
from retrieval.yesterday import Opened

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

Vectors = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""(what is being done, done so far, of how many)"""
NOTHING: Mapping[str, tuple[str, Vectors]] = {}


@dataclass(frozen=True)
class Embedded:
    """Vectors float32 [N,D] and prompt digests [N] of a night's items; `count` of them were encoded anew."""

    vectors: Vectors
    digests: Sequence[str]
    count: int


def embed_changed(
    tonight: Tonight,
    encoder: Encoder,
    previous: Opened | None,
    told: Progress,
    codes: Codes = "float32",
    made: Mapping[str, tuple[str, Vectors]] = NOTHING,
) -> Embedded:
    """Tonight's items as vectors, before they are coded: yesterday's where the same encoder read the same prompt, else new.

    Yesterday's will do if they are whole or in tonight's codes: coding them once more gives what coding new ones would. So will
    those that this encoder `made` by day, item id -> (prompt digest, vector).
    """
    records = tonight.records()
    digests = encoder.item_digests(records, tonight.numbers)
    vectors = np.zeros((len(records), encoder.dims), np.float32)
    changed = np.ones(len(records), bool)
    if previous is not None and _usable(previous.snapshot.manifest, encoder.fingerprint, codes):
        rows = previous.catalog.rows(tonight.items.item_id)
        same = [row >= 0 and previous.catalog.digest(row) == digest for row, digest in zip(rows.tolist(), digests)]
        changed = ~np.array(same, bool)
        vectors[~changed] = previous.snapshot.vectors[rows[~changed]]
    for row in np.flatnonzero(changed).tolist() if made else ():
        digest, vector = made.get(tonight.items.item_id[row], ("", vectors[row]))
        if digest == digests[row] and len(vector) == encoder.dims:
            vectors[row], changed[row] = vector, False
    new = np.flatnonzero(changed)
    if len(new):
        numbers = {name: column[new] for name, column in tonight.numbers.items()}
        vectors[new] = encoder.items([records[row] for row in new], numbers, lambda done, of: told("items", done, of))
    return Embedded(vectors, digests, len(new))


def _usable(before: Manifest, fingerprint: str, codes: Codes) -> bool:
    return before.fingerprint == fingerprint and before.dtype in ("float32", codes)
