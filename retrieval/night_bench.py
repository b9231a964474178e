"""Nights measured: what a policy of hysteresis saves and costs over a fortnight, and what a night over few changes takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from index.publish import current
from index.snapshot import Snapshot
from retrieval.counts import Counts, appeared
from retrieval.data.schema import DAY, Dataset, Events, Items, Members, Meta
from retrieval.embed import embed_changed
from retrieval.encoder import Encoder, Vectors
from retrieval.evidence.forms import plain_lists
from retrieval.evidence.intervals import paired_differences
from retrieval.evidence.metrics import Values, per_query_values, target_places
from retrieval.evidence.protocol import EvidenceError, Queries, last_after_cut, member_views
from retrieval.evidence.rank import DEPTH, tie_order
from retrieval.hysteresis import EXACT, Hysteresis, Numbers
from retrieval.llama import Size
from retrieval.memory import freeze_loaded
from retrieval.moments import moment_words
from retrieval.packed_bench import made_encoder
from retrieval.records import NEWEST
from retrieval.refresh import nightly
from retrieval.tonight import Tonight

Progress = Callable[[int, int], None]
CUTOFFS = (10, 100, 2000)
FIRST_DAY = 20_000
"""The day before the nights of an invented catalogue, in days since 1970."""
FITTED = 2_000
"""Items of another such catalogue, from which tokenizer and quantizer are made."""
SMALL = Size(hidden=64, layers=1, heads=2, kv_heads=1, mlp=128, vocabulary=8_192)
WORDS, PEOPLE = 4_000, 1_000
SYLLABLES = [first + second for first in "bdklmnprst" for second in "ao"]


@dataclass
class Replayed:
    """The item vectors of one policy, night after night: `shares` of the items that existed were encoded, in `seconds`.

    `vectors` float32 [N,D] and `numbers` are what the last night left; items that do not exist yet have those of the first.
    """

    policy: Hysteresis
    vectors: Vectors
    numbers: Numbers
    shares: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    recall: list[dict[str, Values]] = field(default_factory=list)

    def night(
        self, encoder: Encoder, dataset: Dataset, now: Numbers, there: npt.NDArray[np.bool_], new: npt.NDArray[np.bool_]
    ) -> None:
        """The vectors are those of the night with these as-of numbers; `there` bool [N] exist, the `new` since last night."""
        start = time.perf_counter()
        far = self.policy.any_moved(encoder.writer.quantizer, self.numbers, now, len(there))
        rows = np.flatnonzero(there & (far | new))
        for name, column in self.numbers.items():
            column[rows] = now[name][rows]
        if len(rows):
            some = {name: column[rows] for name, column in now.items()}
            self.vectors[rows] = encoder.items([dataset.items[row] for row in rows.tolist()], some)
        self.seconds.append(time.perf_counter() - start)
        self.shares.append(len(rows) / max(int(there.sum()), 1))


def bench_fortnight(
    dataset: Dataset, encoder: Encoder, policies: Sequence[Hysteresis], nights: int, progress: Progress | None = None
) -> dict[str, object]:
    """Share of items encoded, seconds and recall of each policy over the first `nights` days of the test window.

    Each night knows what was known before its day; the members who come back on that day are asked as in
    `retrieval.evidence`, over the whole catalogue. Differences are those to exact buckets, paired over members.
    Raises EvidenceError if nobody comes back in these days.
    """
    queries = last_after_cut(dataset)
    first = queries.cut // DAY
    queries = queries.take(np.flatnonzero(queries.day < first + nights))
    if not len(queries):
        raise EvidenceError(f"nobody comes back in the {nights} days from {moment_words(queries.cut)}; replay more --nights")
    runs = _replay(dataset, encoder, queries, [EXACT, *(one for one in policies if one != EXACT)], nights, progress)
    found = [_joined(run.recall) for run in runs]
    rows = [_row(run, recall, found[0]) for run, recall in zip(runs, found)]
    last = encoder.items([dataset.items[row] for row in range(len(dataset.items))], runs[0].numbers)
    return {
        "data": dataset.meta.name,
        "first": moment_words(first * DAY),
        "nights": nights,
        "items": len(dataset.items),
        "queries": len(queries),
        "largest_difference": float(np.abs(last - runs[0].vectors).max()),
        "policies": rows,
    }


def _replay(
    dataset: Dataset, encoder: Encoder, queries: Queries, policies: Sequence[Hysteresis], nights: int, progress: Progress | None
) -> list[Replayed]:
    counts, born, ties = Counts.from_dataset(dataset), appeared(dataset), tie_order(queries, len(dataset.items))
    first = queries.cut // DAY
    before = counts.as_of((first - 1) * DAY)
    whole = encoder.items([dataset.items[row] for row in range(len(dataset.items))], before)
    runs = [Replayed(one, whole.copy(), {name: column.copy() for name, column in before.items()}) for one in policies]
    for done, day in enumerate(range(first, first + nights)):
        now, there = counts.as_of(day * DAY), born < day * DAY
        asked = queries.take(np.flatnonzero(queries.day == day))
        members = encoder.members(member_views(dataset, asked, newest=NEWEST))
        for run in runs:
            run.night(encoder, dataset, now, there, there & (born >= (day - 1) * DAY))
            if len(asked):
                run.recall.append(_recall(asked, members, run.vectors, ties))
        if progress is not None:
            progress(done + 1, nights)
    return runs


def _recall(queries: Queries, members: Vectors, items: Vectors, ties: npt.NDArray[np.int64]) -> dict[str, Values]:
    lists = plain_lists(queries, members, items, ties, DEPTH)
    return per_query_values(target_places(lists.rows, queries.targets), queries.targets, CUTOFFS)


def _joined(parts: Sequence[dict[str, Values]]) -> dict[str, Values]:
    return {f"recall@{cutoff}": np.concatenate([part[f"recall@{cutoff}"] for part in parts]) for cutoff in CUTOFFS}


def _row(run: Replayed, recall: dict[str, Values], exact: dict[str, Values]) -> dict[str, object]:
    minus = paired_differences(recall, exact)
    return {
        "hysteresis": run.policy.buckets,
        "share_embedded": float(np.mean(run.shares)),
        "shares": run.shares,
        "seconds_embed": float(np.mean(run.seconds)),
        **{name: float(values.mean()) for name, values in recall.items()},
        "minus_exact": {name: one.as_dict() for name, one in minus.items()},
    }


@dataclass(frozen=True)
class NightWishes:
    """An invented catalogue of `items` items, of which a share reads differently the next night, and the encoder's shape."""

    items: int = 100_000
    changed: float = 0.02
    size: Size = SMALL
    seed: int = 0


def bench_changes(wishes: NightWishes, folder: Path, told: Callable[[str, int, int], None]) -> dict[str, object]:
    """Seconds of a full night and of the next one, in which a share of the items has another title, and how the latter's vectors
    differ from a rebuild of everything. `folder` must be empty: it takes the encoder and the store."""
    dataset = invented(wishes.items, wishes.seed)
    made_encoder(invented(min(wishes.items, FITTED), wishes.seed), wishes.size, "mean+last", wishes.seed, folder / "encoder")
    encoder, store, moment = Encoder.load(folder / "encoder"), folder / "store", (FIRST_DAY + 1) * DAY
    embed_changed(Tonight.of(invented(64, wishes.seed), moment), encoder, None, told)  # what only a first call costs
    freeze_loaded()  # as the command does
    full = nightly(dataset, encoder, None, store, moment, progress=told)
    changed = _changed(dataset, wishes.changed, wishes.seed)
    night = nightly(changed, encoder, None, store, moment + 3_600, progress=told)
    start = time.perf_counter()
    rebuilt = embed_changed(Tonight.of(changed, moment + 3_600), encoder, None, told)
    seconds = time.perf_counter() - start
    path = current(store)
    assert path is not None
    return {
        **asdict(wishes),
        "embedded": night.embedded,
        "seconds_embed_full": full.seconds_embed,
        "seconds_embed_changed": night.seconds_embed,
        "seconds_embed_rebuild": round(seconds, 3),
        "ratio": night.seconds_embed / full.seconds_embed,
        "largest_difference": float(np.abs(Snapshot.open(path).vectors - rebuilt.vectors).max()),
        "seconds_full": full.seconds,
        "seconds_changed": night.seconds,
    }


def invented(items: int, seed: int) -> Dataset:
    """A catalogue of items, each met about once in the 60 days before; their words are drawn by a Zipf law."""
    rng = np.random.default_rng(seed)
    table = Items(
        item_id=[f"i{row}" for row in range(items)],
        title=_texts(rng, items, 5),
        text=_texts(rng, items, 11),
        category=_texts(rng, items, 1),
        creator=[f"creator {number}" for number in rng.integers(0, items // 10 + 1, items).tolist()],
        created_at=(FIRST_DAY - rng.integers(60, 365, items)) * DAY,
        numbers={"price": rng.gamma(2.0, 20.0, items).round(2)},
    )
    meta = Meta("invented", FIRST_DAY * DAY, (FIRST_DAY + 1) * DAY, ("click",))
    return Dataset(meta, table, Members([f"m{row}" for row in range(PEOPLE)]), _clicks(rng, items))


def _texts(rng: np.random.Generator, count: int, length: int) -> list[str]:
    odds = 1 / np.arange(1, WORDS + 1)
    drawn = rng.choice(WORDS, (count, length), p=odds / odds.sum())
    return [
        " ".join(SYLLABLES[word // 400] + SYLLABLES[word // 20 % 20] + SYLLABLES[word % 20] for word in row)
        for row in drawn.tolist()
    ]


def _clicks(rng: np.random.Generator, items: int) -> Events:
    when = np.sort((FIRST_DAY - 60) * DAY + rng.integers(0, 60 * DAY, items))
    none = np.full(items, -1)
    return Events(
        event_id=np.arange(items),
        member=rng.integers(0, PEOPLE, items).astype(np.int32),
        item=np.floor(items * rng.random(items) ** 2).astype(np.int32),
        timestamp=when,
        action=np.zeros(items, np.int16),
        label=(rng.random(items) < 0.5).astype(np.int8),
        value=np.full(items, np.nan, np.float32),
        split=np.zeros(items, np.int8),
        request=none.astype(np.int32),
        position=none.astype(np.int16),
        surface=none.astype(np.int16),
        actions=("click",),
    )


def _changed(dataset: Dataset, share: float, seed: int) -> Dataset:
    """The data with other titles for a share of the items, drawn at random."""
    items, rng = dataset.items, np.random.default_rng([seed, 1])
    rows = rng.choice(len(items), round(share * len(items)), replace=False)
    titles = list(items.title)
    for row, words in zip(rows.tolist(), _texts(rng, len(rows), 6)):
        titles[row] = words
    return replace(dataset, items=replace(items, title=titles))
