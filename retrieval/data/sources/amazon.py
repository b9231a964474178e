"""Amazon product reviews, editions 2018 and 2023: one file of reviews, one of products, a JSON object per line, gzip or not.

2018: `Luxury_Beauty.json.gz` (`reviewerID, asin, overall, unixReviewTime`), `meta_Luxury_Beauty.json.gz` (`asin, title,
brand, category, description, feature, price, date`). 2023: `All_Beauty.jsonl.gz` (`user_id, parent_asin, rating,
timestamp` in milliseconds), `meta_All_Beauty.jsonl.gz` (`parent_asin, title, store, categories, description, features,
price, details`). Averages, ranks and counts of the crawl are later than the events and are left out; so are names and
review texts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from retrieval.data.refusals import Refusals
from retrieval.data.schema import DataError, Members, Meta
from retrieval.data.sources.assemble import Imported, ItemsBuilder, LogBuilder, assemble
from retrieval.data.sources.dates import written_day
from retrieval.data.sources.lines import Progress, clean, clean_list, parsed

LIKED = 4
PATTERNS = ("*.json", "*.jsonl", "*.json.gz", "*.jsonl.gz")
_PRICE = re.compile(r"^\$?(\d{1,3}(?:,\d{3})+|\d{1,7})(\.\d{1,2})?$", re.ASCII)


def import_amazon(source: Path, progress: Progress | None = None) -> Imported:
    """The data set of a folder with one file of reviews and one `meta_` file; label 1 if the rating is 4 or more."""
    refusals = Refusals()
    reviews, products = _files(source)
    builder = ItemsBuilder(products.name, refusals, ("price",))
    for row, product in parsed(products, _object, "a JSON object", refusals, progress):
        _add_product(builder, row, product)
    log = LogBuilder(reviews.name)
    for row, review in parsed(reviews, _object, "a JSON object", refusals, progress):
        _add_review(log, row, review, refusals)
    meta = Meta(
        "amazon", 0, 0, ("rating",), f"1 if the rating (1..5) is >= {LIKED}, else 0", "the rating, 1..5",
        extra={"source": f"Amazon reviews, {reviews.name}"},
    )  # fmt: skip
    return assemble(meta, builder.items(), Members([]), log.log(), refusals)


def _files(source: Path) -> tuple[Path, Path]:
    """(reviews, products)."""
    found = sorted({path for pattern in PATTERNS for path in source.glob(pattern)})
    products = [path for path in found if path.name.startswith("meta")]
    reviews = [path for path in found if path not in products]
    if len(products) != 1 or len(reviews) != 1:
        seen = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{source}: expected one review file and one file meta_* ({', '.join(PATTERNS)}); seen: {seen}")
    return reviews[0], products[0]


def _object(line: str) -> dict[str, object]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return value


def _add_product(builder: ItemsBuilder, row: int, product: Mapping[str, object]) -> None:
    details = product.get("details")
    day = details.get("Date First Available") if isinstance(details, dict) else product.get("date")
    described = clean(" ".join(clean_list(product.get("description"))))
    features = "; ".join(clean_list(product.get("features", product.get("feature"))))
    categories = clean_list(product.get("categories", product.get("category")))
    main = clean_list(product.get("main_category", product.get("main_cat")))
    builder.add(
        row,
        clean(product.get("parent_asin", product.get("asin"))),
        clean(product.get("title")),
        " ".join(part for part in (described, f"Features: {features}." if features else "") if part),
        ", ".join(dict.fromkeys([*main, *categories])),
        clean(product.get("store", product.get("brand"))),
        written_day(clean(day)),
        {"price": _price(product.get("price"))},
    )


def _price(value: object) -> float | None:
    match = _PRICE.match(clean(value))
    return float(match[1].replace(",", "") + (match[2] or "")) if match else None


def _add_review(log: LogBuilder, row: int, review: Mapping[str, object], refusals: Refusals) -> None:
    member = clean(review.get("user_id", review.get("reviewerID")))
    item = clean(review.get("parent_asin", review.get("asin")))
    rating = _number(review.get("rating", review.get("overall")))
    old, new = _number(review.get("unixReviewTime")), _number(review.get("timestamp")) / 1000
    time = new if math.isnan(old) else old
    if not member or not item:
        refusals.one(log.file, row, "review without a member or a product")
    elif not 1 <= rating <= 5:
        refusals.one(log.file, row, "rating is not in 1 .. 5", rating)
    elif not 0 <= time < 2.0**40:
        refusals.one(log.file, row, "review without a time", time)
    else:
        log.add(row, member, item, int(time), f"rating:{rating:g}", int(rating >= LIKED), rating)


def _number(value: object) -> float:
    """The number; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < 2.0**53 else math.nan
