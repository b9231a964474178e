"""The journal's writer: cheap to tell, whole on the disk, and never in the way of an answer."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ranking.serving.journal import Journal, _DayFile
from retrieval.data.exported_journal import Done, Record, read_journal
from retrieval.data.refusals import Refusals

ROOT = Path(__file__).parents[3]
WRITER = """
import sys, itertools
from pathlib import Path
from ranking.serving.journal import Journal
from retrieval.data.exported_journal import Done
journal = Journal(Path(sys.argv[1]))
for n in itertools.count():
    one = Done(sys.argv[2], f"e{n}", "i", n, "like", None, "", "")
    journal.put(lambda one=one: [one], 1)
    if n == 50: print("on", flush=True)
"""
FULL = """
import resource, sys, logging
from pathlib import Path
from ranking.serving.journal import Journal
from retrieval.data.exported_journal import Done
logging.basicConfig(format="%(message)s")
journal = Journal(Path(sys.argv[1]))
def tell(first, count):
    for n in range(first, first + count):
        journal.put(lambda n=n: [Done("m", f"e{n}", "i" * 50, n, "like", None, "", "")], 1)
tell(0, 20)
while journal.written < 20: pass
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
tell(20, 200)
while journal.written + journal.lost < 220: pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tell(220, 20)
journal.close()
print(journal.written, journal.lost)
"""


def one(name: str) -> Done:
    return Done("m", name, "i", 1, "like", None, "", "")


def found(folder: Path) -> tuple[list[Record], Refusals]:
    refusals = Refusals()
    return list(read_journal(folder, refusals)), refusals


def run(script: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_what_many_threads_tell_is_there_once_by_day(tmp_path: Path) -> None:
    now = [1_705_708_799.0]
    journal = Journal(tmp_path / "journal", clock=lambda: now[0])
    assert not (tmp_path / "journal").exists(), "nothing is begun before there is something to write"

    def tell(who: int) -> None:
        for n in range(100):
            journal.put(lambda n=n: [one(f"{who}-{n}")], 10)  # type: ignore[misc]

    threads = [threading.Thread(target=tell, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while journal.written < 400:
        time.sleep(0.001)
    now[0] += 2
    journal.put(lambda: [one("next day"), one("too")], 10, 2)
    journal.close()
    records, refusals = found(tmp_path / "journal")
    assert len(set(records)) == len(records) == 402 == journal.written and not len(refusals) and not journal.lost
    files = sorted((tmp_path / "journal").iterdir())
    assert [path.name[:10] for path in files] == ["2024-01-19", "2024-01-20"]
    assert all(path.stat().st_mode & 0o77 == 0 for path in files), "members' ids are nobody else's business"
    journal.put(lambda: [one("after the end")], 10)
    assert journal.lost == 1


def test_more_than_may_wait_is_lost_counted_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path, most_bytes=1_000)
    taken, gate = threading.Event(), threading.Event()

    def slow() -> list[Done]:
        taken.set()
        gate.wait(20)
        return [one("slow")]

    journal.put(slow, 10)
    assert taken.wait(20)
    with caplog.at_level(logging.WARNING):
        for n in range(50):
            journal.put(lambda n=n: [one(str(n))], 100)  # type: ignore[misc]
        told = [entry.message for entry in caplog.records if "lost" in entry.message]
        assert len(told) == 1 and "--no-journal" in told[0], "heard while the writer hangs, and not for each record"
        gate.set()
        journal.close()
    assert journal.counts() == {("written",): 11, ("lost",): 40} and len(found(tmp_path)[0]) == 11
    told = [entry.message.split()[0] for entry in caplog.records if "lost" in entry.message]
    assert told == ["1", "39"]


def test_a_place_that_cannot_be_written_and_a_record_that_cannot_be_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    journal = Journal(tmp_path / "file")
    journal.put(lambda: [one("a")], 1)
    journal.close()
    assert (journal.written, journal.lost) == (0, 1) and "File exists" in caplog.text
    fine = Journal(tmp_path / "journal")
    fine.put(lambda: [1 / 0], 1)  # type: ignore[list-item]
    fine.put(lambda: [one("b")], 1)
    fine.close()
    assert (fine.written, fine.lost) == (1, 1)


def test_a_full_disk_costs_what_did_not_fit_and_nothing_else(tmp_path: Path) -> None:
    """A limit of the file's size stands for the disk: the write that meets it is torn, as on a full disk."""
    process = run(FULL, tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    written, lost = map(int, out.split())
    records, refusals = found(tmp_path)
    assert written + lost == 240 and lost > 0 and len(records) == written and not len(refusals), "torn lines are taken back"
    assert {f"e{n}" for n in (*range(20), *range(220, 240))} <= {record.event for record in records if isinstance(record, Done)}
    assert "are lost to the journal" in err


def test_a_disk_that_cannot_sync_costs_no_record_that_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe takes what is written and refuses fsync, as a failing disk may."""
    monkeypatch.setattr("ranking.serving.journal.SYNC_S", 0.0)
    journal = Journal(tmp_path)
    journal.put(lambda: [one("first")], 1)
    while journal.written < 1:
        time.sleep(0.001)
    out, into = os.pipe()
    os.dup2(into, journal._file._descriptor)
    journal.put(lambda: [one("second"), one("third")], 1, 2)
    journal.close()
    assert (journal.written, journal.lost) == (3, 0) and os.read(out, 10_000).count(b"\n") == 2
    assert [entry.message for entry in caplog.records] == [
        f"a power cut may cost the last lines of the journal {tmp_path}: Invalid argument"
    ]
    os.close(out)
    os.close(into)


def test_a_file_that_cannot_be_closed_is_never_written_again(tmp_path: Path) -> None:
    """Its number may be that of somebody else's file by then."""
    file = _DayFile(tmp_path / "journal")
    file.append("2024-01-19", b"first\n")
    os.close(file._descriptor)  # so that closing it fails
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.append("2024-01-20", b"second\n")
    with (tmp_path / "others").open("wb"):  # the number is free, and taken
        file.append("2024-01-19", b"third\n")
        file.close()
    assert (tmp_path / "others").read_bytes() == b""
    assert sorted(path.read_bytes() for path in (tmp_path / "journal").iterdir()) == [b"first\n", b"third\n"]


def test_the_name_of_a_new_file_is_on_the_disk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranking.serving.journal.SYNC_S", 0.0)
    synced: list[int] = []
    really = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        really(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    journal = Journal(tmp_path / "journal")
    for n in range(5):
        journal.put(lambda n=n: [one(str(n))], 1)  # type: ignore[misc]
        while journal.written <= n:
            time.sleep(0.001)
    journal.close()
    (file,) = (tmp_path / "journal").iterdir()
    assert synced.count((tmp_path / "journal").stat().st_ino) == 1 and synced.count(file.stat().st_ino) >= 2


def test_no_room_for_a_thread_loses_the_record_and_not_the_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    before = threading.stack_size(1 << 47)  # more than a process can address
    try:
        journal.put(lambda: [one("lost")], 1)
    finally:
        threading.stack_size(before)
    journal.put(lambda: [one("kept")], 1)
    journal.close()
    assert (journal.written, journal.lost) == (1, 1) and found(tmp_path)[0] == [one("kept")]
    assert "start new thread" in caplog.text


def test_killed_writers_leave_whole_records_in_order_and_do_not_meet(tmp_path: Path) -> None:
    writers = [run(WRITER, tmp_path, f"w{n}") for n in range(3)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "on\n"
    deadline = time.monotonic() + 30
    while len([path for path in tmp_path.iterdir() if path.stat().st_size > 10_000]) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    records, refusals = found(tmp_path)
    assert {one.reason[:10] for one in refusals} <= {"unfinished"} and len(list(tmp_path.iterdir())) == 3
    for name in ("w0", "w1", "w2"):
        numbers = [record.timestamp for record in records if isinstance(record, Done) and record.member == name]
        assert numbers == list(range(len(numbers))) and numbers
