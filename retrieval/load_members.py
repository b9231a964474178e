"""Members as a night leaves them in the store: their records, and vectors of those that read differently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from retrieval.data.schema import Dataset
from retrieval.embed import Progress, Vectors
from retrieval.members import MemberStore
from retrieval.records import MemberRecord, Words, records_of, view_digest, view_of

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

MEMBER_BATCH = 256
GATE_QUERIES = 128


def load_members(
    dataset: Dataset, words: Words, encoder: Encoder, members: MemberStore, as_of: int, told: Progress
) -> tuple[int, int]:
    """Every member's record and vector are in the store; returns how many there are and how many were encoded.

    `words` are those of tonight's items: what the service will read.

    Between a batch's records and its vectors a server finds no vector for a changed record, and encodes the member itself.
    """
    done = encoded = 0
    for batch in _batches(records_of(dataset, as_of), MEMBER_BATCH):
        views = [view_of(record, words) for record in batch]
        digests = [view_digest(view) for view in views]
        vectors = members.vectors(batch, digests)
        new = [place for place, vector in enumerate(vectors) if vector is None or len(vector) != encoder.dims]
        if new:
            for place, vector in zip(new, encoder.members([views[place] for place in new])):
                vectors[place] = vector
        members.put(batch)
        members.put_vectors(batch, digests, np.stack([vector for vector in vectors if vector is not None]))
        done, encoded = done + len(batch), encoded + len(new)
        told("members", done, len(dataset.members))
    return done, encoded


def member_queries(dataset: Dataset, words: Words, encoder: Encoder, as_of: int) -> Vectors | None:
    """Vectors of some members with a history, to measure the index with what it will be asked; None if there are none."""
    active = (record for record in records_of(dataset, as_of) if record.history)
    views = [view_of(record, words) for record in islice(active, GATE_QUERIES)]
    return encoder.members(views) if views else None


def _batches(records: Iterable[MemberRecord], size: int) -> Iterator[list[MemberRecord]]:
    rest = iter(records)
    while batch := list(islice(rest, size)):
        yield batch
