"""Packages that a configuration may name, since importing a module runs it."""

from __future__ import annotations

import os

from jsonargparse import set_parsing_settings

from lit_diffusion.errors import UserError

ALLOWED = ("lit_diffusion", "torch.optim", "lightning.pytorch")
"""Packages whose classes may be named by a configuration, or by a checkpoint's, which may be a stranger's. Each value
must also be a class of the kind that its key takes."""

ALLOW = "LIT_DIFFUSION_ALLOW"
"""Environment variable with further packages, separated by commas."""


def allow_packages() -> None:
    """Let class paths name the packages of :data:`ALLOWED` and :data:`ALLOW` and no others.

    Raises:
        UserError: if the variable does not hold names of packages.
    """
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed_packages())
    except ValueError as error:
        raise UserError(f"{ALLOW} is {os.environ[ALLOW]!r}; give names of packages separated by commas") from error


def allowed_packages() -> list[str]:
    """Names of all packages that a configuration may name."""
    return [*ALLOWED, *(name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip())]
