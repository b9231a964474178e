"""The check of a folder that a long command writes into at its end."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def out_folder(out: Path | None) -> Path | None:
    """Returns the folder if it can be made and written into; nothing is made yet.

    Raises BadParameter otherwise, before hours are spent on what goes there.
    """
    if out is None:
        return None
    whole = out.absolute()
    near = next(place for place in (whole, *whole.parents) if os.access(place, os.F_OK))
    if not (near.is_dir() and os.access(near, os.W_OK | os.X_OK)):
        seen = "may not be written into" if near.is_dir() else "is a file"
        raise typer.BadParameter(f"{near} {seen}; name a folder of your own, it is made if it is missing")
    return out
