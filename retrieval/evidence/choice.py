"""Which baselines stand in the table, by name, and with which settings: those that the validation window prefers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from retrieval.data.schema import MISSING_TIME, Dataset
from retrieval.evidence.als import Ials
from retrieval.evidence.baselines import Baseline, Ease, ItemNeighbours, Past, Random
from retrieval.evidence.blends import BLEND_QUERIES, TUNING_QUERIES, tuned, untuned_blends, validation_queries, weighted
from retrieval.evidence.popularity import Freshness, LivePopularity, Popularity
from retrieval.evidence.protocol import EvidenceError
from retrieval.evidence.rank import Progress
from retrieval.evidence.text_baselines import Bm25, TfIdf

DEFAULT = ("random", "popularity", "recent", "live", "freshness", "knn", "ease", "ials", "tfidf", "profile", "bm25", "blend")
ON_REQUEST = ("sasrec", "sentence")
NAMES = (*DEFAULT, *ON_REQUEST)
ALL = "all"
INSTALL = "pip install 'brewline[evaluate]'"


@dataclass(frozen=True)
class Choice:
    """Names of the baselines to run; `left_out` name -> why a default one is not among them though nobody took it out."""

    names: frozenset[str] = frozenset(DEFAULT)
    left_out: Mapping[str, str] = field(default_factory=dict)
    sentence_model: Path | None = None


def choose(wanted: Sequence[str] = (), unwanted: Sequence[str] = (), sentence_model: Path | None = None) -> Choice:
    """Returns the default baselines without the unwanted and with the wanted ones ("all" stands for every name in `unwanted`).

    Raises EvidenceError for an unknown name, a wanted baseline that cannot be run, or a blend without its parts.
    """
    if unknown := sorted({*wanted, *unwanted} - {*NAMES, ALL} | ({*wanted} & {ALL})):
        raise EvidenceError(f"There is no baseline {', '.join(map(repr, unknown))}; there are {', '.join(NAMES)}.")
    names = {name for name in DEFAULT if name not in unwanted and ALL not in unwanted} | {*wanted}
    names |= {"sentence"} if sentence_model is not None else set()
    if "sentence" in names and sentence_model is None:
        raise EvidenceError("The baseline 'sentence' needs a model: give its local folder with --sentence-model.")
    left_out = {}
    if "ials" in names and find_spec("implicit") is None:
        if "ials" in wanted:
            raise EvidenceError(f"The baseline 'ials' needs the library implicit: {INSTALL}.")
        left_out["ials"] = f"the library implicit is not installed: {INSTALL}"
    if "blend" in names and (missing := {"tfidf", "recent", "live"} - names | ({"knn or ease"} - _either(names))):
        raise EvidenceError(
            f"The blend is made of other baselines, and {', '.join(sorted(missing))} is out: add --without blend."
        )
    return Choice(frozenset(names - {*left_out}), left_out, sentence_model)


def _either(names: set[str]) -> set[str]:
    return {"knn or ease"} if names & {"knn", "ease"} else set()


def families(dataset: Dataset, choice: Choice | None = None) -> list[list[Baseline]]:
    """Returns the settings tried for each chosen model; a profile query only where members have words, freshness only where
    items have dates.

    Live popularity of the last week always stands in the table, whatever window validation prefers.
    """
    choice = choose() if choice is None else choice
    listed: list[tuple[str, list[Baseline]]] = [
        ("random", [Random()]),
        ("popularity", [Popularity()]),
        ("recent", [Popularity(float(days)) for days in (3, 7, 14, 30, 90, 365)]),
        ("live", [LivePopularity()]),
        ("live", [LivePopularity(days) for days in (1, 3, 7, 14, 30)]),
        ("live", [LivePopularity(half_life=days) for days in (2.0, 4.0, 7.0, 15.0, 30.0)]),
        ("knn", [ItemNeighbours(*tried) for tried in product((100, 1000), (0.0, 50.0), (0.7, 0.9, 1.0))]),
        ("ease", [Ease(*tried) for tried in product((20.0, 200.0, 2000.0), (0.7, 0.9, 1.0))]),
        ("ials", [Ials(*tried) for tried in product((0.1, 1.0, 10.0), (5.0, 20.0))]),
        ("tfidf", [TfIdf(decay) for decay in (0.5, 0.7, 0.9, 1.0)]),
        ("bm25", [Bm25(newest) for newest in (1, 5, 20)]),
    ]
    if (dataset.items.created_at != MISSING_TIME).any():
        listed.append(("freshness", [Freshness()]))
    if dataset.members.profile:
        listed.append(("profile", [TfIdf(decay, weight) for decay, weight in product((0.9, 1.0), (0.2, 1.0))]))
    chosen = [tried for name, tried in listed if name in choice.names]
    return [*chosen, *_costly(choice)]


def _costly(choice: Choice) -> list[list[Baseline]]:
    """What is only run on request, because it loads torch and takes minutes."""
    listed: list[list[Baseline]] = []
    if "sasrec" in choice.names:
        from retrieval.evidence.sasrec import Sasrec

        listed.append([Sasrec()])
    if choice.sentence_model is not None:
        from retrieval.evidence.sentence import SentenceModel, load_sentence_model

        model, name = load_sentence_model(choice.sentence_model), choice.sentence_model.resolve().name
        listed.append([SentenceModel(model, name, newest) for newest in (1, 5, 20)])
    return listed


def choose_baselines(dataset: Dataset, progress: Progress | None = None, choice: Choice | None = None) -> list[Baseline]:
    """Returns one baseline per chosen family and the two blends, all settings chosen on the validation window.

    Where that window asks nothing, the first setting of each family is used (the blends weigh their parts equally).
    """
    choice = choose() if choice is None else choice
    listed = families(dataset, choice)
    past, queries = Past(dataset, "valid"), validation_queries(dataset)
    total = len(listed) + 2 * ("blend" in choice.names)
    chosen: list[Baseline] = []
    for done, tried in enumerate(listed):
        one = tried[0] if queries is None else tuned(tried, past, queries.sample(TUNING_QUERIES))
        chosen += [] if one in chosen else [one]
        if progress is not None:
            progress(done + 1, total)
    for done, blends in enumerate(untuned_blends(chosen, past, queries) if "blend" in choice.names else []):
        chosen.append(blends[0] if queries is None else weighted(blends, past, queries.sample(BLEND_QUERIES)))
        if progress is not None:
            progress(len(listed) + done + 1, total)
    return chosen
