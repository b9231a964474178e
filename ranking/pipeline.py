"""The product in four lines: describe the member, retrieve candidates, score them, put them in order.

The service and the offline evaluation call the same functions, so what is measured at night is what is served by day. A
stopwatch is an argument; lateness is decided here, before work is done in vain, and said openly in the answer.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from ranking.fusion_features import asked_of
from ranking.pace import Pace, Watch, unwatched
from ranking.prompts import relations_of
from ranking.tasks import task_named
from ranking.tasks_weighted import Weights, final_score, weights_of
from ranking.wishes import Final, Obeyed, Topics, obey, topics_of
from retrieval.attributes import EVERYTHING, Wanted
from retrieval.data.schema import MemberView
from retrieval.retrieve import Candidates, Retriever, Vector, distinct, seen_items

if TYPE_CHECKING:
    from ranking.ranker import Ranker

FANOUT = 2_000
Floats = npt.NDArray[np.float32]


class NoRanker(BrewlineError):
    """Ranking was asked for, but only the first stage is loaded."""


class BadScores(BrewlineError):
    """The ranker returned something that is not a probability for each candidate."""


class OtherCosines(BrewlineError):
    """The ranker's head weighs cosines of one encoder, and the first stage has those of another, or of shorter vectors."""


class Degraded(enum.IntEnum):
    """Why an answer is less than it should be; numbered as in the contract."""

    NONE = 0
    RETRIEVAL_ORDER = 1
    STALE_MEMBER = 2
    FEWER_CANDIDATES = 3


@dataclass(frozen=True)
class Ranked:
    """K items, best first: `ids` [K], `rows` int64 [K], `places` int64 [K] in retrieval order (0 = first), `scores` float32 [K]
    of the first stage, `probabilities` float32 [K] or None if nothing was ranked, out of `candidates`. Where several tasks were
    weighed or `wishes` obeyed, `probabilities` is the final score; `columns` holds those of each task, float32 [K]."""

    ids: list[str]
    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    scores: Floats | None
    probabilities: Floats | None
    candidates: int
    degraded: Degraded = Degraded.NONE
    detail: str = ""
    columns: Mapping[str, Floats] = field(default_factory=dict)
    wishes: Sequence[Obeyed] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Recommender:
    """Two stages of the same night. Without a ranker only `retrieve` answers. Not safe for concurrent calls.

    Raises OtherCosines where the ranker's head would read cosines of a scale that it was not fitted for.
    """

    retriever: Retriever
    ranker: Ranker | None = None
    pace: Pace = field(default_factory=Pace)
    reply_s: float = 0.01
    """Seconds kept back from a deadline for the way home."""

    def __post_init__(self) -> None:
        if self.ranker is None or self.ranker.head is None or not self.ranker.head.reads_cosine:
            return
        known, found = self.ranker.facts.encoder, self.retriever.encoder.fingerprint
        if known not in (None, found):
            raise OtherCosines(
                f"the ranker's head weighs cosines of encoder {known}, and this night's vectors are of {found} (a number at the "
                "end: cut to that many dims). Publish a night of whole vectors, or train the ranker with --no-fusion"
            )

    def recommend(
        self,
        view: MemberView,
        k: int,
        fanout: int = FANOUT,
        *,
        exclude: Collection[str] = (),
        task: str = "",
        weights: Weights | None = None,
        vector: Vector | None = None,
        wanted: Wanted = EVERYTHING,
        deadline: float = math.inf,
        watch: Watch = unwatched,
        early: Callable[[Ranked], None] | None = None,
    ) -> Ranked:
        """The `k` best items for a member out of `fanout` candidates, by falling probability, or final score where `weights` name
        several tasks.

        Only `wanted` items come back, neither `exclude` nor the history. `vector` is the member's, if known. If ranking
        would end after `deadline` (`time.monotonic()`), the answer is in retrieval order and says so. `early` is given
        that answer as soon as it exists, for a caller who can no longer wait. Raises NoRanker, TaskError, UnknownAttribute.
        """
        asked = self.weighed(task, weights)
        vector = self.describe(view, vector, watch=watch)
        candidates = self.retrieve(view, fanout, exclude=exclude, vector=vector, wanted=wanted, watch=watch)
        if early is not None:
            early(in_retrieval_order(candidates, k, "ranking was still running when the deadline came"))
        late = self._too_late(len(candidates), len(asked), deadline)
        if late:
            return in_retrieval_order(candidates, k, late)
        columns = self.columns(view, candidates.rows, asked, vector=vector, watch=watch)
        with watch("order"):
            return order(candidates, columns, self.final(view, candidates.rows, columns, asked), k)

    def retrieve(
        self,
        view: MemberView,
        k: int,
        *,
        exclude: Collection[str] = (),
        vector: Vector | None = None,
        wanted: Wanted = EVERYTHING,
        watch: Watch = unwatched,
    ) -> Candidates:
        """The `k` best `wanted` items of the first stage that the member has not seen and that are not excluded, best first.

        A known `vector` spares the encoder; a hybrid first stage reads the view all the same. Raises UnknownAttribute.
        """
        vector = self.describe(view, vector, watch=watch)
        with watch("search"):
            return self.retriever.retrieve(vector, k, distinct(list(exclude), seen_items(view)), view, wanted)

    def describe(self, view: MemberView, vector: Vector | None = None, *, watch: Watch = unwatched) -> Vector:
        """The member's vector float32 [D]: the one given, if any."""
        with watch("encode"):
            return self.retriever.describe(view) if vector is None else vector

    def score(
        self,
        view: MemberView,
        rows: npt.NDArray[np.int64],
        task: str = "",
        *,
        vector: Vector | None = None,
        watch: Watch = unwatched,
    ) -> Floats:
        """The probability float32 [C] of the task's positive answer for each row of the catalogue.

        Where numbers join the ranker's words, the member's `vector` gives one of them, made here if unknown. Raises BadScores.
        """
        ranker, task = self.known_ranker, self.task(task)
        if not len(rows):
            return np.zeros(0, np.float32)
        head = ranker.head if ranker.fuses(task) else None
        if head is not None and head.reads_cosine:
            vector = self.describe(view, vector, watch=watch)
        started = time.monotonic()
        with watch("rank"):
            catalog = self.retriever.catalog
            tokens = [row.tolist() for row in catalog.tokens(rows)]
            relations = relations_of(view.connections, catalog.words("creator", rows)) if view.connections else None
            numbers = None
            if head is not None:
                cosine = self.retriever.cosines(vector, rows) if vector is not None and head.reads_cosine else None
                numbers = asked_of(view, catalog, rows, head.static, cosine)
            probabilities = ranker.score(view, tokens, task, relations, numbers)
        now = time.monotonic()
        self.pace.record(len(rows), now - started, now)
        if probabilities.shape != (len(rows),) or not np.all((probabilities >= 0) & (probabilities <= 1)):
            raise BadScores(f"the ranker returned no probability for some of {len(rows):,} candidates; check the model folder")
        return probabilities.astype(np.float32, copy=False)

    def columns(
        self,
        view: MemberView,
        rows: npt.NDArray[np.int64],
        tasks: Iterable[str],
        *,
        vector: Vector | None = None,
        watch: Watch = unwatched,
    ) -> dict[str, Floats]:
        """The probabilities [C] of each task, as `score` gives them: a prefix begins with its task, so none is shared."""
        return {name: self.score(view, rows, name, vector=vector, watch=watch) for name in tasks}

    def final(
        self,
        view: MemberView,
        rows: npt.NDArray[np.int64],
        columns: Mapping[str, Floats],
        weights: Weights,
        known: Topics = frozenset(),
    ) -> Final:
        """The final score of rows of the catalogue as the member's own instruction moves it (`ranking.wishes`); topics `known`
        beside those of the rows are understood, too."""
        own = final_score(columns, weights)
        if not view.instruction.strip() or not len(rows):
            return Final(own, own)
        bottom = -1.0 if any(weight < 0 for weight in weights.values()) else 0.0
        return Final(own, *obey(view.instruction, own, self.topics(rows), bottom, known))

    def topics(self, rows: npt.NDArray[np.int64]) -> list[Topics]:
        """The topics of rows that a wish can be about."""
        catalog = self.retriever.catalog
        return list(map(topics_of, catalog.words("category", rows), catalog.words("creator", rows)))

    def weighed(self, task: str = "", weights: Weights | None = None) -> dict[str, float]:
        """What is ranked for: the tasks of the weights, or the one task with the weight 1 ("" is the ranker's first).

        Raises NoRanker, TaskError, WeightsError.
        """
        if not weights:
            return {self.task(task): 1.0}
        return weights_of(list(weights.items()), self.known_ranker.tasks, task)

    def task(self, wanted: str) -> str:
        """The task to rank for; "" is the ranker's first. Raises NoRanker, TaskError."""
        return task_named(self.known_ranker.tasks, wanted).name

    @property
    def known_ranker(self) -> Ranker:
        """The ranker. Raises NoRanker if there is none."""
        if self.ranker is None:
            raise NoRanker("no ranker is loaded; start with --ranker DIR, or ask for retrieval only")
        return self.ranker

    def _too_late(self, candidates: int, tasks: int, deadline: float) -> str:
        now = time.monotonic()
        left, needed = deadline - now - self.reply_s, tasks * self.pace.forecast(candidates, now)
        if needed <= left:
            return ""
        return (
            f"ranking {candidates:,} candidates takes about {needed * 1e3:,.0f} ms and {max(left, 0) * 1e3:,.0f} ms were left; "
            "give more time or a smaller fanout"
        )


def order(candidates: Candidates, columns: Mapping[str, Floats], final: Final, k: int) -> Ranked:
    """The `k` candidates with the highest final score; equal ones keep retrieval order."""
    best = final.best[:k]
    return Ranked(
        [candidates.ids[place] for place in best],
        candidates.rows[best],
        best,
        candidates.scores[best],
        final.scores[best],
        len(candidates),
        columns={name: column[best] for name, column in columns.items()},
        wishes=final.wishes,
    )


def in_retrieval_order(candidates: Candidates, k: int, detail: str = "") -> Ranked:
    """The first `k` candidates without probabilities; degraded if a detail says why."""
    return Ranked(
        candidates.ids[:k],
        candidates.rows[:k],
        np.arange(min(k, len(candidates))),
        candidates.scores[:k],
        None,
        len(candidates),
        Degraded.RETRIEVAL_ORDER if detail else Degraded.NONE,
        detail,
    )
