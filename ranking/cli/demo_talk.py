"""What the demo asks its server, and how the answers are shown: history beside recommendations, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ranking.cli.output import words
from ranking.serving.client import Client, Row
from retrieval.data.read import read_dataset
from retrieval.data.schema import Dataset, Engagement, Item, Member, MemberView

SHOWN = 6
TIMED = 20
FANOUT = 500


@dataclass(frozen=True)
class Question:
    """One member put to the server: a known id or a view of a stranger, with the member's own wish."""

    title: str
    member: str | MemberView
    history: Sequence[Item]
    instruction: str = ""


def talk(folder: Path, port: int) -> dict[str, Any]:
    """Asks a few members' questions and times some more."""
    dataset = read_dataset(folder)
    with Client(f"127.0.0.1:{port}") as client:
        conversations = [_ask(client, question) for question in questions(dataset)]
        times = [
            client.recommend(member, k=10, fanout=FANOUT, readable=False).times for member in _known_members(dataset)[:TIMED]
        ]
    stages = list(times[0]) if times else []
    spent = {stage.removesuffix("_us"): [one[stage] / 1000 for one in times] for stage in stages}
    latencies = {stage: {"p50": float(np.median(ms)), "max": max(ms)} for stage, ms in spent.items()}
    return {"conversations": conversations, "latencies_ms": latencies}


def questions(dataset: Dataset) -> list[Question]:
    """A warm member, the same with an own wish, and a cold one: whoever the folder has."""
    asked = []
    for member in _known_members(dataset)[:1]:
        history = _history(dataset, member)
        asked.append(Question(f"a warm member, {member}", member, history))
        wish = f"more like this: {history[-1].category or history[-1].title}"
        asked.append(Question(f"{member} with an own wish", member, history, wish))
    profiles = [row for row in range(len(dataset.members)) if dataset.members[row].profile]
    profile = dataset.members[profiles[-1]].profile if profiles else {}
    stranger = MemberView(Member("a stranger", profile))
    asked.append(Question("a cold member: a profile, no history" if profile else "a stranger: nothing known", stranger, ()))
    if not len(dataset.events):
        seed = dataset.items[0]
        asked.append(Question("a visitor who looked at one item", _visitor(seed), (seed,)))
    return asked


def _visitor(item: Item) -> MemberView:
    return MemberView(Member("a visitor"), (Engagement(item, 0, ""),))


def _known_members(dataset: Dataset) -> list[str]:
    """Member ids from the longest history to shorter ones, leaving out the longest two percent (often machines)."""
    counts = np.bincount(dataset.engagements.member, minlength=len(dataset.members))
    order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    return [dataset.members.member_id[row] for row in order[len(order) // 50 :].tolist()]


def _history(dataset: Dataset, member: str) -> list[Item]:
    log = dataset.engagements
    mine = log.item[log.member == dataset.members.row_of[member]]
    return [dataset.items[row] for row in dict.fromkeys(mine.tolist())]


def _ask(client: Client, question: Question) -> dict[str, Any]:
    answer = client.recommend(
        question.member, k=SHOWN, fanout=FANOUT, instruction=question.instruction, readable=True, deadline_ms=60_000
    )
    return {
        "title": question.title,
        "instruction": question.instruction,
        "history": [item.title or item.item_id for item in question.history[-SHOWN:]],
        "recommended": [_row(row) for row in answer.rows],
        "degraded": answer.degraded.name,
        "times_us": dict(answer.times),
        "candidates": answer.candidates,
        "ranker": answer.ranker,
    }


def _row(row: Row) -> dict[str, Any]:
    return {"item_id": row.item_id, "title": row.title, "probability": row.probability, "score": row.score}


def conversation(spoken: Mapping[str, Any]) -> Table:
    """History on the left, newest last; recommendations on the right, best first."""
    wish = f', who says "{spoken["instruction"]}"' if spoken["instruction"] else ""
    table = Table(title=words(f"{spoken['title']}{wish}: {spoken['candidates']} candidates"), title_justify="left")
    for name in ("history, newest last", "recommended, best first", "probability", "similarity"):
        table.add_column(name, max_width=48)
    for place in range(max(len(spoken["history"]), len(spoken["recommended"]))):
        past = spoken["history"][place] if place < len(spoken["history"]) else ""
        cells = ["", "", ""]
        if place < len(spoken["recommended"]):
            row = spoken["recommended"][place]
            cells = [row["title"] or row["item_id"], *(_number(row[name]) for name in ("probability", "score"))]
        table.add_row(words(past, 48), words(cells[0], 48), *cells[1:])
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def latencies(spent: Mapping[str, Mapping[str, float]]) -> Table:
    """Milliseconds of each stage over the timed requests."""
    table = Table(title=f"Milliseconds of a request ({FANOUT} candidates)", title_justify="left")
    for name in ("stage", "median", "slowest"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, times in spent.items():
        table.add_row(stage, f"{times['p50']:.1f}", f"{times['max']:.1f}")
    return table
