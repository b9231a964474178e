"""What the stack that answers now says of itself, looked up when a scrape asks: models, snapshot, items, prefix cache, recall."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ranking.prefill.cache import CacheStats
from ranking.serving.current import Current
from ranking.serving.readings import Read, Readings, Values
from ranking.serving.stack import Stack

Numbers = Mapping[Values, float]


def add_stack(readings: Readings, current: Current, version: str) -> None:
    """Every scrape reads the stack of its moment; nothing of it is kept, for a swap must be able to free it."""

    def of(read: Callable[[Stack], Numbers]) -> Read:
        return lambda: read(current.stack)

    _add_cache(readings, of)
    labels = ("snapshot", "encoder", "ranker", "first_stage", "attention", "version")
    readings.add("brewline_serving_info", "What answers now; always 1.", of(lambda stack: _info(stack, version)), labels)
    told = "Age of what is served: since the world was looked at, since the snapshot was written, seconds."
    readings.add("brewline_snapshot_age_seconds", told, of(Built().ages), ("since",))
    told = "Items that can be answered, and those of them that were put in since the night."
    readings.add("brewline_items", told, of(_items), ("which",))
    readings.add("brewline_log_position", "The last change of the log that answers know.", of(_position))
    told = "Searches, one a query and shard, by their end: at the first look, after a wider one, by scoring all permitted."
    readings.add("brewline_searches_total", told, of(_searches), ("look",), counter=True)
    readings.add("brewline_recall", "Recall of recent answers against the exact search.", of(_recall))
    told = "Answers that were to be compared with the exact search's, by what became of it."
    readings.add("brewline_recall_answers_total", told, of(_recall_answers), ("result",), counter=True)
    told = "New nights or models under this server: served, or refused for what they are."
    readings.add("brewline_swaps_total", told, lambda: _swaps(current), ("result",), counter=True)
    told = "1 while what is published is refused and what was there before is served on, else 0."
    readings.add("brewline_swap_stuck", told, lambda: {(): float(bool(current.swap.reason))})
    told = "How far the calendar's clock was set on (or back: negative) since the start, seconds."
    apart = _clocks_apart()
    readings.add("brewline_clock_jump_seconds", told, lambda: {(): _clocks_apart() - apart})


@dataclass
class Built:
    """When the snapshot that was last asked about was written, looked up once for each."""

    times: dict[str, float | None] = field(default_factory=dict)

    def ages(self, stack: Stack) -> Numbers:
        """Seconds since the world was looked at and, unless the snapshot does not say, since it was written."""
        now, name = time.time(), stack.snapshot.name
        if name not in self.times:
            written = stack.snapshot.run().get("written_at")
            self.times = {name: float(written) if isinstance(written, float | int) else None}
        at = self.times[name]
        ages: dict[Values, float] = {("as_of",): now - stack.catalog.as_of}
        if at is not None:
            ages["built",] = now - at
        return ages


def _info(stack: Stack, version: str) -> Numbers:
    ranker, attention = ("", "") if stack.ranker is None else (stack.ranker.fingerprint, stack.ranker.engine.backend)
    first_stage = stack.recommender.retriever.first_stage
    return {(stack.snapshot.name, stack.encoder.fingerprint, ranker, first_stage, attention, version): 1}


def _clocks_apart() -> float:
    # On Linux the steady clock stands still while a machine sleeps; that of the time since its start does not.
    steady = time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()
    return time.time() - steady


def _items(stack: Stack) -> Numbers:
    moment = stack.today.shown[0]
    return {("all",): moment.items, ("live",): moment.alive.size}


def _position(stack: Stack) -> Numbers:
    return {(): stack.today.shown[0].position}


def _searches(stack: Stack) -> Numbers:
    return {(how,): number for how, number in stack.today.shown[0].serving.looked().items()}


def _recall(stack: Stack) -> Numbers:
    recall = None if stack.origin.shadow is None else stack.origin.shadow.seen().recall
    return {} if recall is None else {(): recall}


def _recall_answers(stack: Stack) -> Numbers:
    if stack.origin.shadow is None:
        return {}
    seen = stack.origin.shadow.seen()
    return {("compared",): seen.compared, ("dropped",): seen.dropped, ("failed",): seen.failed}


def _swaps(current: Current) -> Numbers:
    return {("ok",): current.swap.swaps, ("refused",): current.swap.refused}


def _add_cache(readings: Readings, of: Callable[[Callable[[Stack], Numbers]], Read]) -> None:
    def add(name: str, told: str, read: Callable[[CacheStats], Numbers], labels: tuple[str, ...] = ()) -> None:
        def of_stack(stack: Stack) -> Numbers:
            return {} if stack.ranker is None else read(stack.ranker.engine.stats)

        readings.add(f"brewline_prefix_cache_{name}", told, of(of_stack), labels, counter=name.endswith("_total"))

    add("bytes", "Keys and values of prefixes that are kept, bytes.", lambda stats: {(): stats.bytes})
    add("evicted_bytes_total", "Bytes that gave way to newer prefixes.", lambda stats: {(): stats.evicted_bytes})
    add(
        "lookups_total",
        "Prefixes looked up, by how much of them was there.",
        lambda stats: {("whole",): stats.hits, ("part",): stats.partial, ("nothing",): stats.misses},
        ("found",),
    )
    add(
        "tokens_total",
        "Tokens of prefixes, by where their keys and values came from.",
        lambda stats: {("cache",): stats.tokens_reused, ("computed",): stats.tokens_computed},
        ("source",),
    )
