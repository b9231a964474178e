"""The log gives back what was acknowledged: a torn tail is cut, damage is an error, and followers see every record once."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path

import pytest

from index.durable import StoreBusy
from index.wal import LogBroken, LogDamaged, LogReader, LogTrimmed, framed, header, segment_path, segments, trim
from index.wal_writer import LogWriter

FACTS = {"fingerprint": "one", "dims": 4}


def written(folder: Path, count: int, segment_bytes: int = 300) -> list[bytes]:
    payloads = [f"change {place} ".encode() * (1 + place % 5) for place in range(1, count + 1)]
    writer = LogWriter(folder, FACTS, segment_bytes=segment_bytes)
    for payload in payloads:
        writer.append([payload])
    writer.close()
    return payloads


def read(folder: Path, after: int = 0) -> list[bytes]:
    reader = LogReader(folder, after)
    try:
        return [entry.payload for entry in reader.read()]
    finally:
        reader.close()


def test_what_was_appended_is_read_from_any_position(tmp_path: Path) -> None:
    payloads = written(tmp_path, 40)
    assert len(segments(tmp_path)) > 3
    for after in range(41):
        assert read(tmp_path, after) == payloads[after:]
    writer = LogWriter(tmp_path, FACTS)
    assert writer.position == 40 and writer.append([b"a", b"b"]) == 42
    writer.close()
    assert read(tmp_path, 40) == [b"a", b"b"]


def test_every_torn_tail_is_cut_and_every_whole_record_stays(tmp_path: Path) -> None:
    payloads = written(tmp_path / "whole", 3, segment_bytes=10_000)
    (_, path), *_ = segments(tmp_path / "whole")
    content = path.read_bytes()
    for turn, size in enumerate(range(0, len(content), 3)):
        made_room = bytes(500 * (turn % 2))  # by the file system, and never filled
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / path.name).write_bytes(content[:size] + made_room)
        before = read(folder)
        writer = LogWriter(folder, FACTS)
        assert writer.position == len(before) and before == payloads[: len(before)]
        assert writer.append([b"next"]) == len(before) + 1
        writer.close()
        assert read(folder) == [*before, b"next"]


@pytest.mark.parametrize("count", [50, pytest.param(1_000, marks=pytest.mark.soak)])
def test_flipped_bytes_are_never_taken_for_a_torn_tail(tmp_path: Path, count: int) -> None:
    payloads = written(tmp_path / "whole", 12)
    rng = random.Random(5)
    for _ in range(count):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "flipped"))
        path = rng.choice([path for _, path in segments(folder)])
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        path.write_bytes(content)
        with pytest.raises(LogDamaged, match=rf"{path.name}, offset \d+"):
            read(folder)
        if path == segments(folder)[-1][1]:
            with pytest.raises(LogDamaged):
                LogWriter(folder, FACTS)
        shutil.rmtree(folder)
    assert read(tmp_path / "whole") == payloads


def test_a_segment_that_is_followed_by_another_cannot_be_torn(tmp_path: Path) -> None:
    written(tmp_path, 40)
    first = segments(tmp_path)[0][1]
    os.truncate(first, first.stat().st_size - 1)
    with pytest.raises(LogDamaged, match=first.name):
        read(tmp_path)


def test_a_follower_sees_each_record_once_across_segments_and_cuts(tmp_path: Path) -> None:
    reader = LogReader(tmp_path, 0)
    assert not list(reader.read())
    seen = []
    for turn in range(6):
        writer = LogWriter(tmp_path, {**FACTS, "dims": turn % 2}, segment_bytes=100)
        for place in range(3):
            writer.append([f"{turn}.{place}".encode() * 9])
            seen += [(entry.payload[:3].decode(), entry.facts["dims"]) for entry in reader.read()]
        writer.close()
        with segments(tmp_path)[-1][1].open("ab") as file:
            file.write(b"\x07\x00")
        assert not list(reader.read())
    reader.close()
    assert seen == [(f"{turn}.{place}", turn % 2) for turn in range(6) for place in range(3)]


def test_trimming_takes_whole_segments_and_says_so_to_who_comes_late(tmp_path: Path) -> None:
    payloads = written(tmp_path, 40)
    behind, ahead = LogReader(tmp_path, 0), LogReader(tmp_path, 0)
    assert len(list(ahead.read())) == 40
    gone = trim(tmp_path, 20)
    assert gone > 0 and segments(tmp_path)[0][0] <= 21 and trim(tmp_path, 20) == 0
    assert read(tmp_path, 20) == payloads[20:]
    with pytest.raises(LogTrimmed, match="newer snapshot"):
        list(behind.read())
    trim(tmp_path, 1_000)
    assert len(segments(tmp_path)) == 1
    behind.close()
    writer = LogWriter(tmp_path, FACTS)
    assert writer.append([b"more"]) == 41 and [entry.payload for entry in ahead.read()] == [b"more"]
    writer.close()
    ahead.close()


def test_an_empty_log_begins_behind_the_snapshot_and_an_old_copy_is_refused(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "new", FACTS, after=500)
    assert writer.append([b"x"]) == 501
    writer.close()
    with pytest.raises(LogTrimmed, match="501"):
        read(tmp_path / "new")
    written(tmp_path / "old", 5)
    with pytest.raises(LogDamaged, match="old copy"):
        LogWriter(tmp_path / "old", FACTS, after=6)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, FACTS)
    with pytest.raises(StoreBusy, match="another process"):
        LogWriter(tmp_path, FACTS)
    writer.close()
    writer.close()
    with pytest.raises(LogBroken, match="closed"):
        writer.append([b"x"])
    LogWriter(tmp_path, FACTS).close()


def test_after_a_failed_write_nothing_is_taken_until_the_log_is_opened_anew(tmp_path: Path, monkeypatch) -> None:
    writer = LogWriter(tmp_path, FACTS)
    writer.append([b"kept"])

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LogBroken, match="No space left"):
            writer.append([b"never acknowledged"])
    with pytest.raises(LogBroken, match="open it anew"):
        writer.append([b"y"])
    writer.close()
    writer = LogWriter(tmp_path, FACTS)
    writer.append([b"z"])
    writer.close()
    assert read(tmp_path)[0] == b"kept" and read(tmp_path)[-1] == b"z"


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogBroken, match="cannot be written"):
        LogWriter(tmp_path / "file" / "live", FACTS)


def test_a_reader_beside_a_writer_never_takes_a_write_in_progress_for_damage(tmp_path: Path, monkeypatch) -> None:
    """Whatever the reader has seen, the writer adds some more before it looks again."""
    payload, real = b"change" * 20, os.pread
    content = header(FACTS) + framed(1, payload)
    begun = len(header(FACTS))
    cuts = [0, 5, begun - 3, begun, begun + 7, begun + 20, begun + 90, len(content)]
    for turn, (first, second) in enumerate(itertools.combinations(cuts, 2)):
        for held in (0, 1, 2):
            path = segment_path(tmp_path / f"{turn}-{held}", 1)
            path.parent.mkdir()
            path.write_bytes(content[:first])
            chunks = iter([b""] * held + [content[first:second], content[second:]])

            def growing(descriptor: int, size: int, start: int, path: Path = path, chunks=chunks) -> bytes:
                seen = real(descriptor, size, start)
                with path.open("ab") as file:
                    file.write(next(chunks, b""))
                return seen

            reader = LogReader(path.parent, 0)
            with monkeypatch.context() as patch:
                patch.setattr(os, "pread", growing)
                found = [entry.payload for _ in range(6) for entry in reader.read()]
            reader.close()
            assert found == [payload], (first, second, held)


def test_a_segment_without_records_is_read_under_the_facts_of_who_fills_it(tmp_path: Path) -> None:
    """As an earlier program left it, killed between a segment's header and its first record."""
    segment_path(tmp_path, 1).write_bytes(header(FACTS))
    reader = LogReader(tmp_path, 0)
    assert not list(reader.read()) and reader.segment is not None
    for turn, fingerprint in enumerate(("two", "three, a longer one"), 1):
        writer = LogWriter(tmp_path, {**FACTS, "fingerprint": fingerprint})
        writer.append([fingerprint.encode()])
        writer.close()
        assert [(entry.position, entry.facts["fingerprint"]) for entry in reader.read()] == [(turn, fingerprint)]
    reader.close()


def test_what_a_failed_fsync_left_in_the_memory_is_written_anew(tmp_path: Path, monkeypatch) -> None:
    real, synced = os.fsync, set()

    def noted(descriptor: int) -> None:
        real(descriptor)
        synced.add((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    def failing(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    writer = LogWriter(tmp_path, FACTS)
    writer.append([b"kept"])
    follower = LogReader(tmp_path, 0)
    assert [entry.payload for entry in follower.read()] == [b"kept"]
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(LogBroken, match="Input/output"):
        writer.append([b"not acknowledged"])
    writer.close()
    with pytest.raises(LogBroken, match="Input/output"):
        LogWriter(tmp_path, FACTS)
    monkeypatch.setattr(os, "fsync", noted)
    (path,) = tmp_path.glob("*.log")
    refused = path.stat().st_ino
    (tmp_path / f".{path.name}.1.new").write_bytes(b"of a writer that was killed")
    writer = LogWriter(tmp_path, FACTS)
    now = path.stat()
    assert now.st_ino != refused and (now.st_ino, now.st_size) in synced, "the disk may drop what it refused once"
    writer.append([b"next"])
    writer.close()
    assert [entry.payload for entry in follower.read()] == [b"not acknowledged", b"next"] == read(tmp_path, 1)
    follower.close()
    assert not list(tmp_path.glob(".*"))


def test_an_append_that_failed_for_any_reason_is_the_last(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, FACTS)
    with pytest.raises(ValueError, match="at least one"):
        writer.append([])
    assert writer.append([b"kept"]) == 1
    with pytest.raises(TypeError):
        writer.append([b"one", "no bytes"])  # type: ignore[list-item]
    with pytest.raises(LogBroken, match="TypeError"):
        writer.append([b"two"])
    writer.close()
    assert read(tmp_path) == [b"kept"]


def test_a_log_begun_anew_is_read_by_the_snapshot_it_was_begun_over_and_by_newer_ones(tmp_path: Path) -> None:
    LogWriter(tmp_path, FACTS, after=2, newest=5).close()
    writer = LogWriter(tmp_path, FACTS, after=2, newest=5)
    assert writer.append([b"x"]) == 6
    writer.close()
    assert [read(tmp_path, after) for after in (2, 3, 5, 6)] == [[b"x"], [b"x"], [b"x"], []]
    with pytest.raises(LogTrimmed, match="goes on with change 6"):
        read(tmp_path, 1)
    with pytest.raises(LogDamaged, match="old copy"):
        LogWriter(tmp_path, FACTS, after=2, newest=7)
