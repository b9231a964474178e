"""The laws of the synthetic world: who is shown what, and what they then do.

The generator draws from `Truth` and nothing else, so the probabilities kept here are those that made the log. An oracle
that ranks by them is the ceiling of every model. Written out in `docs/world.md`. numpy only, nothing pickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.data.schema import DAY, DataError

ACTIONS = ("like", "comment", "share", "long_view")
FORMATS = ("article", "video", "photo", "document", "poll")
FOLDER = "truth"

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Law:
    """Every constant of the world's probabilities. Tuples follow ACTIONS and FORMATS; times are days.

    `show_*` are weights in the log of the exposure weight, `want_*` weights in the utility behind all actions.
    """

    slots: int = 8
    attention: tuple[float, ...] = (1.0, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7)
    half_affinity: float = 0.12
    drift: float = 0.35
    show_affinity: float = 2.0
    show_quality: float = 0.35
    show_trend: float = 0.3
    show_connected: float = 0.8
    want_affinity: float = 4.7
    want_quality: float = 0.2
    want_connected: float = 0.3
    base: tuple[float, ...] = (-4.75, -6.95, -7.15, -5.45)
    slope: tuple[float, ...] = (1.0, 1.1, 1.05, 1.1)
    connected_extra: tuple[float, ...] = (0.2, 0.7, 0.0, -0.1)
    format_extra: tuple[tuple[float, ...], ...] = (
        (0.0, 0.05, 0.2, -0.05, -0.1),
        (0.05, 0.0, -0.05, -0.1, 0.5),
        (0.1, 0.15, -0.05, 0.2, -0.3),
        (0.1, 0.4, -0.5, 0.2, -0.5),
    )
    ramp: float = 0.5
    fade: float = 2.0
    evergreen_fade: float = 30.0
    life: float = 8.0
    evergreen_life: float = 60.0


@dataclass(frozen=True)
class Truth:
    """What the world knows and a model must guess. M members, N items, K topics, F formats, I impressions, X engagements.

    theta_first, theta_last float64 [M, K] interests at the start and where they drift to; phi float64 [N, K] topics of a post
    (rows sum to 1); trend float64 [days, K]; quality float64 [N]; format int32 [N]; author int32 [N] (member row);
    evergreen bool [N]; created int64 [N] seconds; taste float64 [M, F]; ease float64 [M]; edge_member (sorted), edge_other
    int32 [C] and edge_since int64 [C]; event int64 [I] event ids of the impressions, with p_label float64 [I] and
    p_action float64 [I, A]; done_member, done_item int32 [X] and done_time int64 [X]: what was engaged with, and when.
    """

    law: Law
    start: int
    theta_first: F64
    theta_last: F64
    phi: F64
    trend: F64
    quality: F64
    format: I32
    author: I32
    evergreen: Bools
    created: I64
    taste: F64
    ease: F64
    edge_member: I32
    edge_other: I32
    edge_since: I64
    event: I64
    p_label: F64
    p_action: F64
    done_member: I32
    done_item: I32
    done_time: I64

    @property
    def life(self) -> I64:
        """Int64 [N]: seconds after its creation during which a post can be shown."""
        days = np.where(self.evergreen, self.law.evergreen_life, self.law.life)
        return np.round(days * DAY).astype(np.int64)

    def alive(self, first: int, last: int) -> I64:
        """Rows of the items that can be shown at some time in [first, last]."""
        return np.flatnonzero((self.created <= last) & (self.created + self.life > first))

    def affinity(self, member: I64, time: I64, item: I64) -> F64:
        """Float64 [B, n] in [0, 1): how well the topics of n items fit the interests of B members at their times."""
        moved = np.clip((time - self.start) / (len(self.trend) * DAY), 0.0, 1.0) * self.law.drift
        theta = self.theta_first[member] * (1 - moved[:, None]) + self.theta_last[member] * moved[:, None]
        return 1.0 - np.exp2(-(theta @ self.phi[item].T) / self.law.half_affinity)

    def connected(self, member: I64, time: I64, item: I64) -> Bools:
        """Bool [B, n]: the member had an edge to the item's author before the time."""
        first = np.searchsorted(self.edge_member, member, "left")
        count = np.searchsorted(self.edge_member, member, "right") - first
        row = np.repeat(np.arange(len(member)), count)
        edge = np.arange(len(row)) + np.repeat(first - (np.cumsum(count) - count), count)
        met = self.edge_since[edge] < time[row]
        mark = np.zeros((len(member), len(self.theta_first)), np.bool_)
        mark[row[met], self.edge_other[edge[met]]] = True
        return mark[:, self.author[item]]

    def exposure(self, time: I64, item: I64, fit: F64, known: Bools) -> F64:
        """Float64 [B, n]: weight with which one slot of a request draws each item; 0 before its birth and after its life.

        `fit` and `known` are what `affinity` and `connected` say of the same rows and times.
        """
        law = self.law
        age = (time[:, None] - self.created[item]) / DAY
        fade = np.where(self.evergreen, law.evergreen_fade, law.fade)[item]
        can = (age >= 0) & (age * DAY < self.life[item])
        old = np.maximum(age, 0.0)
        day = np.clip((time - self.start) // DAY, 0, len(self.trend) - 1)
        score = law.show_affinity * fit + law.show_quality * self.quality[item] + law.show_connected * known
        score += law.show_trend * (self.trend[day] @ self.phi[item].T) - old / fade
        return np.where(can, (1.0 - np.exp(-old / law.ramp)) * np.exp(score), 0.0)

    def wish(self, member: I64, item: I64, fit: F64, known: Bools) -> F64:
        """Float64 [A, ...]: probability of each action once the member looks at the slot; the actions are independent then.

        All four arguments have (or broadcast to) one shape; `fit` and `known` as in `exposure`.
        """
        law = self.law
        form = self.format[item]
        want = law.want_affinity * fit + law.want_quality * self.quality[item] + law.want_connected * known
        want = want + self.taste[member, form] + self.ease[member]
        extra = np.array(law.format_extra)
        logits = [
            law.base[a] + law.slope[a] * want + extra[a][form] + law.connected_extra[a] * known for a in range(len(ACTIONS))
        ]
        return 1.0 / (1.0 + np.exp(-np.stack(logits)))

    def engage_scores(self, member: int, timestamp: int) -> F64:
        """Float64 [N]: probability that a request of the member (row) at that time ends in an engagement with each item.

        Probability of standing in a slot times attention there times the chance of at least one action; 0 for items that do
        not exist then and for what the member engaged with before. Ranking by it is the retrieval ceiling.
        """
        item = self.alive(timestamp, timestamp)
        who, when = np.array([member]), np.array([timestamp])
        fit, known = self.affinity(who, when, item), self.connected(who, when, item)
        weight = self.exposure(when, item, fit, known)[0]
        before = (self.done_member == member) & (self.done_time < timestamp)
        weight[np.isin(item, self.done_item[before])] = 0.0
        share = weight / max(weight.sum(), np.finfo(np.float64).tiny)
        seen = np.zeros(len(item))
        for slot, look in enumerate(self.law.attention):
            seen += look * share * (1.0 - share) ** slot
        scores = np.zeros(len(self.phi))
        scores[item] = seen * (1.0 - np.prod(1.0 - self.wish(who, item, fit[0], known[0]), axis=0))
        return scores

    def label_probability(self, event_id: I64) -> F64:
        """Float64 [E]: the true P(label = 1) of each event id; NaN where the event is not an impression."""
        order = np.argsort(self.event)
        at = np.minimum(np.searchsorted(self.event, event_id, sorter=order), len(self.event) - 1)
        row = order[at]
        return np.where(self.event[row] == event_id, self.p_label[row], np.nan)


_ARRAYS = tuple(f.name for f in fields(Truth) if f.name not in ("law", "start"))


def write_truth(truth: Truth, folder: Path) -> None:
    """Write one .npy per array and truth.json (law and names) under `folder`/truth."""
    home = folder / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    for name in _ARRAYS:
        np.save(home / f"{name}.npy", getattr(truth, name), allow_pickle=False)
    told = {"start": truth.start, "actions": ACTIONS, "formats": FORMATS, "law": asdict(truth.law)}
    (home / "truth.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def read_truth(folder: Path) -> Truth:
    """Return what `write_truth` wrote beside a data folder; DataError if a part is missing or broken."""
    home = folder / FOLDER
    try:
        told = json.loads((home / "truth.json").read_text(encoding="utf-8"))
        arrays = {name: np.load(home / f"{name}.npy", allow_pickle=False) for name in _ARRAYS}
        law = Law(**{name: _tuples(value) for name, value in told["law"].items()})
        return Truth(law=law, start=int(told["start"]), **arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{home}: no readable truth of a synthetic world ({error}); expected what `brewline data world` writes. "
            "Make the world again, or do without the oracle."
        ) from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
