"""What every test shares: few threads, no network, and one tiny invented shop whose members each like one topic."""

from __future__ import annotations

import os

# Read by the libraries when they are first imported, so they stand before any import that could do so.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    ORT_DISABLE_TELEMETRY="1",  # onnxruntime would write a device id and call home from native code, past the guard below
    NO_COLOR="1",
)

import ipaddress
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from retrieval.counts import Counts
from retrieval.data.schema import DAY, TEST, TRAIN, VALID, Connections, Dataset, Events, Items, Members, Meta
from retrieval.features import Quantizer
from retrieval.prompts import special_tokens
from retrieval.tokens import Tokens

TOPICS = {
    "coffee": ("espresso", "roast", "filter", "beans", "grinder", "crema"),
    "trains": ("railway", "station", "locomotive", "signal", "timetable", "viaduct"),
    "gardens": ("roses", "compost", "pruning", "orchard", "seedlings", "hedge"),
    "chess": ("gambit", "endgame", "bishop", "opening", "castling", "zugzwang"),
}
MEMBERS, ITEMS, DAYS = 40, 60, 20
FIRST_DAY = 19_723
"""1 January 2024."""
SHOWN = 4


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A connection or a name look-up that leaves this machine fails the test that tried it."""
    patch = pytest.MonkeyPatch()
    real_connect, real_connect_ex, real_lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def connect(self: socket.socket, address: Any) -> None:
        _stay_home(self.family, address)
        real_connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        _stay_home(self.family, address)
        return real_connect_ex(self, address)

    def lookup(host: str | bytes | None, *rest: Any, **named: Any) -> object:
        _stay_home(socket.AF_INET, (host,))
        return real_lookup(host, *rest, **named)

    patch.setattr(socket.socket, "connect", connect)
    patch.setattr(socket.socket, "connect_ex", connect_ex)
    patch.setattr(socket, "getaddrinfo", lookup)
    yield
    patch.undo()


def _stay_home(family: int, address: object) -> None:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = address[0] if isinstance(address, tuple) else address
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        home = ipaddress.ip_address(str(name)).is_loopback or ipaddress.ip_address(str(name)).is_unspecified
    except ValueError:
        home = False
    if not home:
        raise AssertionError(f"a test reached for the network: {name!r}")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A test that runs a command in this process also sets up its logging; the next test must not inherit it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def tiny_dataset() -> Dataset:
    """40 members, 60 items, 4 topics, 20 days of impressions (with request and position), likes and hides. Member m likes topic
    m % 4, item i is about topic i % 4; three of four impressions of the own topic are liked, others are passed over."""
    rng = np.random.default_rng(7)
    items, members = _items(rng), _members()
    events = _events(rng, items)
    edges = Connections(
        member=np.arange(MEMBERS, dtype=np.int32),
        other_id=[f"author {member % 4}" for member in range(MEMBERS)],
        kind=["follows"] * MEMBERS,
        since=np.full(MEMBERS, FIRST_DAY * DAY, np.int64),
    )
    meta = Meta(
        name="tiny",
        cut_valid=(FIRST_DAY + 14) * DAY,
        cut_test=(FIRST_DAY + 17) * DAY,
        retrieval_actions=("like",),
        label="1 liked, 0 hidden or passed over",
    )
    return Dataset(meta, items, members, events, edges)


@pytest.fixture(scope="session")
def tiny_folder(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shop as a data folder on disk. Shared: do not write into it."""
    from retrieval.data.write import write_dataset

    folder = tmp_path_factory.mktemp("tiny") / "data"
    write_dataset(tiny_dataset, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_quantizer(tiny_dataset: Dataset) -> Quantizer:
    """Percentiles of the as-of numbers in the middle of the train window."""
    return Quantizer.fit(Counts.from_dataset(tiny_dataset, tiny_dataset.meta.cut_valid).as_of(tiny_dataset.meta.cut_valid))


@pytest.fixture(scope="session")
def tiny_tokens(tiny_dataset: Dataset, tiny_quantizer: Quantizer) -> Tokens:
    """A tokenizer of the tiny shop's words, with the two answers as tokens of their own."""
    texts = [*tiny_dataset.items.title, *tiny_dataset.items.text, *tiny_dataset.members.profile["role"]]
    specials = [*special_tokens(tiny_quantizer), "<|yes|>", "<|no|>"]
    return Tokens.train(texts, len(specials) + 400, specials)


def _items(rng: np.random.Generator) -> Items:
    names = list(TOPICS)
    topics = [names[item % 4] for item in range(ITEMS)]
    words = [rng.permutation(TOPICS[topic]).tolist() for topic in topics]
    created = (FIRST_DAY + rng.integers(-10, DAYS - 4, ITEMS)) * DAY
    created[:8] = (FIRST_DAY - 10) * DAY  # so that every topic has items from the first day on
    return Items(
        item_id=[f"i{item}" for item in range(ITEMS)],
        title=[f"{row[0]} and {row[1]} no {item}" for item, row in enumerate(words)],
        text=[f"a short piece about {row[2]}, {row[3]} and {row[4]}" for row in words],
        category=topics,
        creator=[f"author {item % 4}" for item in range(ITEMS)],
        created_at=created.astype(np.int64),
        numbers={"price": np.where(np.arange(ITEMS) % 5 == 0, np.nan, rng.gamma(2.0, 10.0, ITEMS))},
    )


def _members() -> Members:
    names = list(TOPICS)
    return Members(
        member_id=[f"m{member}" for member in range(MEMBERS)],
        profile={"role": [f"fond of {TOPICS[names[member % 4]][member % 6]}" if member % 3 else "" for member in range(MEMBERS)]},
    )


def _events(rng: np.random.Generator, items: Items) -> Events:
    actions = ("impression", "like", "hide")
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    requests: list[str] = []
    for day in range(DAYS):
        born = np.flatnonzero(items.created_at <= (FIRST_DAY + day) * DAY)
        for member in range(day % 2, MEMBERS, 2):
            own = born[born % 4 == member % 4]
            shown = rng.permutation(np.union1d(rng.choice(born, SHOWN - 1, replace=False), rng.choice(own, 1)))
            at = (FIRST_DAY + day) * DAY + 60 * (60 + 10 * member)
            for position, item in enumerate(shown.tolist()):
                likes = item % 4 == member % 4 and rng.random() < 0.75
                rows.append((at, member, item, 0, int(likes), len(requests), position))
                if likes:
                    rows.append((at + 30 + position, member, item, 1, 1, len(requests), position))
                elif rng.random() < 0.1:
                    rows.append((at + 30 + position, member, item, 2, 0, len(requests), position))
            requests.append(f"r{len(requests)}")
    rows.sort(key=lambda row: row[0])
    table = np.array(rows, np.int64)
    on = table[:, 0] // DAY - FIRST_DAY
    return Events(
        event_id=np.arange(len(rows), dtype=np.int64),
        member=table[:, 1].astype(np.int32),
        item=table[:, 2].astype(np.int32),
        timestamp=table[:, 0].astype(np.int64),
        action=table[:, 3].astype(np.int16),
        label=table[:, 4].astype(np.int8),
        value=np.full(len(rows), np.nan, np.float32),
        split=np.select([on < 14, on < 17], [TRAIN, VALID], TEST).astype(np.int8),
        request=table[:, 5].astype(np.int32),
        position=table[:, 6].astype(np.int16),
        surface=np.zeros(len(rows), np.int16),
        actions=actions,
        requests=tuple(requests),
        surfaces=("feed",),
    )
