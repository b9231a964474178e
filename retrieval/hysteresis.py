"""When a changed number is worth a new vector: the policy of a night, and the numbers that each vector was made with.

A prompt says a number by its bucket, so an item that was met once more, or is a day older, may read differently although hardly
anything changed. A night may let a number stray some buckets from the one that its item's vector was made with. The distance is
from that bucket, not from last night's, so small steps add up until they count; an item that is encoded again is written with all
of tonight's numbers as they are. Training always sees exact buckets: the policy decides only whether a row is left as it is.

  `embedded.arrow`  of a snapshot made under such a policy: the as-of numbers that each row's vector was made with. The catalogue
                    holds those of the night. Ranker, fused head and popularity list read the catalogue, and were trained on
                    exact numbers, which cost nothing to keep: only vectors are worth being a little old.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from index.snapshot import Snapshot
from retrieval.catalog import Catalog
from retrieval.features import MISSING, Quantizer
from retrieval.parts import CatalogError, map_part, part_bytes, part_facts

EMBEDDED_PART = "embedded.arrow"
FACT = "hysteresis"
"""Of a manifest: how many buckets a number may stray; absent where every change counted."""

Numbers = dict[str, npt.NDArray[np.float64]]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Hysteresis:
    """A number may be up to `buckets` buckets away from the one in its item's vector; 0: every change of a word counts.

    Between known and unknown there is no small step: that always counts.
    """

    buckets: int = 0

    def moved(self, quantizer: Quantizer, name: str, then: npt.NDArray[np.float64], now: npt.NDArray[np.float64]) -> Mask:
        """Bool [n]: which values of a field went too far between `then` and `now`, each float [n]."""
        if quantizer.kind == "raw" and not self.buckets:  # the words are the digits themselves
            return ~((then == now) | (np.isnan(then) & np.isnan(now)))
        before, after = quantizer.bucket(name, then), quantizer.bucket(name, now)
        return ((before == MISSING) != (after == MISSING)) | (np.abs(after - before) > self.buckets)

    def any_moved(
        self,
        quantizer: Quantizer,
        then: Mapping[str, npt.NDArray[np.float64]],
        now: Mapping[str, npt.NDArray[np.float64]],
        n: int,
    ) -> Mask:
        """Bool [n]: the items of which any number that prompts show went too far. Both hold the same names."""
        found = np.zeros(n, bool)
        for name in quantizer.names:
            if name in now:
                found |= self.moved(quantizer, name, then[name], now[name])
        return found

    def facts(self) -> dict[str, str]:
        """What a manifest says of the policy."""
        return {FACT: str(self.buckets)} if self.buckets else {}


EXACT = Hysteresis()


def write_embedded(numbers: Numbers) -> bytes:
    """The bytes of `embedded.arrow`: name -> float64 [N], in the rows' order."""
    columns = {name: pa.array(column, pa.float64()) for name, column in numbers.items()}
    return part_bytes(pa.record_batch(columns), EMBEDDED_PART, {})


def embedded_numbers(snapshot: Snapshot, catalog: Catalog) -> Numbers:
    """Name -> float64 [N]: the as-of numbers that each vector of a snapshot was made with. Raises CatalogError.

    Where every change counted these read as the catalogue's do, and the snapshot has no part of its own.
    """
    if EMBEDDED_PART not in snapshot.parts:
        return catalog.columns.numbers
    batch = map_part(snapshot.part(EMBEDDED_PART))
    part_facts(batch, EMBEDDED_PART, dict.fromkeys(catalog.as_of_names, pa.float64()))
    if batch.num_rows != len(catalog):
        raise CatalogError(f"{EMBEDDED_PART} holds {batch.num_rows:,} rows for {len(catalog):,} items; publish a new night")
    return {name: batch.column(name).to_numpy() for name in catalog.as_of_names}
