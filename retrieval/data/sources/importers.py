"""The table of importers: one name and one function for each public data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from retrieval.data.schema import DataError
from retrieval.data.sources.amazon import import_amazon
from retrieval.data.sources.assemble import Imported
from retrieval.data.sources.goodbooks import import_goodbooks
from retrieval.data.sources.lines import Progress
from retrieval.data.sources.mind import import_mind
from retrieval.data.sources.movielens import import_movielens
from retrieval.data.sources.movietweets import import_movietweets
from retrieval.data.sources.steam import import_steam

Importer = Callable[[Path, Progress | None], Imported]

IMPORTERS: Mapping[str, Importer] = {
    "movietweets": import_movietweets,
    "movielens": import_movielens,
    "goodbooks": import_goodbooks,
    "mind": import_mind,
    "amazon": import_amazon,
    "steam": import_steam,
}


def importer(kind: str) -> Importer:
    """The importer of that name. Raises DataError, with the names there are, for another one."""
    if kind not in IMPORTERS:
        raise DataError(f"no importer is named {kind!r}; there are {', '.join(IMPORTERS)} and csv")
    return IMPORTERS[kind]
