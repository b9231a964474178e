"""Other nights and other models under a running server that is asked and told all the while: nobody notices but by the names."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from index.durable import write_durably
from index.publish import current, publish, rollback
from index.snapshot import Snapshot, snapshots_dir
from ranking.ranker import Ranker
from ranking.serving.client import Client
from ranking.serving.current import Current
from ranking.serving.replies import Answer, Explanation
from ranking.serving.stack import open_stack
from retrieval.attributes import Wanted
from retrieval.data.schema import Dataset, Item
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import nightly

Start = Callable[..., tuple[int, Callable[[], None]]]
Models = tuple[str, str]
MOST_LIVE = 300
"""Items put in by day, of which two thirds stay: with the night's no more than ALL, or an answer leaves some out."""
WANTED, LEFT_OUT = Wanted(categories=frozenset({"chess", "trains"})), ("i1", "i3", "i5")
ALL = 400


@dataclass
class Told:
    """What the server was told so far (`sent`, `leaving`), and what of it was acknowledged (`put`, `gone`)."""

    sent: set[str] = field(default_factory=set)
    put: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)


@dataclass
class Nights:
    """The nights of one store: by snapshot, the ids and the models that may stand beside its name."""

    store: Path
    fitting: dict[str, frozenset[str]] = field(default_factory=dict)
    models: dict[str, Models] = field(default_factory=dict)

    def add(self, dataset: Dataset, models: Models) -> str:
        path = current(self.store)
        assert path is not None
        items = zip(dataset.items.item_id, dataset.items.category)
        self.fitting[path.name] = frozenset(one for one, category in items if category in WANTED.categories)
        self.models[path.name] = models
        return path.name


@pytest.fixture
def renamed(tiny_dataset: Dataset) -> Dataset:
    """The same shop with other ids for a third of its items."""
    ids = [one if row < 40 else f"x{row}" for row, one in enumerate(tiny_dataset.items.item_id)]
    return replace(tiny_dataset, items=replace(tiny_dataset.items, item_id=ids))


@pytest.fixture
def nights(night: Path, copied: Path, tiny_dataset: Dataset, renamed: Dataset) -> Nights:
    """A store with two nights of the same models; the second is published."""
    found = Nights(copied)
    reader, judge = Encoder.load(night / "encoder1"), Ranker.load(night / "ranker1")
    found.add(tiny_dataset, (reader.fingerprint, judge.fingerprint))
    nightly(renamed, reader, judge, copied, end_of(renamed) + 3_600)
    found.add(renamed, (reader.fingerprint, judge.fingerprint))
    assert len(found.fitting) == 2
    return found


def serve(nights: Nights, encoder: Path, ranker: Path) -> Current:
    return Current(open_stack(nights.store, encoder, ranker, None))


def check(answer: Answer, nights: Nights, before: Told, after: Told) -> None:
    """An answer is of one night and its models, keeps to the filter, and knows what was acknowledged before it was asked for."""
    assert (answer.encoder, answer.ranker) in (nights.models[answer.snapshot], (nights.models[answer.snapshot][0], ""))
    ids = set(answer.ids)
    assert len(ids) == len(answer.ids)
    assert ids <= (nights.fitting[answer.snapshot] | after.sent) - set(LEFT_OUT), answer.snapshot
    assert not ids & before.gone
    assert before.put - after.leaving <= ids and ids & nights.fitting[answer.snapshot]


def ask(client: Client, turn: int, nights: Nights, told: Told) -> None:
    before = Told(put=set(told.put), gone=set(told.gone))
    member = f"m{turn % 40}"
    if turn % 5 == 0:
        for answer in client.retrieve_batch([member, "m1", "m2"], ALL, exclude=LEFT_OUT, wanted=WANTED):
            assert isinstance(answer, Answer)
            check(answer, nights, before, told)
    elif turn % 5 == 1:
        found = client.explain(member, "x45", 3, exclude=LEFT_OUT, wanted=WANTED)
        assert isinstance(found, Explanation) and (found.encoder, found.ranker) == nights.models[found.snapshot]
        assert found.known == ("x45" in nights.fitting[found.snapshot])
    elif turn % 5 == 2:
        check(client.retrieve(member, ALL, exclude=LEFT_OUT, wanted=WANTED), nights, before, told)
    else:
        answer = client.recommend(member, ALL, exclude=LEFT_OUT, wanted=WANTED)
        assert not answer.degraded
        check(answer, nights, before, told)


def tell(client: Client, turn: int, told: Told) -> None:
    """An item is put in, each third one is withdrawn again, and what has grown old; every tenth time one of the night is too."""
    name = f"live{turn}"
    told.sent.add(name)
    client.upsert([Item(name, f"gambit no {turn}", "a short piece about zugzwang", "chess", "author 3")])
    told.put.add(name)
    leaving: list[str] = []
    if turn % 3 == 0:
        leaving = [name] if turn % 10 else [name, f"i{8 + turn % 30}"]
    if turn >= MOST_LIVE and (turn - MOST_LIVE) % 3:
        leaving.append(f"live{turn - MOST_LIVE}")
    if leaving:
        told.leaving.update(leaving)
        client.withdraw(leaving)
        told.gone.update(leaving)


@dataclass
class Asked:
    """Calls answered so far by thread, and what went wrong first."""

    done: list[int]
    failed: list[BaseException] = field(default_factory=list)

    def more(self) -> None:
        """Waits until every thread has had two more calls answered; raises what went wrong with any."""
        enough = [one + 2 for one in self.done]
        wait_for(lambda: bool(self.failed) or all(map(int.__ge__, self.done, enough)), f"{self.done}, {enough} expected")
        if self.failed:
            raise self.failed[0]


@contextmanager
def asked(port: int, nights: Nights, askers: int = 3) -> Iterator[Asked]:
    """Inside the block the server is asked by several threads and told by one; after it, what went wrong is raised."""
    over, told, found = threading.Event(), Told(), Asked([0] * (askers + 1))

    def work(who: int) -> None:
        try:
            with Client(f"127.0.0.1:{port}", deadline_ms=60_000) as client:
                while not over.is_set():
                    turn = found.done[who]
                    tell(client, turn, told) if who == askers else ask(client, turn, nights, told)
                    found.done[who] += 1
                    time.sleep(0.02 if who == askers else 0.0)
        except BaseException as error:
            found.failed.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(askers + 1)]
    for thread in threads:
        thread.start()
    try:
        yield found
        found.more()
    finally:
        over.set()
        for thread in threads:
            thread.join(60)


def wait_for(true: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def swapped(served: Current, times: int, to: str) -> None:
    """Waits until so many swaps are done; the last one led to this snapshot."""
    wait_for(lambda: served.swap.swaps >= times, f"swap {times}")
    assert served.swap.swaps == times and served.stack.snapshot.name == to and not served.swap.reason


def alive(kind: type) -> int:
    """How many there are, without asking the collector: what is let go must be gone at once."""
    return sum(issubclass(type(one), kind) for one in gc.get_objects())


def alive_before(*kinds: type) -> list[int]:
    """How many there are once the garbage of tests before this one is gone: else it would count, and vanish in the middle."""
    gc.collect()
    return [alive(kind) for kind in kinds]


@pytest.mark.parametrize("swaps", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_nights_are_exchanged_under_load_and_nothing_fails_mixes_or_stays(
    nights: Nights, night: Path, start: Start, swaps: int
) -> None:
    served = serve(nights, night / "encoder1", night / "ranker1")
    port, _ = start(served, swap_poll_s=0.05, most_wait_s=60.0)
    models, snapshots = alive_before(PreTrainedModel, Snapshot)
    names = list(nights.fitting)
    with asked(port, nights) as load:
        for turn in range(swaps):
            publish(nights.store, names[turn % 2])
            swapped(served, turn + 1, names[turn % 2])
            load.more()
    assert served.swap.refused == 0 and not served.swap.reason
    wait_for(lambda: alive(Snapshot) <= snapshots, f"{alive(Snapshot)} snapshots are open, {snapshots} were")
    wait_for(lambda: alive(PreTrainedModel) <= models, f"{alive(PreTrainedModel)} models are held, {models} were")


def test_encoder_and_ranker_move_with_the_night_and_back(
    nights: Nights, night: Path, tmp_path: Path, start: Start, tiny_dataset: Dataset
) -> None:
    first = list(nights.fitting)[-1]
    reader, judge = Encoder.load(night / "encoder2"), Ranker.load(night / "ranker2")
    nightly(tiny_dataset, reader, judge, nights.store, end_of(tiny_dataset) + 7_200)
    second = nights.add(tiny_dataset, (reader.fingerprint, judge.fingerprint))
    del reader, judge
    publish(nights.store, first)
    links = {"encoder": tmp_path / "encoder", "ranker": tmp_path / "ranker"}
    for name, link in links.items():
        point(link, night / f"{name}1")
    served = serve(nights, links["encoder"], links["ranker"])
    port, _ = start(served, swap_poll_s=0.05, most_wait_s=60.0)
    (models,) = alive_before(PreTrainedModel)
    with asked(port, nights, askers=2) as load:
        for turn in range(3):
            publish(nights.store, second)
            wait_for(lambda: nights.models[first][0] in served.swap.reason, "a night of another encoder is refused")
            assert nights.models[second][0] in served.swap.reason and served.stack.snapshot.name == first
            for name, link in links.items():
                point(link, night / f"{name}2")
            swapped(served, 2 * turn + 1, second)
            load.more()
            for name, link in links.items():
                point(link, night / f"{name}1")
            wait_for(lambda: bool(served.swap.reason), "models of another night are refused")
            assert rollback(nights.store) == first
            swapped(served, 2 * turn + 2, first)
            load.more()
    wait_for(lambda: alive(PreTrainedModel) <= models, "models of the nights before are kept")


def point(link: Path, folder: Path) -> None:
    """The link leads to a folder, as a deployment moves it: by a rename."""
    beside = link.with_name(f".{link.name}")
    beside.symlink_to(folder)
    beside.replace(link)


def test_a_damaged_night_is_refused_once_and_served_when_it_is_mended(nights: Nights, night: Path, start: Start) -> None:
    other, first = nights.fitting
    served = serve(nights, night / "encoder1", night / "ranker1")
    port, _ = start(served, swap_poll_s=0.02)
    path = snapshots_dir(nights.store) / other / "vectors.npy"
    whole = path.read_bytes()
    write_durably(path, whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with Client(f"127.0.0.1:{port}") as client:
        publish(nights.store, other)
        wait_for(lambda: "sha256" in served.swap.reason, "a flipped bit is refused")
        assert "vectors.npy" in served.swap.reason and served.swap.last_refused > time.time() - 60
        time.sleep(0.3)
        assert served.swap.refused == 1, "what has not changed is not read again and again"
        assert client.recommend("m6", 5).snapshot == first
        write_durably(path, whole)
        wait_for(lambda: served.swap.swaps == 1, f"{served.swap}")
        assert client.recommend("m6", 5).snapshot == other and not served.swap.reason
        refused = served.swap.refused  # one more than before where the file beside, not yet in place, was taken for a change
        write_durably(nights.store / "CURRENT", b"../../etc\n")
        wait_for(lambda: "CURRENT" in served.swap.reason, "a pointer that is none is refused")
        assert client.recommend("m6", 5).snapshot == other
        write_durably(nights.store / "CURRENT", f"{other}\n".encode())
        wait_for(lambda: not served.swap.reason, "what is there is served again")
        assert served.swap.swaps == 1 and served.swap.refused == refused + 1
