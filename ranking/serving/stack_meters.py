"""What the stack that answers now says of itself, looked up when a scrape asks: models, snapshot, items, prefix cache, swaps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ranking.prefill.cache import CacheStats
from ranking.serving.current import Current
from ranking.serving.meters import Reading, Readings, Registry, Values
from ranking.serving.stack import Stack


def add_stack(registry: Registry, current: Current, version: str) -> None:
    """Every scrape reads the stack of its moment; nothing of it is kept, for a swap must be able to free it."""
    built = Built()
    _add_info(registry, current, version)
    _add_cache(registry, current)
    rows: tuple[tuple[str, str, Callable[[Stack], Readings], tuple[str, ...]], ...] = (
        (
            "brewline_snapshot_age_seconds",
            "Age of what is served: since the world was looked at, since the snapshot was written, seconds.",
            built.ages,
            ("since",),
        ),
        ("brewline_items", "Items that can be answered, and those of them that were put in since the night.", _items, ("which",)),
        ("brewline_log_position", "The last change of the log that answers know.", _position, ()),
    )
    for name, told, read, labels in rows:
        registry.add(Reading(name, told, partial(_of_stack, current, read), labels))
    told = "New nights or models under this server: served, or refused for what they are."
    registry.add(Reading("brewline_swaps_total", told, lambda: _swaps(current), ("result",), "counter"))
    told = "1 while what is published is refused and what was there before is served on, else 0."
    registry.add(Reading("brewline_swap_stuck", told, lambda: {(): float(bool(current.swap.reason))}))


@dataclass
class Built:
    """When the snapshot that was last asked about was written, looked up once for each."""

    times: dict[str, float | None] = field(default_factory=dict)

    def ages(self, stack: Stack) -> Readings:
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


def _of_stack(current: Current, read: Callable[[Stack], Readings]) -> Readings:
    return read(current.stack)


def _items(stack: Stack) -> Readings:
    moment = stack.today.shown[0]
    return {("all",): moment.items, ("live",): moment.alive.size}


def _position(stack: Stack) -> Readings:
    return {(): stack.today.shown[0].position}


def _swaps(current: Current) -> Readings:
    return {("ok",): current.swap.swaps, ("refused",): current.swap.refused}


def _add_info(registry: Registry, current: Current, version: str) -> None:
    def read(stack: Stack) -> Readings:
        ranker, attention = ("", "") if stack.ranker is None else (stack.ranker.fingerprint, stack.ranker.engine.backend)
        first_stage = stack.recommender.retriever.first_stage
        return {(stack.snapshot.name, stack.encoder.fingerprint, ranker, first_stage, attention, version): 1}

    labels = ("snapshot", "encoder", "ranker", "first_stage", "attention", "version")
    told = "What answers now; always 1."
    registry.add(Reading("brewline_serving_info", told, partial(_of_stack, current, read), labels))


def _add_cache(registry: Registry, current: Current) -> None:
    def add(
        name: str, told: str, read: Callable[[CacheStats], Readings], labels: tuple[str, ...] = (), kind: str = "counter"
    ) -> None:
        def of_stack(stack: Stack) -> Readings:
            return {} if stack.ranker is None else read(stack.ranker.engine.stats)

        registry.add(Reading(f"brewline_prefix_cache_{name}", told, partial(_of_stack, current, of_stack), labels, kind))

    add("bytes", "Keys and values of prefixes that are kept, bytes.", lambda stats: {(): stats.bytes}, (), "gauge")
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
