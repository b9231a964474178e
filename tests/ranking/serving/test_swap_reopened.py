"""A server whose change failed reads the log again; until it can, it says so rather than show what may have been withdrawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from index.durable import StoreBusy, exclusive
from index.live import LIVE_DIR
from index.wal import LogDamaged, segments
from ranking.serving.stack import Stack, open_stack


@pytest.fixture
def opened(night: Path, copied: Path) -> Iterator[Callable[[], Stack]]:
    stacks: list[Stack] = []

    def one() -> Stack:
        stacks.append(open_stack(copied, night / "encoder1", None, None))
        return stacks[-1]

    yield one
    for stack in stacks:
        stack.today.close()


def gone(stack: Stack, count: int) -> list[int]:
    rows = stack.today.now()[0].rows([f"i{row}" for row in range(count)])
    return [place for place, row in enumerate(rows.tolist()) if row < 0]


def full(_file: object, _content: bytes) -> None:
    raise OSError(28, "No space left on device")


def test_what_cannot_be_read_again_is_not_shown_and_is_followed_when_it_can(
    opened: Callable[[], Stack], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, other = opened(), opened()
    broken.today.withdraw(["i1"])
    (_, path) = segments(copied / LIVE_DIR)[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 0xFF]) + whole[-19:])
    with monkeypatch.context() as disk, pytest.raises(LogDamaged):
        disk.setattr("index.wal_writer._write", full)
        broken.today.withdraw(["i2"])
    for _ in range(2):
        with pytest.raises(LogDamaged, match="offset"):
            broken.today.now()
    with pytest.raises(LogDamaged):
        broken.today.withdraw(["i2"])
    path.write_bytes(whole)
    assert other.today.withdraw(["i3"])[0] == 2, "whoever cannot write keeps nobody else from it"
    assert gone(broken, 5) == [1, 3]
    other.today.close()
    assert broken.today.withdraw(["i2"]) == (3, 1) and gone(broken, 5) == [1, 2, 3]


def test_who_becomes_the_writer_does_not_wait_long_for_the_store(opened: Callable[[], Stack], copied: Path) -> None:
    stack = opened()
    with exclusive(copied), pytest.raises(StoreBusy, match=r"waited 0\.2 s"):
        stack.today.withdraw(["i1"])
    assert gone(stack, 2) == [] and stack.today.withdraw(["i1"])[0] == 1
