"""An encoder folder as a vector model: its nightly rebuild, replayed for each day of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retrieval.counts import Counts
from retrieval.data.schema import Dataset, MemberView
from retrieval.encoder import Encoder, row_digest
from retrieval.evidence.baselines import Knowledge
from retrieval.evidence.rank import Floats, Progress
from retrieval.hysteresis import EXACT, Numbers


class _Read(NamedTuple):
    """A night: the as-of numbers [N] by name, and of each item the digest of its prompt and the vector [N, D]."""

    numbers: Numbers
    digests: np.ndarray
    vectors: Floats


class EncoderModel:
    """Item vectors as of a moment, members as of their query. Of each night only items whose prompt changed are encoded.

    `frozen`: the counts know nothing at or after the test cut, whatever moment is asked for.
    """

    name = "Dual encoder"

    def __init__(self, encoder: Encoder, dataset: Dataset, counts: Knowledge, cut: int, progress: Progress | None = None) -> None:
        self.encoder = encoder
        self.counts = Counts.from_dataset(dataset, before=cut if counts == "frozen" else None)
        self.records = [dataset.items[row] for row in range(len(dataset.items))]
        self.progress = progress
        self.encoded = 0
        self._read: _Read | None = None

    def item_vectors(self, day_start: int) -> Floats:
        """Float32 [N, D]; also counts in `encoded` how many prompts had to be read.

        An item whose numbers stand in the buckets of the night before is not even written again: its prompt is the same.
        """
        writer, numbers = self.encoder.writer, self.counts.as_of(day_start)
        last, n = self._read, len(self.records)
        moved = np.ones(n, bool) if last is None else EXACT.any_moved(writer.quantizer, last.numbers, numbers, n)
        changed = np.flatnonzero(moved)
        rows = writer.items([self.records[row] for row in changed.tolist()], {key: of[changed] for key, of in numbers.items()})
        digests = np.full(n, "", object) if last is None else last.digests.copy()
        digests[changed] = [row_digest(row) for row in rows]
        known = {} if last is None else dict(zip(last.digests, last.vectors))
        first = {digest: place for place, digest in enumerate(digests[changed]) if digest not in known}
        if first:
            fresh = self.encoder.embed([rows[place] for place in first.values()], self.progress)
            known.update(zip(first, fresh))
            self.encoded += len(first)
        self._read = _Read(numbers, digests, np.stack([known[digest] for digest in digests]))
        return self._read.vectors

    def member_vectors(self, views: Sequence[MemberView]) -> Floats:
        """Float32 [B, D]."""
        return self.encoder.members(views)
