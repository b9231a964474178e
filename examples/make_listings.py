"""Writes an invented listing site as one CSV table: `python examples/make_listings.py listings.csv [ROWS]`."""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

KINDS = {
    "bicycles": ("road bike", "cargo bike", "mountain bike", "folding bike", "e-bike"),
    "furniture": ("oak table", "bookshelf", "armchair", "wardrobe", "desk"),
    "music": ("acoustic guitar", "piano", "drum kit", "violin", "turntable"),
    "gardening": ("greenhouse", "lawn mower", "compost bin", "fruit trees", "garden tools"),
    "computers": ("laptop", "graphics card", "monitor", "mechanical keyboard", "server"),
    "kitchen": ("espresso machine", "stand mixer", "cast iron pan", "knife set", "dinner plates"),
    "children": ("pram", "wooden railway", "bunk bed", "puzzle", "balance bike"),
    "outdoors": ("tent", "climbing rope", "kayak", "sleeping bag", "hiking boots"),
}
STATES = ("as new", "hardly used", "with traces of use", "for repair", "restored by hand")
REASONS = (
    "we are moving",
    "a gift we never used",
    "the children have grown",
    "bought the wrong size",
    "need the space",
    "upgraded",
)
TOWNS = ("Almere", "Bergen", "Cluj", "Dresden", "Evora", "Fulda", "Gent", "Huesca")


def main() -> None:
    path, rows = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5_000
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "name", "description", "section", "seller", "price"])
        for row in range(rows):
            section = draw.choice(list(KINDS))
            thing, state, town = draw.choice(KINDS[section]), draw.choice(STATES), draw.choice(TOWNS)
            words = f"{thing}, {state}, {draw.choice(REASONS)}; pick up in {town} or pay for shipping"
            price = round(draw.lognormvariate(4, 1), 2)
            writer.writerow([f"L{row:05d}", f"{thing} {state}", words, section, f"seller {draw.randrange(800)}", price])


if __name__ == "__main__":
    main()
