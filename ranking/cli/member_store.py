"""The option that names a member store: one variable of the environment for every command that takes it."""

from __future__ import annotations

from typing import Annotated

import typer

MEMBERS_VARIABLE = "BREWLINE_MEMBERS"
"""Where a URL with a password belongs: options show in `ps`."""
MembersUrl = Annotated[
    str | None,
    typer.Option(
        help="The member store: sqlite:PATH or redis://HOST. Default: in the --store folder.",
        metavar="URL",
        envvar=MEMBERS_VARIABLE,
    ),
]
