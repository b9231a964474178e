"""MovieTweetings: ratings (0 to 10) of films that people tweeted. `movies.dat`, `ratings.dat`, fields between `::`.

Layout: movies `0111161::The Shawshank Redemption (1994)::Crime|Drama`, ratings `user::movie::rating::seconds`. The third
file, `users.dat`, links members to Twitter accounts; it is not read, on purpose.
"""

from __future__ import annotations

from pathlib import Path

from retrieval.data.refusals import Refusals
from retrieval.data.schema import Members, Meta
from retrieval.data.sources.assemble import Imported, ItemsBuilder, assemble
from retrieval.data.sources.lines import Progress, clean, clean_list, find, split_lines, title_and_year
from retrieval.data.sources.ratings import rating_log, read_numbers

LIKED = 8


def import_movietweets(source: Path, progress: Progress | None = None) -> Imported:
    """The data set of a folder with movies.dat and ratings.dat; label 1 if the rating is 8 or more."""
    refusals = Refusals()
    movies, ratings = find(source, "movies.dat"), find(source, "ratings.dat")
    builder = ItemsBuilder(movies.name, refusals, ("year",))
    for row, parts in split_lines(movies, "::", 3, refusals):
        title, year = title_and_year(clean(parts[1]))
        genres = ", ".join(clean_list(parts[2].split("|")))
        item_id = f"tt{parts[0].strip():0>7}" if parts[0].strip() else ""
        builder.add(row, item_id, title, film_text(genres, year), genres, numbers={"year": year})
    numbers = read_numbers(ratings, ("user", "movie", "rating", "timestamp"), refusals, "::", progress)
    log = rating_log(numbers, "user", "movie", (0, 10), LIKED, refusals, ("u", "tt:07"))
    meta = Meta(
        "movietweets", 0, 0, ("rating",), f"1 if the rating (0..10) is >= {LIKED}, else 0", "the rating, 0..10",
        extra={"source": "MovieTweetings", "time_granularity": "second"},
    )  # fmt: skip
    return assemble(meta, builder.items(), Members([]), log, refusals)


def film_text(genres: str, year: float | None) -> str:
    """ "Crime, Drama movie from 1994.": all that these sources say of a film besides its title."""
    what = f"{genres} movie" if genres else "Movie"
    return f"{what} from {year:.0f}." if year is not None else f"{what}."
