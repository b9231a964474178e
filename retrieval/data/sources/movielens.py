"""MovieLens, both layouts: ml-1m / ml-10m (`movies.dat`, `::`, Latin-1 in 1m) and ml-latest / 20m / 25m / 32m (`movies.csv`).

csv: movies `movieId,title,genres`, ratings `userId,movieId,rating,timestamp`, tags `userId,movieId,tag,timestamp`.
ml-1m also has `users.dat` (`id::gender::age::occupation::zip`); the zip code is left out, on purpose.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from retrieval.data.refusals import Refusals
from retrieval.data.schema import Items, Members, Meta
from retrieval.data.sources.assemble import Imported, ItemsBuilder, assemble
from retrieval.data.sources.lines import (
    Progress,
    clean,
    clean_list,
    find,
    find_optional,
    records,
    split_lines,
    title_and_year,
)
from retrieval.data.sources.movietweets import film_text
from retrieval.data.sources.ratings import rating_log, read_numbers

LIKED = 4
MOST_TAGS = 10
NO_GENRE = "(no genres listed)"
AGES = {
    "1": "under 18", "18": "18 to 24", "25": "25 to 34", "35": "35 to 44", "45": "45 to 49", "50": "50 to 55",
    "56": "56 or older",
}  # fmt: skip
OCCUPATIONS = (
    "", "academic or educator", "artist", "clerical or administrative", "college student", "customer service",
    "doctor or health care", "executive or manager", "farmer", "homemaker", "pupil", "lawyer", "programmer", "retired",
    "sales or marketing", "scientist", "self-employed", "technician or engineer", "tradesperson or craftsperson",
    "unemployed", "writer",
)  # fmt: skip
GENDERS = {"F": "female", "M": "male"}
_ARTICLE = re.compile(r"^(?P<name>.+), (?P<article>The|A|An|Les?|La|L'|Il|Der|Die|Das|El|Los|Las)$")


def import_movielens(source: Path, progress: Progress | None = None) -> Imported:
    """The data set of a MovieLens folder; label 1 if the rating is 4 or more. Tags given before `cut_valid` become text."""
    refusals = Refusals()
    dotted = find_optional(source, "movies.dat") is not None
    movies = find(source, "movies.dat", "movies.csv")
    builder = ItemsBuilder(movies.name, refusals, ("year",))
    for row, number, name, genre_list in _movies(movies, dotted, refusals):
        title, year = title_and_year(clean(name))
        genres = ", ".join(word for word in clean_list(genre_list.split("|")) if word != NO_GENRE)
        item_id = f"m{number.strip()}" if number.strip() else ""
        builder.add(row, item_id, _in_reading_order(title), film_text(genres, year), genres, numbers={"year": year})
    ratings = find(source, "ratings.dat" if dotted else "ratings.csv")
    layout = "::" if dotted else "csv"
    numbers = read_numbers(ratings, ("userId", "movieId", "rating", "timestamp"), refusals, layout, progress)
    log = rating_log(numbers, "userId", "movieId", (0.5, 5), LIKED, refusals, ("u", "m"))
    meta = Meta(
        "movielens", 0, 0, ("rating",), f"1 if the rating (0.5..5) is >= {LIKED}, else 0", "the rating, 0.5..5",
        extra={"source": f"MovieLens, {movies.name}", "time_granularity": "second"},
    )  # fmt: skip
    imported = assemble(meta, builder.items(), _members(source, dotted, refusals), log, refusals)
    tags = None if dotted else find_optional(source, "tags.csv")
    return imported if tags is None else _with_tags(imported, tags)


def _movies(path: Path, dotted: bool, refusals: Refusals) -> Iterator[tuple[int, str, str, str]]:
    if dotted:
        for row, parts in split_lines(path, "::", 3, refusals, _encoding(path)):
            yield row, parts[0], parts[1], parts[2]
        return
    for row, record in records(path, ("movieId", "title", "genres"), refusals):
        yield row, record["movieId"], record["title"], record["genres"]


def _encoding(path: Path) -> str:
    """ml-1m is Latin-1, ml-10m UTF-8, and both name the file alike: whatever is valid UTF-8 is UTF-8."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _in_reading_order(title: str) -> str:
    """ "Matrix, The" -> "The Matrix": as people, and language models, write it."""
    match = _ARTICLE.match(title)
    return f"{match['article']} {match['name']}" if match else title


def _members(source: Path, dotted: bool, refusals: Refusals) -> Members:
    path = find_optional(source, "users.dat") if dotted else None
    if path is None:
        return Members([])
    ids: dict[str, None] = {}
    profile: dict[str, list[str]] = {"gender": [], "age": [], "occupation": []}
    for row, (number, gender, age, occupation, _) in split_lines(path, "::", 5, refusals):
        if f"u{number}" in ids:
            refusals.one(path.name, row, "duplicate member id", number)
            continue
        ids[f"u{number}"] = None
        place = int(occupation) if occupation.isdecimal() else 0
        profile["gender"].append(GENDERS.get(gender, ""))
        profile["age"].append(AGES.get(age, ""))
        profile["occupation"].append(OCCUPATIONS[place] if place < len(OCCUPATIONS) else "")
    return Members(list(ids), profile)


def _with_tags(imported: Imported, path: Path) -> Imported:
    """The items' text ends with the tags most members gave before the validation window: later ones know its films."""
    items, refusals = imported.dataset.items, imported.refusals
    counts: dict[int, Counter[str]] = {}
    for row, record in records(path, ("userId", "movieId", "tag", "timestamp"), refusals):
        item, time = items.row_of.get(f"m{record['movieId']}"), record["timestamp"]
        if item is None or not time.isdecimal():
            refusals.one(path.name, row, "tag of an unknown movie or without a time")
        elif int(time) < imported.dataset.meta.cut_valid and (tag := clean(record["tag"]).lower()):
            counts.setdefault(item, Counter())[tag] += 1
    text = list(items.text)
    for item, found in counts.items():
        text[item] = f"{text[item]} Tags: {', '.join(tag for tag, _ in found.most_common(MOST_TAGS))}."
    tagged: Items = replace(items, text=text)
    note = "the text holds the tags that members gave before cut_valid; for earlier events some of them are later"
    return Imported(replace(imported.dataset, items=tagged), refusals, [*imported.notes, note])
