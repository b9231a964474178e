"""A killed night leaves yesterday's snapshot answering, with what is known of members by then; the next one completes it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from index.durable import StoreBusy, try_lock
from index.publish import NIGHT_LOCK, collect_garbage, current
from index.snapshot import Snapshot
from index.store import open_store
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import asker_of
from ranking.serving.stack import Stack, open_stack
from retrieval.data.read import read_dataset
from retrieval.data.schema import DAY, Dataset, Item
from retrieval.encoder import Encoder
from retrieval.members import VECTOR, VECTOR_DAYS, MemberStore
from retrieval.moments import end_of
from retrieval.refresh import NightReport, nightly
from retrieval.yesterday import RETRY_S, alone

ROOT = Path(__file__).parents[2]
NIGHT = """
import os, signal, sys
from pathlib import Path

import retrieval.load_members
import retrieval.refresh
from index.store import open_store
from retrieval.data.read import read_dataset
from retrieval.encoder import Encoder
from retrieval.members import MemberStore

data, encoder, store, as_of, stage, calls = sys.argv[1:]
left = int(calls)

class TitleLengths:
    fingerprint = "a" * 20
    def item_tokens(self, items, numbers):
        return [[len(item.title)] for item in items]

def told(now, done, of):
    global left
    left -= now == stage
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

retrieval.load_members.MEMBER_BATCH = 8
reader = Encoder.load(Path(encoder))
members = MemberStore(open_store(f"sqlite:{store}/members.sqlite"), reader.fingerprint)
retrieval.refresh.nightly(read_dataset(Path(data)), reader, TitleLengths(), Path(store), int(as_of), members, told)
"""


class TitleLengths:
    """Stands for a ranker, in the killed night and in the one that completes it."""

    fingerprint = "a" * 20

    def item_tokens(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[list[int]]:
        del numbers
        return [[len(item.title)] for item in items]


@pytest.fixture(scope="module")
def dataset(tiny_folder: Path) -> Dataset:
    return read_dataset(tiny_folder)


@pytest.fixture(scope="module")
def encoder(encoder_folders: tuple[Path, Path]) -> Encoder:
    return Encoder.load(encoder_folders[0])


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, encoder: Encoder) -> Path:
    """A store with a night of two weeks, members included. Shared: copy it."""
    store = tmp_path_factory.mktemp("before") / "store"
    store.mkdir()
    report = run(dataset, encoder, store, dataset.meta.cut_valid)
    assert report.items < 60
    return store


def run(dataset: Dataset, encoder: Encoder, store: Path, as_of: int) -> NightReport:
    members = open_store(f"sqlite:{store / 'members.sqlite'}")
    try:
        return nightly(dataset, encoder, TitleLengths(), store, as_of, MemberStore(members, encoder.fingerprint))
    finally:
        members.close()


def unanswered(stack: Stack, dataset: Dataset) -> tuple[int, int]:
    """Asks for every member all that there is: how many records are of tonight, how many name items unknown to the snapshot.

    The answer is every item of the snapshot that the member has not seen, and no other.
    """
    assert stack.members is not None
    held = set(stack.catalog.ids(range(len(stack.catalog))))
    tonight = newer = 0
    for member_id in dataset.members.member_id:
        asker = asker_of(stack, pb.Member(id=member_id), "")
        found = stack.recommender.retrieve(asker.view, 60, exclude=asker.seen, vector=asker.vector)
        assert set(found.ids) == held - set(asker.seen)
        before = dataset.engagements.before(stack.snapshot.manifest.as_of)
        own = before.item[before.member == dataset.members.row_of[member_id]]
        assert not {dataset.items.item_id[item] for item in own} & set(found.ids)
        tonight += stack.members.get(member_id).record.as_of > stack.snapshot.manifest.as_of
        newer += bool(set(asker.seen) - held)
    return tonight, newer


@pytest.mark.parametrize(("stage", "calls", "loaded"), [("ranker tokens", 1, 0), ("members", 2, 16), ("members", 5, 40)])
def test_a_killed_night_leaves_yesterday_serving_and_is_completed_by_the_next(
    tmp_path: Path,
    before: Path,
    tiny_folder: Path,
    dataset: Dataset,
    encoder: Encoder,
    encoder_folders: tuple[Path, Path],
    stage: str,
    calls: int,
    loaded: int,
) -> None:
    store = Path(shutil.copytree(before, tmp_path / "store"))
    live = open_stack(store, encoder_folders[0], None, None)
    moment = end_of(dataset)
    command = [sys.executable, "-c", NIGHT, tiny_folder, encoder_folders[0], store, moment, stage, calls]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr

    for server in (live, open_stack(store, encoder_folders[0], None, None)):
        assert server.snapshot.name == live.snapshot.name
        tonight, newer = unanswered(server, dataset)
        assert tonight == loaded
        assert (newer > 0) == (loaded > 0), "without items that only tonight knows this proves little"

    report = run(dataset, encoder, store, moment)
    assert report.predecessor == live.snapshot.name and report.published
    assert (report.members, report.members_encoded) == (40, 40 - loaded)
    other = Path(shutil.copytree(before, tmp_path / "undisturbed"))
    assert report.snapshot == run(dataset, encoder, other, moment).snapshot
    collect_garbage(store, keep=0)
    assert {path.name for path in (store / "snapshots").iterdir()} == {live.snapshot.name, report.snapshot}
    after = open_stack(store, encoder_folders[0], None, None)
    assert after.snapshot.name == report.snapshot and len(after.catalog) == 60
    assert unanswered(after, dataset) == (0, 0)


class Killed(BaseException):
    """Ends a night where it stands."""


def test_an_old_encoders_vectors_answer_until_the_pointer_moves_and_leave_later(
    tmp_path: Path, dataset: Dataset, encoder: Encoder, encoder_folders: tuple[Path, Path]
) -> None:
    now = [0.0]
    kept = open_store(f"sqlite:{tmp_path / 'members.sqlite'}", clock=lambda: now[0])
    other = Encoder.load(encoder_folders[1])
    old, new = MemberStore(kept, encoder.fingerprint), MemberStore(kept, other.fingerprint)
    store, moment, ids = tmp_path / "store", end_of(dataset), dataset.members.member_id

    def answered(members: MemberStore) -> int:
        return sum(members.get(member_id).vector is not None for member_id in ids)

    def told(stage: str, done: int, of: int) -> None:
        if stage == "members" and done == of:
            raise Killed

    first = nightly(dataset, encoder, None, store, moment, old)
    with pytest.raises(Killed):
        nightly(dataset, other, None, store, moment + 3600, new, told)
    path = current(store)
    assert path is not None and path.name == first.snapshot
    assert (answered(old), answered(new)) == (40, 40), "nothing but the hour changed, so the running server's vectors are right"
    second = nightly(dataset, other, None, store, moment + 3600, new)
    assert (second.members_encoded, second.published) == (0, True)
    assert (answered(old), answered(new)) == (40, 40), "somebody may still roll back"
    now[0] = (VECTOR_DAYS - 1) * DAY
    nightly(dataset, other, None, store, moment + 7200, new)
    now[0] = (VECTOR_DAYS + 1) * DAY
    assert (answered(old), answered(new)) == (0, 40)
    assert not list(kept.ids(VECTOR, encoder.fingerprint))
    kept.close()


def test_two_nights_on_one_store_are_refused(tmp_path: Path, dataset: Dataset, encoder: Encoder) -> None:
    with alone(tmp_path), pytest.raises(StoreBusy, match="another night is working"):
        nightly(dataset, encoder, None, tmp_path, end_of(dataset))
    assert current(tmp_path) is None and not (tmp_path / "snapshots").exists()
    held = try_lock(tmp_path / NIGHT_LOCK)  # as the collector does, for a moment
    assert held is not None
    threading.Timer(RETRY_S / 3, os.close, [held]).start()
    with alone(tmp_path):
        pass
    assert nightly(dataset, encoder, None, tmp_path, end_of(dataset)).published
    assert Snapshot.open(current(tmp_path) or tmp_path).manifest.count == 60
