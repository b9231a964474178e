"""The CSV importer: any table of a listing site, with or without events."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from retrieval.data.columns import LONGEST_TEXT
from retrieval.data.read import read_dataset_report
from retrieval.data.schema import DataError
from retrieval.data.sources.assemble import Imported
from retrieval.data.sources.listing import Listing, import_listing
from retrieval.data.write import write_dataset

ITEMS = 'sku,name,description,eur,extra\ns1,Mug,"Big, brown",12.50,x\ns2,Jug,,"1,299.00",\ns3,Cup,Small,free,y\n'
ITEM_MAPS = ("item_id=sku", "title=name", "text=description", "price=eur")


def bring(
    folder: Path,
    items: str | bytes,
    events: str | None = None,
    members: str | None = None,
    maps: Sequence[str] = ITEM_MAPS,
    actions: Sequence[str] = (),
) -> Imported:
    """The import of these tables, after a round through a data folder."""
    paths: dict[str, Path | None] = {}
    for name, content in {"items": items, "events": events, "members": members}.items():
        paths[name] = None if content is None else folder / f"{name}.csv"
        if content is not None:
            (folder / f"{name}.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert paths["items"] is not None
    imported = import_listing(Listing(paths["items"], paths["events"], paths["members"], maps, actions))
    write_dataset(imported.dataset, folder / "out")
    back, refused = read_dataset_report(folder / "out")
    assert not len(refused) and back.items.item_id == imported.dataset.items.item_id and back.meta == imported.dataset.meta
    return imported


def test_items_alone_make_a_folder_without_cuts(tmp_path: Path) -> None:
    imported = bring(tmp_path, ITEMS)
    dataset = imported.dataset
    assert [dataset.items[at].title for at in range(3)] == ["Mug", "Jug", "Cup"]
    assert dataset.items[0].text == "Big, brown" and dataset.items[0].numbers == {"price": 12.5}
    assert dataset.items[1].numbers == {"price": 1299.0} and dataset.items[2].numbers == {}
    assert (dataset.meta.cut_valid, dataset.meta.cut_test, len(dataset.events), len(dataset.members)) == (0, 0, 0, 0)
    assert any("no interactions" in note for note in imported.notes)
    assert any("not used: extra" in note for note in imported.notes)


def test_a_comma_that_may_be_a_decimal_one_is_no_number_and_that_is_told(tmp_path: Path) -> None:
    rows = {"1,299.00": 1299.0, "-12,345,678.5": -12345678.5, "1.299,00": None, "762,50": None, "1,299": None, "1,2.5": None}
    (tmp_path / "items.csv").write_text("title,eur\n" + "".join(f'a thing,"{cell}"\n' for cell in (*rows, "")))
    imported = import_listing(Listing(tmp_path / "items.csv", maps=("price=eur",)))
    items = imported.dataset.items
    assert [items[row].numbers.get("price") for row in range(len(items))] == [*rows.values(), None]
    assert "values of price that are no numbers (as 1299.00 is): 4, first '1.299,00' in row 2" in imported.notes


def test_columns_named_as_in_the_schema_need_no_mapping_and_words_are_joined(tmp_path: Path) -> None:
    table = "Title,Text,more,created_at\nA,one,two,2024-01-31\nB,,three,1400000000000\nC,x,y,31.1.2024\n,,,\n"
    imported = bring(tmp_path, table, maps=("text=Text", "text=more"))
    assert imported.dataset.items.text == ["one two", "three"]
    assert imported.dataset.items.created_at.tolist() == [1_706_659_200, 1_400_000_000]
    assert imported.dataset.items.item_id == ["row-0", "row-1"] and any("no id column" in note for note in imported.notes)
    assert [refusal.row for refusal in imported.refusals] == [2, 3]


def test_a_language_and_a_region_are_words_to_choose_by(tmp_path: Path) -> None:
    table = "item_id,title,lang,Region,tongue\n1,A,no,north,x\n2,B,,,\n3,C,<b>de</b>,,\n"
    imported = bring(tmp_path, table, maps=("language=lang",))
    facets = {"language": ["no", "", "de"], "region": ["north", "", ""]}
    assert imported.dataset.items.facets == facets == read_dataset_report(tmp_path / "out")[0].items.facets
    assert imported.dataset.items[1].facets == {} and imported.dataset.items.numbers == {}
    assert any("not used: tongue" in note for note in imported.notes)
    assert bring(tmp_path, "item_id,title,language\n1,A,\n", maps=()).dataset.items.facets == {}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_delimiters_and_encodings_are_found_out(tmp_path: Path, delimiter: str, encoding: str) -> None:
    lines = ["item_id,title,text", "1,Käse,a; b", "2,Öl,c|d", "3,Bière,plain"]
    table = "\r\n".join(line.replace(",", delimiter) if delimiter not in ";|" else _quoted(line, delimiter) for line in lines)
    imported = bring(tmp_path, table.encode(encoding), maps=())
    assert imported.dataset.items.title == ["Käse", "Öl", "Bière"]
    assert imported.dataset.items.text == ["a; b", "c|d", "plain"]
    assert any("Windows-1252" in note for note in imported.notes) == (encoding == "cp1252")


def _quoted(line: str, delimiter: str) -> str:
    return delimiter.join(f'"{field}"' for field in line.split(","))


def test_ragged_repeated_and_huge_rows_are_refused_with_their_number(tmp_path: Path) -> None:
    table = f"item_id,title\n1,A\n2\n3,C,D\n\n1,again\n5,{'x' * (LONGEST_TEXT + 1)}\n,none\n7,ok\n"
    imported = bring(tmp_path, table, maps=())
    assert imported.dataset.items.item_id == ["1", "7"]
    assert {refusal.row: refusal.reason.split(" ")[0] for refusal in imported.refusals} == {
        1: "expected", 2: "expected", 4: "duplicate", 5: "a", 6: "item"
    }  # fmt: skip


def test_a_table_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no valid item in it: most were refused because: items\.csv: item id is missing"):
        bring(tmp_path, "item_id,title\n,lamp\n,chair\n", maps=())
    with pytest.raises(DataError, match=r"events\.csv: no valid event in it: most were refused because: events\.csv: "):
        bring(tmp_path, ITEMS, "member_id,item_id\n,s1\n,s2\n")


def test_events_and_members(tmp_path: Path) -> None:
    events = (
        "who,what,when,action,label,position,request_id\n"
        "u1,s1,2024-01-01 10:00:00,impression,1,0,r1\nu1,s1,2024-01-01 10:00:05,click,,,\nu2,s2,1704200000,like,no,,\n"
        "u2,s9,1704200000,like,,,\nu2,s1,yesterday,like,,,\n,s1,1704200000,like,,,\nu2,s1,1704200001,like,maybe,,\n"
        "u2,s1,1704200001,like,,first,\n"
    )
    members = "who,job,city\nu2,brewer,Berlin\nu9,baker,\nu2,again,\n"
    maps = (*ITEM_MAPS, "events.item_id=what", "member_id=who", "timestamp=when")
    imported = bring(tmp_path, ITEMS, events, members, maps)
    dataset = imported.dataset
    assert dataset.members.member_id == ["u2", "u9", "u1"]
    assert dataset.members[0].profile == {"job": "brewer", "city": "Berlin"}
    assert [dataset.events.actions[code] for code in dataset.events.action] == ["impression", "click", "like"]
    assert dataset.events.label.tolist() == [1, -1, 0] and dataset.events.position.tolist() == [0, -1, -1]
    assert dataset.meta.retrieval_actions == ("click", "like")
    assert [refusal.row for refusal in imported.refusals if refusal.file == "events.csv"] == [4, 5, 6, 7, 3]
    only = bring(tmp_path, ITEMS, events, None, maps, actions=["like"]).dataset
    assert only.meta.retrieval_actions == ("like",) and int(only.is_engagement.sum()) == 1


def test_events_without_times_have_no_order(tmp_path: Path) -> None:
    events = "member_id,item_id\n" + "".join(f"u{at},s{at % 3 + 1}\n" for at in range(30))
    dataset = bring(tmp_path, ITEMS, events).dataset
    assert dataset.meta.order == "none" and dataset.events.actions == ("engagement",)
    assert len(np.unique(dataset.events.timestamp)) == 30


def test_member_fields_can_be_chosen(tmp_path: Path) -> None:
    maps = (*ITEM_MAPS, "members.work=job")
    imported = bring(tmp_path, ITEMS, "member_id,item_id\nu,s1\n", "member_id,job,mail\nu,brewer,u@example.org\n", maps)
    assert imported.dataset.members.profile == {"work": ["brewer"]}


@pytest.mark.parametrize(
    ("maps", "events", "match"),
    [
        (("title=nome",), None, "no column 'nome' .*columns|no column 'nome'"),
        (("title",), None, "is not NAME=COLUMN"),
        (("shop.title=name",), None, "is not NAME=COLUMN"),
        (("item_id=sku",), None, "neither a title nor a text column"),
        (("title=name", "n_events=eur"), None, "is a count"),
        (("title=name", "timestamp=when"), None, "no file of events"),
        (("title=name", "item_id=sku"), "a,b\n1,2\n", "no member_id column"),
    ],
)
def test_a_mapping_that_cannot_be_followed_is_one_clear_line(
    tmp_path: Path, maps: Sequence[str], events: str | None, match: str
) -> None:
    with pytest.raises(DataError, match=match):
        bring(tmp_path, ITEMS, events, maps=maps)


@pytest.mark.parametrize(
    "table", ["", "title,title\na,b\n", "title,\na,b\n", "item_id,title\n", 'title,text\n"a,b\n' + "x" * 9_000_000]
)
def test_a_file_that_is_no_table_is_one_clear_line(tmp_path: Path, table: str) -> None:
    with pytest.raises(DataError, match=r"items\.csv"):
        bring(tmp_path, table, maps=())


def test_an_action_nobody_did_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'buy' is in no event; actions seen: like"):
        bring(tmp_path, ITEMS, "member_id,item_id,action\nu,s1,like\n", actions=["buy"])
