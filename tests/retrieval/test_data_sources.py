"""Importers of public data sets, each on an invented miniature in the original layout."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval.data.read import read_dataset_report
from retrieval.data.schema import DAY, Dataset
from retrieval.data.sources.assemble import Imported
from retrieval.data.sources.dates import american_time, iso_time, written_day
from retrieval.data.sources.importers import importer
from retrieval.data.write import write_dataset

START = 1_400_000_000 // DAY * DAY


def lay(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


def bring(kind: str, folder: Path, files: dict[str, str | bytes]) -> Imported:
    """The import, after a round through a data folder: what an importer makes must be what the schema holds."""
    imported = importer(kind)(lay(folder / "source", files), None)
    write_dataset(imported.dataset, folder / "out")
    back, refused = read_dataset_report(folder / "out")
    assert not len(refused), refused[0]
    assert back.meta == imported.dataset.meta
    assert [row(back, at) for at in range(len(back.events))] == [
        row(imported.dataset, at) for at in range(len(imported.dataset.events))
    ]
    np.testing.assert_array_equal(back.events.split, imported.dataset.events.split)
    return imported


def row(dataset: Dataset, at: int) -> tuple[str, str, int, str, int]:
    events = dataset.events
    member, item = dataset.members.member_id[events.member[at]], dataset.items.item_id[events.item[at]]
    return member, item, int(events.timestamp[at]), events.actions[events.action[at]], int(events.label[at])


def ratings(count: int, line: Callable[[int], str]) -> str:
    return "".join(line(at) + "\n" for at in range(count))


def test_movietweets(tmp_path: Path) -> None:
    imported = bring(
        "movietweets",
        tmp_path,
        {
            "movies.dat": "0000628::Ale: A Story (1908)::Action|Short\n0114508::Öl 2 (1995)::\nbroken line\n"
            "1234567::No Year::Drama\n",
            "ratings.dat": f"1::0000628::8::{START + 7}\n2::0114508::7::{START + 5}\n"
            "x::y::z::w\n2::9999999::3::5\n1::0114508::11::5\n"
            + ratings(20, lambda at: f"{at}::1234567::9::{START + at * DAY + 9}")
            + "3::4\n",
            "users.dat": "1::424242\n",
        },
    )  # fmt: skip
    dataset = imported.dataset
    film = dataset.items[0]
    assert (film.item_id, film.title, film.text) == ("tt0000628", "Ale: A Story", "Action, Short movie from 1908.")
    assert (film.category, film.numbers) == ("Action, Short", {"year": 1908.0})
    assert dataset.items[1].text == "Movie from 1995." and dataset.items[2].text == "Drama movie."
    assert row(dataset, 0) == ("u2", "tt0114508", START + 5, "rating:7", 0)
    assert row(dataset, 1) == ("u1", "tt0000628", START + 7, "rating:8", 1)
    assert dataset.events.value[0] == 7.0
    refused = {(refusal.file, refusal.row): refusal.reason for refusal in imported.refusals}
    assert set(refused) == {("movies.dat", 2), *(("ratings.dat", at) for at in (2, 3, 4, 25))}
    assert refused["ratings.dat", 4] == "rating is outside 0 .. 10"
    assert "424242" not in str(dataset.members.member_id)


def test_cuts_stand_at_the_start_of_the_day_of_the_quantiles(tmp_path: Path) -> None:
    files = {"movies.dat": "1::A (2000)::\n", "ratings.dat": ratings(100, lambda at: f"{at}::1::9::{START + at * DAY + 500}")}
    dataset = bring("movietweets", tmp_path, files).dataset
    assert (dataset.meta.cut_valid, dataset.meta.cut_test) == (START + 79 * DAY, START + 89 * DAY)
    assert np.bincount(dataset.events.split).tolist() == [79, 10, 11]


def test_a_log_of_one_day_is_cut_inside_the_day_and_says_so(tmp_path: Path) -> None:
    files = {"movies.dat": "1::A (2000)::\n", "ratings.dat": ratings(100, lambda at: f"{at}::1::9::{START + at}")}
    imported = bring("movietweets", tmp_path, files)
    assert np.bincount(imported.dataset.events.split).tolist() == [79, 10, 11]
    assert "inside a day" in imported.notes[0]


def test_movielens_of_the_one_million_layout(tmp_path: Path) -> None:
    imported = bring(
        "movielens",
        tmp_path,
        {
            "movies.dat": "1::Matrix, The (1999)::Action|Sci-Fi\n2::Misérables, Les (1995)::Drama\n".encode("latin-1"),
            "ratings.dat": f"1::1::4::{START}\n2::2::3::{START + 9}\n",
            "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n9::M::25::99::1\n",
        },
    )  # fmt: skip
    dataset = imported.dataset
    assert dataset.items.title == ["The Matrix", "Les Misérables"]
    member = dataset.members[0]
    assert (member.member_id, dict(member.profile)) == ("u1", {"gender": "female", "age": "under 18", "occupation": "pupil"})
    assert dataset.members[2].profile == {"gender": "male", "age": "25 to 34"}
    assert "48067" not in str(dataset.members.profile)
    assert row(dataset, 0) == ("u1", "m1", START, "rating:4", 1)


def test_movielens_csv_takes_tags_given_before_the_cut_only(tmp_path: Path) -> None:
    many = ratings(50, lambda at: f"{at},1,4.5,{START + at * DAY}")
    late, early = START + 49 * DAY, START
    imported = bring(
        "movielens",
        tmp_path,
        {
            "movies.csv": 'movieId,title,genres\n1,"American, An (2011)",Adventure|Drama\n7,Odd,(no genres listed)\n8,"broken\n',
            "ratings.csv": f"userId,movieId,rating,timestamp\n{many}5,7,0.5,{START}\n5,7,,{START}\n",
            "tags.csv": f"userId,movieId,tag,timestamp\n1,1,Beer,{early}\n2,1,beer,{early}\n1,1,later,{late}\n1,99,x,{early}\n",
        },
    )  # fmt: skip
    assert imported.dataset.items[0].title == "An American"
    assert imported.dataset.items[0].text == "Adventure, Drama movie from 2011. Tags: beer."
    assert imported.dataset.items[1].text == "Movie." and imported.dataset.items[1].category == ""
    assert "rating:4.5" in imported.dataset.events.actions
    assert {(refusal.file, refusal.row) for refusal in imported.refusals} == {
        ("movies.csv", 2),
        ("ratings.csv", 51),
        ("tags.csv", 3),
    }
    assert any("tags" in note for note in imported.notes)


def test_ragged_and_wordy_rows_of_a_large_file_keep_their_numbers(tmp_path: Path) -> None:
    lines = [f"{at},1,4,{START + at}" for at in range(40)]
    for at, bad in ((0, "1,1"), (5, "x,1,4,1"), (6, "1,2,3,4,5"), (39, "1")):
        lines[at] = bad
    files = {"movies.csv": "movieId,title,genres\n1,A,B\n", "ratings.csv": "userId,movieId,rating,timestamp\n" + "\n".join(lines)}
    imported = bring("movielens", tmp_path, files)
    assert sorted(refusal.row for refusal in imported.refusals) == [0, 5, 6, 39]
    assert len(imported.dataset.events) == 36


@pytest.mark.parametrize("first_edition", [False, True])
def test_goodbooks(tmp_path: Path, first_edition: bool) -> None:
    head = "id,book_id,best_book_id" if first_edition else "book_id,goodreads_book_id,best_book_id"
    files: dict[str, str | bytes] = {
        "books.csv": f"{head},authors,original_publication_year,title,average_rating\n"
        '1,2767052,5,"Suzanne Example, A. Nother",2008.0,"Hops, Too",4.34\n2,3,3,Plato,-380.0,Old,4\n3,4,4,X,,Yearless,4\n',
        "ratings.csv": "user_id,book_id,rating\n1,1,5\n2,2,3\n2,77,3\n",
        "tags.csv": "tag_id,tag_name\n1,to-read\n2,young-adult\n3,beer\n",
        "book_tags.csv": "goodreads_book_id,tag_id,count\n2767052,1,900\n2767052,2,5\n2767052,3,9\n",
    }
    imported = bring("goodbooks", tmp_path, files)
    dataset = imported.dataset
    book = dataset.items[0]
    assert (book.item_id, book.title, book.creator) == ("b1", "Hops, Too", "Suzanne Example, A. Nother")
    assert book.text == "Book from 2008. Shelves: beer, young adult."
    assert book.numbers == {"year": 2008.0} and dataset.items[1].numbers == {"year": -380.0}
    assert dataset.meta.order == "none" and "pseudo-times" in imported.notes[0]
    assert sorted(row(dataset, at)[:2] + row(dataset, at)[3:] for at in range(2)) == [
        ("u1", "b1", "rating:5", 1),
        ("u2", "b2", "rating:3", 0),
    ]
    assert [refusal.row for refusal in imported.refusals] == [2]


def test_mind(tmp_path: Path) -> None:
    news = (
        "N1\tnews\tworld\tTitle one\tAbstract\turl\t[]\t[]\nN2\tnews\tnews\tTwo\t\turl\t[]\t[]\n"
        "N3\tsports\tgolf\tThree\tx\tu\t[]\t[]\n"
    )
    train = (
        "1\tU1\t11/11/2019 9:05:58 AM\tN3 N2\tN1-1 N2-0\n2\tU2\t11/12/2019 12:00:00 AM\t\tN3-0 N9-1\n"
        "broken\n3\tU1\tsoon\t\tN1-0\n"
    )
    dev = "1\tU1\t11/15/2019 1:00:00 PM\tN3 N2 N1\tN2-1\n"
    imported = bring("mind", tmp_path, {
        "train/news.tsv": news, "train/behaviors.tsv": train, "dev/news.tsv": news + "N4\tx\ty\tFour\tz\tu\t[]\t[]\n",
        "dev/behaviors.tsv": dev,
    })  # fmt: skip
    dataset, events = imported.dataset, imported.dataset.events
    assert dataset.items.item_id == ["N1", "N2", "N3", "N4"]
    assert dataset.items[0].category == "news, world" and dataset.items[1].category == "news"
    shown = american_time("11/11/2019 9:05:58 AM")
    assert shown == 1_573_463_158
    found = [row(dataset, at) for at in range(len(events))]
    # The history comes first, in its order, before the first day of the log; then impressions, then the click.
    assert [(item, action) for _, item, _, action, _ in found[:2]] == [("N3", "click:history"), ("N2", "click:history")]
    assert all(time < shown // DAY * DAY for _, _, time, _, _ in found[:2]) and found[0][2] < found[1][2]
    assert found[2:5] == [
        ("U1", "N1", shown, "impression", 1), ("U1", "N2", shown, "impression", 0), ("U1", "N1", shown, "click", -1)
    ]  # fmt: skip
    assert len(set(events.request[2:5].tolist())) == 1 and events.requests == ("train-1", "train-2", "dev-1")
    assert events.position.tolist() == [-1] * len(events)  # the publisher shuffled them
    assert dataset.is_engagement.tolist() == [action.startswith("click") for _, _, _, action, _ in found]
    assert sorted(refusal.row for refusal in imported.refusals) == [1, 2, 3]


def test_mind_without_answers_has_impressions_without_labels(tmp_path: Path) -> None:
    news = "N1\ta\tb\tOne\tx\tu\t[]\t[]\n"
    log = "1\tU1\t11/11/2019 9:05:58 AM\tN1\tN1\n"
    dataset = bring("mind", tmp_path, {"news.tsv": news, "behaviors.tsv": log}).dataset
    assert [row(dataset, at)[3:] for at in range(2)] == [("click:history", -1), ("impression", -1)]


def test_amazon_of_2018(tmp_path: Path) -> None:
    product = {
        "asin": "B1", "title": "Mug &amp; <b>Stein</b>", "brand": "Brauhaus", "category": ["Home", "Kitchen"], "main_cat": "Home",
        "description": ["Big.", ""], "feature": ["Holds 1 l"], "price": "$1,012.99", "rank": "99 in Home", "date": "May 5, 2014",
    }  # fmt: skip
    reviews = [
        {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": START, "reviewerName": "Nobody", "reviewText": "x"},
        {"reviewerID": "A2", "asin": "B1", "overall": 3, "unixReviewTime": START + 1},
        {"reviewerID": "A2", "asin": "B9", "overall": 3, "unixReviewTime": START + 1},
        {"reviewerID": "A2", "asin": "B1", "overall": "5", "unixReviewTime": START + 1},
        {"asin": "B1", "overall": 5, "unixReviewTime": START + 1},
        {"reviewerID": "A3", "asin": "B1", "overall": 5},
    ]
    lines = "".join(json.dumps(review) + "\n" for review in reviews) + "{not json\n[]\n"
    metas = json.dumps(product) + "\n" + json.dumps({**product, "title": "again"}) + "\n"
    imported = bring("amazon", tmp_path, {"Mugs.json.gz": lines, "meta_Mugs.json.gz": metas})
    item = imported.dataset.items[0]
    assert (item.item_id, item.title, item.creator, item.category) == ("B1", "Mug & Stein", "Brauhaus", "Home, Kitchen")
    assert item.text == "Big. Features: Holds 1 l." and item.numbers == {"price": 1012.99}
    assert item.created_at == iso_time("2014-05-05")
    assert [row(imported.dataset, at)[0] for at in range(2)] == ["A1", "A2"]
    assert imported.dataset.events.label.tolist() == [1, 0]
    assert {(refusal.file, refusal.row) for refusal in imported.refusals} == {
        ("meta_Mugs.json.gz", 1), *(("Mugs.json.gz", at) for at in (2, 3, 4, 5, 6, 7))
    }  # fmt: skip


def test_amazon_of_2023(tmp_path: Path) -> None:
    product = {
        "main_category": "Beer", "title": "Hop\ud800 bag", "average_rating": 4.8, "rating_number": 10, "features": [],
        "description": ["Green"], "price": 19.5, "store": "Hops & Co", "categories": ["Beer", "Hops"], "parent_asin": "P1",
        "details": {"Date First Available": "June 1, 2018"},
    }  # fmt: skip
    review = {
        "rating": 4.0,
        "title": "x",
        "text": "y",
        "asin": "V1",
        "parent_asin": "P1",
        "user_id": "U",
        "timestamp": START * 1000,
    }
    files: dict[str, str | bytes] = {"Beer.jsonl": json.dumps(review) + "\n", "meta_Beer.jsonl": json.dumps(product) + "\n"}
    dataset = bring("amazon", tmp_path, files).dataset
    item = dataset.items[0]
    assert (item.title, item.text, item.category, item.creator) == ("Hop? bag", "Green", "Beer, Hops", "Hops & Co")
    assert item.numbers == {"price": 19.5} and item.created_at == iso_time("2018-06-01")
    assert row(dataset, 0) == ("U", "P1", START, "rating:4", 1)


def test_steam(tmp_path: Path) -> None:
    def game(number: str, day: str, **more: object) -> str:
        plain = {"id": number, "app_name": "Stout &amp; Co", "genres": ["Action"], "tags": ["Fun", "Fun"], "specs": ["Co-op"]}
        return repr(
            {**plain, "publisher": "P", "developer": "D", "price": 4.99, "early_access": False, "release_date": day, **more}
        )

    games = [
        game("10", "2010-01-01"), game("20", "2017-01-01"), game("30", "2017-01-01", price="Free To Play", early_access=True),
        game("40", "Soon™", publisher="D"), repr({"genres": []}), "__import__('os').system('false')",
    ]  # fmt: skip
    one = {"posted": "Posted November 5, 2011.", "item_id": "10", "recommend": True, "review": "text"}
    reviews = [one, {**one, "item_id": "30", "recommend": False}, {**one, "posted": "Posted July 3."}, {**one, "item_id": "99"}]
    members = [repr({"user_id": "real_name", "reviews": reviews}), "{'user_id': 'x'}"]
    imported = bring(
        "steam", tmp_path,
        {"steam_games.json.gz": "\n".join(games), "australian_user_reviews.json": "\n".join(members)},
    )  # fmt: skip
    dataset = imported.dataset
    assert dataset.items.item_id == ["app10", "app30", "app40"]  # app20 appeared after the last review
    item = dataset.items[0]
    assert (item.title, item.text) == ("Stout & Co", "Tags: Fun. Features: Co-op. Publisher: P.")
    assert item.numbers == {"price": 4.99, "early_access": 0.0} and item.created_at == iso_time("2010-01-01")
    assert dataset.items[1].numbers == {"price": 0.0, "early_access": 1.0}
    day = written_day("November 5, 2011")
    assert [row(dataset, at) for at in range(2)] == [
        ("u0", "app10", day, "recommend", 1),
        ("u0", "app30", day, "not_recommend", 0),
    ]
    counts = imported.refusals.counts()
    assert any("no year" in reason for reason in counts) and sum(counts.values()) == 5
    assert "real_name" not in str(dataset.members.member_id)
