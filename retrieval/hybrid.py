"""The hybrid first stage: beside the dense list one of words and one of what is popular now, merged by their places.

The dense list alone stays what the service answers unless it is told otherwise, and every report keeps the two apart. A night
that is asked to writes the lexical index, the popularity list and the settings into its snapshot; the service and the offline
evaluation call the same `Hybrid.merge`, so what is measured is what is served. No torch here.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from index.fusion import fuse
from index.snapshot import Snapshot
from retrieval.data.schema import IMPRESSION, MemberView
from retrieval.lexical import Lexical
from retrieval.popular import Popular
from retrieval.terms import read_fields, words_of

FACT = "hybrid"
"""Name of the settings among a manifest's further facts."""
LISTED = 2_000
"""How deep each list is read at least: up to so many items, a short answer is the head of a long one."""

Rows = npt.NDArray[np.int64]


class HybridError(BrewlineError):
    """The hybrid first stage cannot answer: a snapshot without its parts, or settings that mean nothing."""


@dataclass(frozen=True)
class HybridSettings:
    """How the lists are merged: index.fusion with these weights and this constant; 0 leaves a list out.

    The dense list weighs as much as the two others together: no item of one of them alone can pass what the dense list has
    first, one that heads both can draw level. `constant` is the published 60. The words of the `newest` items of the history
    are the lexical query.
    """

    dense: float = 1.0
    lexical: float = 0.5
    popular: float = 0.5
    constant: float = 60.0
    newest: int = 5

    def __post_init__(self) -> None:
        weights, others = (self.dense, self.lexical, self.popular), self.lexical + self.popular
        good = all(0 <= weight < np.inf for weight in weights) and self.dense > 0 and others > 0
        if not (good and 0 < self.constant < np.inf and self.newest > 0):
            raise HybridError(
                f"{self} cannot merge lists: expected a weight above 0 for the dense list and for one more at least, "
                "a constant above 0 and at least 1 item of the history"
            )

    @classmethod
    def parse(cls, weights: str) -> HybridSettings:
        """The settings with the weights of text like "1,0.5,0.5" (dense, lexical, popular). Raises HybridError."""
        try:
            dense, lexical, popular = map(float, weights.split(","))
        except ValueError:
            raise HybridError(
                f"hybrid weights {weights!r}: expected three numbers (dense, lexical, popular), as in 1,0.5,0.5"
            ) from None
        return cls(dense, lexical, popular)

    def fact(self) -> str:
        """The settings as a snapshot's manifest states them."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Hybrid:
    """The two lists beside the dense one, of the same night and catalogue, and how they are merged."""

    lexical: Lexical
    popular: Popular
    settings: HybridSettings

    @classmethod
    def open(cls, snapshot: Snapshot) -> Hybrid:
        """The hybrid of a snapshot with the settings that it states. Raises HybridError if it was written without."""
        stated = snapshot.manifest.extra.get(FACT)
        if stated is None:
            raise HybridError(
                f"snapshot {snapshot.name} has no lexical index and no popularity list: "
                "run `brewline nightly` with --hybrid, or serve the dense first stage"
            )
        try:
            settings = HybridSettings(**json.loads(stated))
        except (ValueError, TypeError) as error:
            raise HybridError(
                f"snapshot {snapshot.name} states hybrid settings {stated!r}, which this version cannot read"
            ) from error
        return cls(Lexical.open(snapshot), Popular.open(snapshot), settings)

    def merge(self, dense: Rows, view: MemberView, excluded: Rows, k: int) -> tuple[Rows, npt.NDArray[np.float32]]:
        """The `k` best rows of the three lists and their merged scores, best first; none of `excluded`.

        `dense` is the dense list without the excluded rows, at least max(k, `LISTED`) long where so many are left: as long as it
        is not short, the answer is not.
        """
        used = self.lists(dense, view, excluded, k)
        return fuse([rows for _, rows, _ in used], [weight for _, _, weight in used], self.settings.constant, k)

    def lists(self, dense: Rows, view: MemberView, excluded: Rows, k: int) -> list[tuple[str, Rows, float]]:
        """Name, rows and weight of each list that an answer of `k` is merged from (`merge`); one without weight is left out."""
        depth = max(k, LISTED)
        query = query_words(view, self.settings.newest)
        held = [
            ("dense", dense[:depth], self.settings.dense),
            ("lexical", self.lexical.find(query, depth, excluded), self.settings.lexical),
            ("popular", self.popular.find(depth, excluded), self.settings.popular),
        ]
        return [one for one in held if one[2]]


def query_words(view: MemberView, newest: int) -> Counter[str]:
    """The words of the newest items that a member engaged with, of the profile and of the member's own wish: word -> times."""
    done = [one.item for one in view.history if one.action != IMPRESSION][-newest:]
    texts = [read_fields((item.title, item.text, item.category, item.creator)) for item in done]
    texts += [read_fields(view.member.profile.values()), read_fields([view.instruction])]
    return Counter(word for text in texts for word in words_of(text))
