"""goodbooks-10k: ratings (1 to 5) of books without any time. `books.csv`, `ratings.csv`, optional `book_tags.csv`, `tags.csv`.

Ratings `user_id,book_id,rating` use the set's own book number: column `book_id` of books.csv in the repository's files,
column `id` in the first edition (there `book_id` is the Goodreads number). Average ratings and rating counts are those
of the crawl, later than any event, and are left out.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from retrieval.data.refusals import Refusals
from retrieval.data.schema import Members, Meta
from retrieval.data.sources.assemble import Imported, ItemsBuilder, assemble
from retrieval.data.sources.lines import Progress, clean, clean_list, find, find_optional, records
from retrieval.data.sources.ratings import rating_log, read_numbers

LIKED = 4
MOST_SHELVES = 10
NOT_ABOUT_THE_BOOK = frozenset((
    "read", "reading", "reads", "own", "owned", "favorite", "favorites", "favourite", "favourites", "default", "library",
    "kindle", "ebook", "ebooks", "book", "books", "audio", "audiobook", "audiobooks", "wish", "wishlist", "buy", "club",
    "dnf", "shelf", "finish", "finished", "to", "i", "my", "all",
))  # fmt: skip
"""A shelf with one of these words tells where a book stands, not what is in it."""


def import_goodbooks(source: Path, progress: Progress | None = None) -> Imported:
    """The data set of a goodbooks-10k folder; label 1 if the rating is 4 or more, order "none"."""
    refusals = Refusals()
    books, ratings = find(source, "books.csv"), find(source, "ratings.csv")
    shelves = _shelves(source, refusals)
    builder = ItemsBuilder(books.name, refusals, ("year",))
    for row, record in records(books, ("book_id", "title", "authors"), refusals):
        number = record.get("id", record["book_id"]).strip()
        goodreads = record.get("goodreads_book_id", record["book_id"]).strip()
        year = _year(record.get("original_publication_year", ""))
        authors = ", ".join(clean_list(record["authors"].split(",")))
        words = [word for word, _ in shelves.get(goodreads, Counter()).most_common(MOST_SHELVES)]
        text = f"Book from {year:.0f}." if year is not None else "Book."
        text += f" Shelves: {', '.join(words)}." if words else ""
        builder.add(
            row, f"b{number}" if number else "", clean(record["title"]), text, ", ".join(words[:3]), authors,
            numbers={"year": year},
        )  # fmt: skip
    numbers = read_numbers(ratings, ("user_id", "book_id", "rating"), refusals, "csv", progress)
    log = rating_log(numbers, "user_id", "book_id", (1, 5), LIKED, refusals, ("u", "b"))
    meta = Meta(
        "goodbooks", 0, 0, ("rating",), f"1 if the rating (1..5) is >= {LIKED}, else 0", "the rating, 1..5", "none",
        extra={"source": "goodbooks-10k"},
    )  # fmt: skip
    return assemble(meta, builder.items(), Members([]), log, refusals)


def _year(text: str) -> float | None:
    try:
        year = float(text)
    except ValueError:
        return None
    return year if -3000 <= year <= 2100 else None


def _shelves(source: Path, refusals: Refusals) -> dict[str, Counter[str]]:
    """Goodreads number -> how often each shelf name was used, without shelves that say nothing about the book."""
    links, names = find_optional(source, "book_tags.csv"), find_optional(source, "tags.csv")
    if links is None or names is None:
        return {}
    name_of = {
        record["tag_id"]: clean(record["tag_name"].replace("-", " ").strip())
        for _, record in records(names, ("tag_id", "tag_name"), refusals)
        if NOT_ABOUT_THE_BOOK.isdisjoint(record["tag_name"].lower().split("-"))
    }
    found: dict[str, Counter[str]] = {}
    for row, record in records(links, ("goodreads_book_id", "tag_id", "count"), refusals):
        if not record["count"].lstrip("-").isdecimal():
            refusals.one(links.name, row, "count is not a number", record["count"])
        elif name := name_of.get(record["tag_id"]):
            found.setdefault(record["goodreads_book_id"], Counter())[name] += int(record["count"])
    return found
