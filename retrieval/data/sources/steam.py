"""UCSD Steam: reviews by Australian members, and the games of the shop. Lines are Python literals, not JSON.

`australian_user_reviews.json[.gz]`: `{'user_id': .., 'reviews': [{'posted': 'Posted November 5, 2011.', 'item_id': '1250',
'recommend': True, ..}]}`; `steam_games.json[.gz]`: `{u'id': u'761140', u'app_name': .., u'genres': [..], u'tags': [..],
u'specs': [..], u'price': 4.99, ..}`. Review texts are left out and members get pseudonyms: a user id is often a name.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retrieval.data.refusals import Refusals
from retrieval.data.schema import Items, Members, Meta
from retrieval.data.sources.assemble import Imported, ItemsBuilder, LogBuilder, Names, assemble
from retrieval.data.sources.dates import iso_time, written_day
from retrieval.data.sources.lines import Progress, clean, clean_list, find, parsed

NO_YEAR = "review date has no year (Steam prints none for the year of the crawl)"


def import_steam(source: Path, progress: Progress | None = None) -> Imported:
    """The data set of a folder with the two files; label 1 if the member recommends the game."""
    refusals = Refusals()
    games = find(source, "steam_games.json", "steam_games.json.gz")
    reviews = find(source, "australian_user_reviews.json", "australian_user_reviews.json.gz")
    builder = ItemsBuilder(games.name, refusals, ("price", "early_access"))
    for row, game in parsed(games, _literal, "a Python dictionary", refusals, progress):
        _add_game(builder, row, game)
    log, pseudonyms = LogBuilder(reviews.name), Names()
    for row, member in parsed(reviews, _literal, "a Python dictionary", refusals, progress):
        _add_reviews(log, row, member, pseudonyms, refusals)
    items, later = _released(builder, log)
    meta = Meta(
        "steam", 0, 0, ("recommend", "not_recommend"), "1 if the member recommends the game in the review, 0 if not",
        extra={"source": "UCSD Steam, Australian reviews", "time_granularity": "day"},
    )  # fmt: skip
    imported = assemble(meta, items, Members([]), log.log(), refusals)
    notes = ["price and tags were crawled after the reviews: a mild leak", *imported.notes]
    if later:
        notes.append(f"{later:,} games without a review that appeared after the last review are left out")
    return Imported(imported.dataset, refusals, notes)


def _literal(line: str) -> dict[str, object]:
    value = ast.literal_eval(line)
    if not isinstance(value, dict):
        raise TypeError("not a dictionary")
    return value


def _add_game(builder: ItemsBuilder, row: int, game: Mapping[str, object]) -> None:
    number = clean(game.get("id"))
    parts = {
        "Tags": ", ".join(clean_list(game.get("tags"))),
        "Features": ", ".join(clean_list(game.get("specs"))),
        "Publisher": clean(game.get("publisher")),
    }
    developer = clean(game.get("developer"))
    if parts["Publisher"] == developer:
        parts["Publisher"] = ""
    builder.add(
        row,
        f"app{number}" if number else "",
        clean(game.get("app_name") or game.get("title")),
        " ".join(f"{name}: {words}." for name, words in parts.items() if words),
        ", ".join(clean_list(game.get("genres"))),
        developer,
        iso_time(clean(game.get("release_date"))),
        {"price": _price(game.get("price")), "early_access": 1.0 if game.get("early_access") is True else 0.0},
    )


def _price(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return 0.0 if "free" in clean(value).lower() else None


def _add_reviews(log: LogBuilder, row: int, member: Mapping[str, object], pseudonyms: Names, refusals: Refusals) -> None:
    name, reviews = clean(member.get("user_id")), member.get("reviews")
    if not name or not isinstance(reviews, list):
        refusals.one(log.file, row, "no user_id or no list of reviews")
        return
    for review in reviews:
        if not isinstance(review, dict) or not isinstance(review.get("recommend"), bool):
            refusals.one(log.file, row, "review without a recommend flag", review)
            continue
        posted = clean(review.get("posted")).removeprefix("Posted ").removesuffix(".")
        day = written_day(posted)
        if day is None:
            refusals.one(log.file, row, NO_YEAR, posted)
            continue
        liked = review["recommend"]
        action = "recommend" if liked else "not_recommend"
        log.add(row, f"u{pseudonyms[name]}", f"app{clean(review.get('item_id'))}", day, action, int(liked))


def _released(builder: ItemsBuilder, log: LogBuilder) -> tuple[Items, int]:
    """The games that were reviewed or had appeared by the last review, and the number of the others."""
    items, last = builder.items(), log.last_time
    reviewed = np.array([item_id in log.items.codes for item_id in items.item_id])
    keep = reviewed | (items.created_at <= last)
    return builder.items(keep), int((~keep).sum())
