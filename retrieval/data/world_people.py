"""Who lives in the synthetic world and what they post: interests, connections, posts, before anything is shown to anyone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.data.schema import DAY, Connections, Items, Members
from retrieval.data.world_text import Speech, draw, make_speech, make_words, sentences
from retrieval.data.world_truth import FORMATS

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class WorldSettings:
    """Size and shape of a world; the defaults are frozen and hash-tested. `start` must be the first second of a day.

    `members` and `items` count those of the whole period; `new_members` is the share that joins during it.
    """

    members: int = 2000
    items: int = 3000
    days: int = 28
    seed: int = 0
    start: int = 1_756_684_800
    topics: int = 28
    requests_per_day: float = 0.5
    new_members: float = 0.25
    evergreen: float = 0.05
    registers: int = 4
    item_words: int = 440
    member_words: int = 340
    filler_words: int = 400
    item_meanings: tuple[float, ...] = (1.0, 0.7, 0.45)
    member_meanings: tuple[float, ...] = (1.0, 0.35, 0.2)
    ease: float = 0.1
    interests: int = 5
    text_topical: int = 4
    taste: float = 0.45

    @property
    def end(self) -> int:
        """The first second after the last day."""
        return self.start + self.days * DAY


@dataclass(frozen=True)
class People:
    """M members: joined int64 [M] seconds (never decreasing), theta_first/last float64 [M, K], taste float64 [M, F]."""

    joined: I64
    theta_first: F64
    theta_last: F64
    taste: F64
    ease: F64
    rate: F64


@dataclass(frozen=True)
class Posts:
    """N posts in order of creation: created int64 [N], author int32 [N], phi float64 [N, K], format int32 [N], ..."""

    created: I64
    author: I32
    phi: F64
    format: I32
    quality: F64
    evergreen: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tongue:
    """The vocabularies. No word of one list is in another."""

    item: Speech
    member: Speech
    filler: list[str]
    places: list[str]


def make_people(settings: WorldSettings, rng: np.random.Generator) -> People:
    """Members with two to `interests` interests each, of which the first fades towards another one, and their habits."""
    count, topics, most = settings.members, settings.topics, settings.interests
    old = np.floor(rng.random(count) * 360 * DAY).astype(np.int64)
    new = np.floor(rng.random(count) * (settings.days - 1) * DAY).astype(np.int64)
    joins = rng.random(count) < settings.new_members
    joined = np.sort(np.where(joins, settings.start + new, settings.start - 360 * DAY + old))
    common = (1.0 + np.arange(topics)) ** -0.35
    order = np.argsort(np.log(1.0 - rng.random((count, topics))) / common, axis=1, kind="stable")[:, ::-1][:, : most + 1]
    number = rng.integers(2, most + 1, count)
    weight = 0.35 - np.log(1.0 - rng.random((count, most)))
    weight *= np.arange(most) < number[:, None]
    weight /= weight.sum(axis=1, keepdims=True)
    first, last = np.zeros((count, topics)), np.zeros((count, topics))
    row = np.arange(count)
    for place in range(most):
        first[row, order[:, place]] += weight[:, place]
        last[row, order[:, place if place else most]] += weight[:, place]
    habits = rng.standard_normal((2, count))
    return People(
        joined=joined,
        theta_first=first,
        theta_last=last,
        taste=settings.taste * rng.standard_normal((count, len(FORMATS))),
        ease=settings.ease * habits[0],
        rate=settings.requests_per_day * np.exp(0.8 * habits[1] - 0.32),
    )


def make_connections(settings: WorldSettings, people: People, rng: np.random.Generator) -> Connections:
    """Edges between members of like interests (one in four of any), sorted by member; work and study ties go both ways."""
    count = settings.members
    wanted = 3 + np.floor(-7.0 * np.log(1.0 - rng.random(count))).astype(np.int64)
    member = np.repeat(np.arange(count), np.minimum(wanted, min(40, count // 3)))
    size = len(member)
    topic = draw(np.cumsum(people.theta_first, axis=1), member, rng.random(size))
    pull = people.theta_first.T + 1e-9
    alike = draw(np.cumsum(pull, axis=1), topic, rng.random(size))
    other = np.where(rng.random(size) < 0.25, rng.integers(0, count, size), alike)
    kind = np.searchsorted(np.array([0.5, 0.85]), rng.random(size), "right")
    met = np.maximum(people.joined[member], people.joined[other])
    late = settings.start + np.floor(rng.random(size) * settings.days * DAY).astype(np.int64)
    since = np.maximum(met, np.where(rng.random(size) < 0.25, late, 0)) + 60
    back = kind > 0
    ends = np.concatenate([member, other[back]]), np.concatenate([other, member[back]])
    kind, since = np.concatenate([kind, kind[back]]), np.concatenate([since, since[back]])
    _, first = np.unique(ends[0] * count + ends[1], return_index=True)
    first = first[(ends[0] != ends[1])[first]]
    names = ("follows", "works with", "studied with")
    return Connections(
        member=ends[0][first].astype(np.int32),
        other_id=[member_id(row) for row in ends[1][first].tolist()],
        kind=[names[k] for k in kind[first].tolist()],
        since=since[first].astype(np.int64),
    )


def make_posts(settings: WorldSettings, people: People, rng: np.random.Generator) -> Posts:
    """Posts at even times from six days before the start; a few members write most, mostly about their own interests."""
    count = settings.items
    span = (settings.days + 6) * DAY
    created = np.sort(settings.start - 6 * DAY + np.floor(rng.random(count) * span).astype(np.int64))
    loud = np.exp(1.2 * rng.standard_normal(settings.members))
    mass = np.cumsum(loud)
    present = np.maximum(np.searchsorted(people.joined, created, "right"), 1)
    author = np.searchsorted(mass, rng.random(count) * mass[present - 1], "right")
    author = np.minimum(author, present - 1).astype(np.int32)
    own = np.cumsum(people.theta_first**1.5, axis=1)
    topics = [draw(own, author, rng.random(count)) for _ in range(2)]
    stray = rng.random((2, count)) < 0.12
    anything = rng.integers(0, settings.topics, (2, count))
    share = 0.1 + 0.3 * rng.random(count)
    phi = np.zeros((count, settings.topics))
    row = np.arange(count)
    for place, part in ((0, 1.0 - share), (1, share)):
        phi[row, np.where(stray[place], anything[place], topics[place])] += part
    leaning = np.cumsum(np.exp(0.8 * rng.standard_normal((settings.members, len(FORMATS)))), axis=1)
    skill = rng.standard_normal(settings.members)[author]
    return Posts(
        created=created,
        author=author,
        phi=phi,
        format=draw(leaning, author, rng.random(count)).astype(np.int32),
        quality=0.6 * skill + 0.8 * rng.standard_normal(count),
        evergreen=rng.random(count) < settings.evergreen,
    )


def make_trend(settings: WorldSettings, rng: np.random.Generator) -> F64:
    """Float64 [days, K]: a wandering fashion for each topic, mean 0, standard deviation 1, memory of about a week."""
    steps = rng.standard_normal((settings.days, settings.topics))
    trend = steps.copy()
    for day in range(1, settings.days):
        trend[day] = 0.88 * trend[day - 1] + np.sqrt(1 - 0.88**2) * steps[day]
    return trend


def make_tongue(settings: WorldSettings, rng: np.random.Generator) -> Tongue:
    """Four lists of made-up words that share none."""
    sizes = (settings.item_words, settings.member_words, settings.filler_words, 40)
    words = make_words(rng, sum(sizes))
    cuts = np.cumsum(sizes).tolist()
    item, member = words[: cuts[0]], words[cuts[0] : cuts[1]]
    return Tongue(
        item=make_speech(rng, item, settings.topics, settings.registers, settings.item_meanings),
        member=make_speech(rng, member, settings.topics, 1, settings.member_meanings),
        filler=words[cuts[1] : cuts[2]],
        places=words[cuts[2] :],
    )


def write_posts(settings: WorldSettings, posts: Posts, tongue: Tongue, rng: np.random.Generator) -> Items:
    """Titles of 6 words (2 of its topics), texts of 12 (`text_topical` of its topics), mostly in the author's register."""
    count = len(posts.created)
    home = rng.integers(0, settings.registers, settings.members)[posts.author]
    register = np.where(rng.random(count) < 0.15, rng.integers(0, settings.registers, count), home)
    cumulative, row = np.cumsum(posts.phi, axis=1), np.arange(count)

    def said(topical: int, neutral: int) -> list[str]:
        wide = (count, topical)
        topic = draw(cumulative, np.repeat(row, topical), rng.random(count * topical)).reshape(wide)
        words = tongue.item.say(rng, topic, np.broadcast_to(register[:, None], wide))
        filler = rng.integers(0, len(tongue.filler), (count, neutral))
        return sentences(rng, [(words, tongue.item.words), (filler, tongue.filler)])

    return Items(
        item_id=[f"p{n:06d}" for n in range(count)],
        title=said(2, 4),
        text=said(settings.text_topical, 12 - settings.text_topical),
        category=[FORMATS[f] for f in posts.format.tolist()],
        creator=[member_id(a) for a in posts.author.tolist()],
        created_at=posts.created,
    )


def write_profiles(settings: WorldSettings, people: People, tongue: Tongue, rng: np.random.Generator) -> Members:
    """Twelve topic words per member from the members' vocabulary: headline 3, industry 1, skills 8; fillers; a place."""
    count = settings.members
    cumulative, row = np.cumsum(people.theta_first, axis=1), np.arange(count)

    def said(topical: int, neutral: int) -> list[str]:
        topic = draw(cumulative, np.repeat(row, topical), rng.random(count * topical)).reshape(count, topical)
        words = tongue.member.say(rng, topic, np.zeros_like(topic))
        filler = rng.integers(0, len(tongue.filler), (count, neutral))
        return sentences(rng, [(words, tongue.member.words), (filler, tongue.filler)])

    return Members(
        member_id=[member_id(n) for n in range(count)],
        profile={
            "headline": said(3, 2),
            "industry": said(1, 0),
            "skills": said(8, 0),
            "location": [tongue.places[p] for p in rng.integers(0, len(tongue.places), count).tolist()],
        },
    )


def member_id(row: int) -> str:
    """The id of a member row."""
    return f"m{row:06d}"
