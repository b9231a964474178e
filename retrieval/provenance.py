"""What a model's training has seen of a data set: the one check behind every command that meets a finished model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from index.errors import BrewlineError
from retrieval.data.schema import Dataset
from retrieval.learn.sessions import MADE_UP, NOTE
from retrieval.moments import moment_words

log = logging.getLogger(__name__)


class TrainedTooLate(BrewlineError):
    """A model was trained on events that it is about to be judged or taught on."""


def saw_past(training: Mapping[str, Any], dataset: Dataset, moment: int) -> bool:
    """Whether a model saw events of this data set at or after a moment (seconds).

    `training` is what its folder says (`data`, `cut`, `note`). Another data set's cut says nothing about this one, and made-up
    sessions have a clock of their own: both are False.
    """
    if training.get("data") != dataset.meta.name or _made_up(training) != (MADE_UP in dataset.meta.extra):
        return False
    return int(training.get("cut", moment)) > moment


def check_provenance(folder: Path, training: Mapping[str, Any], dataset: Dataset) -> None:
    """Returns if the model of a folder knows nothing at or after the data set's test cut.

    Raises TrainedTooLate with both times. A model of another data set is let in with a warning: transfer is legitimate, but
    only a person knows whether the two share events.
    """
    name, cut = dataset.meta.name, dataset.meta.cut_test
    if saw_past(training, dataset, cut):
        raise TrainedTooLate(
            f"{folder} was trained on {name} up to {moment_words(int(training['cut']))}, but here the test cut is "
            f"{moment_words(cut)}: it has seen what it would be judged on. Train it again on this folder, or evaluate on the "
            "folder it was trained for."
        )
    if training.get("data") != name:
        until = moment_words(int(training["cut"])) if "cut" in training else "an unknown time"
        log.warning(
            "%s was trained on %s up to %s, this folder is %s with its test cut at %s: make sure that they share no later events",
            *(folder, training.get("data", "unknown data"), until, name, moment_words(cut)),
        )


def _made_up(training: Mapping[str, Any]) -> bool:
    return str(training.get("note", "")).startswith(NOTE)
