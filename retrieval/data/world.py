"""A synthetic professional feed whose every probability is known: the demo's data set and the yardstick of the models.

`make_world` draws members, connections, posts and a month of impressions and actions; `World.truth` is the oracle. The
laws are in `docs/world.md`. The defaults are frozen (a test pins the hash of what they make) and not changed to flatter a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval.data.schema import DAY, IMPRESSION, TEST, TRAIN, VALID, Connections, DataError, Dataset, Events, Meta
from retrieval.data.world_feed import Feed, show
from retrieval.data.world_people import (
    People,
    Posts,
    WorldSettings,
    make_connections,
    make_people,
    make_posts,
    make_tongue,
    make_trend,
    member_id,
    write_posts,
    write_profiles,
)
from retrieval.data.world_truth import ACTIONS, Law, Truth, read_truth, write_truth
from retrieval.data.write import write_dataset

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

__all__ = ["Law", "Truth", "World", "WorldSettings", "make_world", "read_truth", "write_world"]


@dataclass(frozen=True)
class World:
    """A data set and the probabilities that made it."""

    dataset: Dataset
    truth: Truth


def make_world(settings: WorldSettings, progress: Callable[[int, int], None] | None = None) -> World:
    """Draw a world; equal settings give equal worlds. DataError if the settings allow none. `progress` counts days."""
    _check(settings)
    streams = [np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(settings.seed).spawn(8)]
    people = make_people(settings, streams[0])
    connections = make_connections(settings, people, streams[1])
    posts = make_posts(settings, people, streams[2])
    tongue = make_tongue(settings, streams[3])
    items = write_posts(settings, posts, tongue, streams[4])
    members = write_profiles(settings, people, tongue, streams[5])
    truth = _truth(settings, people, posts, connections, make_trend(settings, streams[6]))
    feed = show(settings, people, truth, streams[7], progress)
    events, cuts, impression = _events(settings, feed)
    meta = Meta(
        name="world",
        cut_valid=cuts[0],
        cut_test=cuts[1],
        retrieval_actions=ACTIONS,
        label="1 if the shown post was liked, commented, shared or viewed long after this impression, else 0",
        value="unused",
        extra={"synthetic": True, "seed": settings.seed},
    )
    acted = feed.did.any(axis=1)
    soonest = feed.time + np.where(feed.did, feed.delay, DAY).min(axis=1)
    truth = replace(
        truth,
        event=impression,
        p_label=feed.p_label,
        p_action=feed.p_action,
        done_member=feed.member[acted].astype(np.int32),
        done_item=feed.item[acted].astype(np.int32),
        done_time=soonest[acted],
    )
    return World(Dataset(meta, items, members, events, connections), truth)


def write_world(world: World, folder: Path) -> None:
    """Write the data folder and, beside its files, the folder `truth`."""
    write_dataset(world.dataset, folder)
    write_truth(world.truth, folder)


def _check(settings: WorldSettings) -> None:
    least = {"members": 10, "items": 20, "days": 10, "seed": 0, "topics": 6, "registers": 1}
    for name, bound in least.items():
        found = getattr(settings, name)
        if found < bound:
            raise DataError(f"world: {name} is {found}; a world needs at least {bound}. Pass a larger --{name}.")
    if settings.start % DAY:
        raise DataError(f"world: start {settings.start} is not the first second of a UTC day. Use a multiple of {DAY}.")


def _truth(settings: WorldSettings, people: People, posts: Posts, edges: Connections, trend: F64) -> Truth:
    """The laws with all latent numbers, before anything happened."""
    row_of = {member_id(row): row for row in range(settings.members)}
    nothing, none = np.zeros(0), np.zeros(0, np.int32)
    return Truth(
        law=Law(),
        start=settings.start,
        theta_first=people.theta_first,
        theta_last=people.theta_last,
        phi=posts.phi,
        trend=trend,
        quality=posts.quality,
        format=posts.format,
        author=posts.author,
        evergreen=posts.evergreen,
        created=posts.created,
        taste=people.taste,
        ease=people.ease,
        edge_member=edges.member,
        edge_other=np.array([row_of[other] for other in edges.other_id], np.int32),
        edge_since=edges.since,
        event=none.astype(np.int64),
        p_label=nothing,
        p_action=np.zeros((0, len(ACTIONS))),
        done_member=none,
        done_item=none,
        done_time=none.astype(np.int64),
    )


def _events(settings: WorldSettings, feed: Feed) -> tuple[Events, tuple[int, int], I64]:
    """The log in time order, the two cuts, and the event id of each impression."""
    source, action = np.nonzero(feed.did)
    row = np.concatenate([np.arange(len(feed.item)), source])
    kind = np.concatenate([np.zeros(len(feed.item), np.int64), action + 1])
    time = feed.time[row] + np.where(kind > 0, feed.delay[row, np.maximum(kind - 1, 0)], 0)
    order = np.lexsort((kind, row, time))
    row, kind, time = row[order], kind[order], time[order]
    positive = np.asarray(feed.did.any(axis=1))
    label = np.where(kind == 0, positive[row], -1)
    moments = time[kind > 0]
    cut_test = _day_at(settings, moments, 0.9)
    cuts = min(_day_at(settings, moments, 0.8), cut_test - DAY), cut_test
    event = np.arange(len(row), dtype=np.int64)
    place = np.empty(len(row), np.int64)
    place[order] = event
    events = Events(
        event_id=event,
        member=feed.member[row].astype(np.int32),
        item=feed.item[row].astype(np.int32),
        timestamp=time,
        action=kind.astype(np.int16),
        label=label.astype(np.int8),
        value=np.full(len(row), np.nan, np.float32),
        split=np.select([time < cuts[0], time < cuts[1]], [TRAIN, VALID], TEST).astype(np.int8),
        request=feed.request[row].astype(np.int32),
        position=feed.slot[row].astype(np.int16),
        surface=np.zeros(len(row), np.int16),
        actions=(IMPRESSION, *ACTIONS),
        requests=tuple(f"r{n:07d}" for n in range(int(feed.request[-1]) + 1)),
        surfaces=("feed",),
    )
    return events, cuts, place[: len(feed.item)]


def _day_at(settings: WorldSettings, moments: I64, share: float) -> int:
    """The start of the day in which the given share of the (sorted) engagement times has passed."""
    at = int(moments[int(len(moments) * share)]) if len(moments) else settings.start + int(settings.days * share) * DAY
    return at - at % DAY
