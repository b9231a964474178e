"""The journal on the disk, and the folder that yesterday's folder and the journal make together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retrieval.data.check import check_folder
from retrieval.data.exported import Exported, export
from retrieval.data.exported_journal import Done, Record, Shown, encode_line, read_journal
from retrieval.data.read import read_dataset, read_dataset_report
from retrieval.data.refusals import Refusals
from retrieval.data.schema import DAY, IMPRESSION, DataError, Dataset
from retrieval.data.write import write_dataset
from retrieval.exported_changes import without

NOW = 1_705_795_200
"""After every event of the tiny shop."""


def shown(request: str, member: str, *items: str, at: int = NOW, surface: str = "feed") -> Shown:
    return Shown(at, request, member, surface, items, (), "label", "NONE", "s1", "e1", "r1")


def done(event: str, member: str, item: str, request: str = "", label: int | None = None, at: int = NOW + 9) -> Done:
    return Done(member, event, item, at, "like", label, request, "")


def grown(base: Dataset, records: list[Record], kept: list[Done] | None = None, until: int = NOW + DAY) -> Exported:
    return export(base, iter(records), iter(kept or []), Refusals(), until)


def told(made: Exported) -> list[tuple[str, str, str, int, int, str, str]]:
    """The new events as words: member, item, action, label, position, request, surface."""
    events, members, items = made.dataset.events, made.dataset.members.member_id, made.dataset.items.item_id
    new = events.take(events.event_id >= 1 << 62)
    rows = range(len(new))
    return [
        (
            members[new.member[row]], items[new.item[row]], new.actions[new.action[row]], int(new.label[row]),
            int(new.position[row]), (*new.requests, "")[new.request[row]], (*new.surfaces, "")[new.surface[row]],
        )
        for row in rows
    ]  # fmt: skip


class TestJournal:
    def test_records_come_back_and_damage_costs_its_own_lines(self, tmp_path: Path) -> None:
        records: list[Record] = [shown(f"r{n}", "m\n\u2028é", "i1", 'i"2', at=n) for n in range(20)]
        records += [done(f"e{n}", "m1", "i1", label=n % 2) for n in range(20)]
        content = b"".join(map(encode_line, records))
        path = tmp_path / "2026-01-01-aa.log"
        path.write_bytes(content)
        fine = Refusals()
        assert list(read_journal(tmp_path, fine)) == records and not len(fine)
        rng = np.random.default_rng(1)
        for _ in range(300):
            cut, place = int(rng.integers(1, len(content))), int(rng.integers(0, len(content)))
            path.write_bytes(content[:cut])
            torn = Refusals()
            assert list(read_journal(tmp_path, torn)) == records[: content[:cut].count(b"\n")], "cut at any byte"
            assert [one.reason[:10] for one in torn] == ["unfinished"] * (not content[:cut].endswith(b"\n"))
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :])
            hurt = Refusals()
            found = list(read_journal(tmp_path, hurt))
            assert all(one in records for one in found) and len(found) >= len(records) - 2 and len(hurt) >= 1
            assert all(one.file == path.name for one in hurt)

    def test_a_file_that_cannot_be_read_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a.log").write_bytes(encode_line(done("e", "m1", "i1")))
        (tmp_path / "b.log").mkdir()
        with pytest.raises(DataError, match=r"b\.log"):
            list(read_journal(tmp_path, Refusals()))

    def test_a_record_of_another_version_is_named(self, tmp_path: Path) -> None:
        line = encode_line(done("e", "m1", "i1"))
        import zlib

        text = line[9:-1].replace(b'"done"', b'"seen"')
        (tmp_path / "a.log").write_bytes(b"%08x %b\n" % (zlib.crc32(text), text))
        refusals = Refusals()
        assert not list(read_journal(tmp_path, refusals)) and "version" in refusals[0].reason


class TestExport:
    def test_what_was_shown_and_done_joins_the_folder(self, tiny_dataset: Dataset, tmp_path: Path) -> None:
        records: list[Record] = [
            shown("q1", "m1", "i5", "i6", "i7"),
            shown("q2", "new one", "i6", surface=""),
            done("a", "m1", "i6", "q1"),
            done("b", "m1", "i7", "q1", label=0),
            done("c", "m2", "i9", label=1),
        ]
        made = grown(tiny_dataset, records, [done("c", "m2", "i9", label=1), done("d", "m3", "i2")])
        assert sorted(told(made)) == sorted([
            ("m1", "i5", IMPRESSION, 0, 0, "q1", "feed"),
            ("m1", "i6", IMPRESSION, 1, 1, "q1", "feed"),
            ("m1", "i7", IMPRESSION, -1, 2, "q1", "feed"),  # its outcome stands with the engagement, once
            ("new one", "i6", IMPRESSION, 0, 0, "q2", ""),
            ("m1", "i6", "like", -1, 1, "q1", "feed"),
            ("m1", "i7", "like", 0, 2, "q1", "feed"),
            ("m2", "i9", "like", 1, -1, "", ""),
            ("m3", "i2", "like", -1, -1, "", ""),
        ])  # fmt: skip
        assert (made.shown, made.done, made.joined, made.waiting) == (4, 4, 2, 0)
        write_dataset(made.dataset, tmp_path / "out")
        again, refusals = read_dataset_report(tmp_path / "out")
        assert not len(refusals) and len(again.events) == len(tiny_dataset.events) + 8
        assert again.items.item_id == tiny_dataset.items.item_id
        assert again.members.profile["role"][:40] == tiny_dataset.members.profile["role"]
        report = check_folder(tmp_path / "out")
        assert report.refused == {} and not [one for one in report.warnings if one.kind == "repeated-events"]
        assert tiny_dataset.meta.cut_valid <= again.meta.cut_valid < again.meta.cut_test

    def test_exporting_again_changes_nothing_and_a_late_answer_only_what_it_answers(self, tiny_dataset: Dataset) -> None:
        records: list[Record] = [shown("q1", "m1", "i5", "i6"), done("a", "m1", "i6", "q1")]
        once = grown(tiny_dataset, records).dataset
        twice = grown(once, [*records, *records])
        assert told(twice) == told(grown(tiny_dataset, records)) and twice.repeated == 3
        np.testing.assert_array_equal(twice.dataset.events.event_id, once.events.event_id)
        later = grown(once, [*records, done("z", "m1", "i5", "q1", at=NOW + 500)])
        labels = {(row[1], row[2]): row[3] for row in told(later)}
        assert labels == {("i5", IMPRESSION): 1, ("i6", IMPRESSION): 1, ("i5", "like"): -1, ("i6", "like"): -1}

    def test_what_is_too_recent_waits_and_what_the_folder_knows_is_not_told_twice(self, tiny_dataset: Dataset) -> None:
        likes = np.flatnonzero(tiny_dataset.is_engagement)[-1]
        events = tiny_dataset.events
        same = Done(
            tiny_dataset.members.member_id[events.member[likes]], "own id", tiny_dataset.items.item_id[events.item[likes]],
            int(events.timestamp[likes]), "", None, "", "",
        )  # fmt: skip
        made = grown(tiny_dataset, [shown("q1", "m1", "i5"), shown("q2", "m1", "i5", at=NOW + 60), same], until=NOW + 60)
        assert [row[5] for row in told(made)] == ["q1"] and (made.waiting, made.repeated) == (1, 1)

    def test_items_that_nobody_knows_are_named_and_withdrawn_ones_take_their_events_along(self, tiny_dataset: Dataset) -> None:
        made = grown(tiny_dataset, [shown("q1", "m1", "gone", "i5"), done("a", "m1", "gone", "q1")])
        assert [row[1] for row in told(made)] == ["i5"]
        assert [one.seen for one in made.refusals] == ["gone", "gone"]
        left = without(tiny_dataset, np.array([0, 7]))
        assert len(left.items) == 58 and "i7" not in left.items.item_id
        names = [left.items.item_id[row] for row in left.events.item]
        kept = [tiny_dataset.items.item_id[row] for row in tiny_dataset.events.item]
        assert names == [name for name in kept if name not in ("i0", "i7")]

    def test_what_the_member_store_kept_stands_over_later_attempts_to_tell_it(self, tiny_dataset: Dataset) -> None:
        tries: list[Record] = [done("a", "m1", "i5", "q", at=NOW + 9), done("a", "m1", "i5", "q", at=NOW + 3)]
        alone = grown(tiny_dataset, tries).dataset.events.timestamp
        kept = grown(tiny_dataset, tries, [done("a", "m1", "i5", at=NOW + 5)])
        assert (alone[-1], kept.dataset.events.timestamp[-1]) == (NOW + 3, NOW + 5) and told(kept)[0][5] == "q"

    def test_a_folder_without_times_cannot_go_on(self, tiny_dataset: Dataset) -> None:
        base = replace(tiny_dataset, meta=replace(tiny_dataset.meta, order="none"))
        with pytest.raises(DataError, match="no times"):
            grown(base, [])

    def test_a_folder_without_a_log_begins_one(self, tiny_dataset: Dataset, tmp_path: Path) -> None:
        base = replace(tiny_dataset, events=tiny_dataset.events.take(np.zeros(len(tiny_dataset.events), bool)))
        base = replace(base, meta=replace(base.meta, cut_valid=0, cut_test=0))
        records: list[Record] = [done(f"e{n}", f"m{n % 7}", f"i{n % 11}", at=NOW + n) for n in range(50)]
        made = grown(base, records).dataset
        assert NOW < made.meta.cut_valid < made.meta.cut_test < NOW + 50
        write_dataset(made, tmp_path / "out")
        assert len(read_dataset(tmp_path / "out").events) == 50


class TestABaseOfExports:
    """The journal's files are deleted once exported, and the member store forgets: the folder before must not unlearn."""

    def test_what_only_the_base_still_knows_stays(self, tiny_dataset: Dataset) -> None:
        answer = shown("q1", "m1", "i5", "i6", "i7")
        kept = [done("a", "m1", "i5", "q1"), done("b", "m1", "i6", "q1", label=0)]
        once = grown(tiny_dataset, [answer], kept)
        again = grown(once.dataset, [answer])
        assert told(again) == told(once)
        assert {row[1]: row[3] for row in told(again) if row[2] == IMPRESSION} == {"i5": 1, "i6": -1, "i7": 0}

    def test_an_impression_that_comes_after_its_engagement_is_judged_by_it(self, tiny_dataset: Dataset) -> None:
        once = grown(tiny_dataset, [], [done("a", "m1", "i5", "q1"), done("b", "m1", "i6", "q1", label=1)])
        labels = {row[1]: row[3] for row in told(grown(once.dataset, [shown("q1", "m1", "i5", "i6")])) if row[2] == IMPRESSION}
        assert labels == {"i5": 1, "i6": -1}

    def test_an_engagement_that_comes_when_the_journal_is_gone_raises_the_base(self, tiny_dataset: Dataset) -> None:
        once = grown(tiny_dataset, [shown("q1", "m1", "i5", "i6", "i7"), shown("q2", "m1", "i5")])
        later = grown(once.dataset, [], [done("a", "m1", "i5", "q1"), done("b", "m1", "i6", "q1", label=1)])
        labels = {(row[5], row[1]): row[3] for row in told(later) if row[2] == IMPRESSION}
        assert labels == {("q1", "i5"): 1, ("q1", "i6"): -1, ("q1", "i7"): 0, ("q2", "i5"): 0}

    def test_an_engagement_known_under_another_number_is_not_taken_back(self, tiny_dataset: Dataset) -> None:
        """The base has it from elsewhere, without its request: the impression that it once decided must not fall to 0."""
        like = int(np.flatnonzero(tiny_dataset.is_engagement)[-1])
        log = tiny_dataset.events
        who, item = tiny_dataset.members.member_id[log.member[like]], tiny_dataset.items.item_id[log.item[like]]
        answer, at = shown("q1", who, item, at=NOW - DAY), int(log.timestamp[like])
        once = grown(tiny_dataset, [answer], [Done(who, "own", item, at, "", None, "q1", "")])
        assert once.repeated == 1 and [row[3] for row in told(once)] == [1]
        assert [row[3] for row in told(grown(once.dataset, [answer]))] == [1]

    def test_where_it_was_shown_is_not_forgotten_with_the_journal(self, tiny_dataset: Dataset) -> None:
        like = done("a", "m1", "i6", "q1")
        once = grown(tiny_dataset, [shown("q1", "m1", "i5", "i6")], [like])
        assert told(grown(once.dataset, [], [like])) == told(once)
        assert ("m1", "i6", "like", -1, 1, "q1", "feed") in told(once)


@pytest.mark.parametrize("what", ["surfaces", "actions"])
def test_more_names_than_a_folder_holds_are_an_error_and_do_not_wrap(tiny_dataset: Dataset, what: str) -> None:
    def like(n: int) -> Done:
        action, surface = ("like", f"s{n}") if what == "surfaces" else (f"like:{n}", "")
        return Done("m1", f"e{n}", "i1", NOW + n, action, None, "", surface)

    with pytest.raises(DataError, match=f"40,0.. distinct {what}.*at most 32,767"):
        grown(tiny_dataset, [like(n) for n in range(40_000)])
