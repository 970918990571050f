"""``fetch``: the only command that downloads."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lit_diffusion.data.download import fetch
from lit_diffusion.errors import UserError

USAGE = """usage: python -m lit_diffusion fetch data NAME
       python -m lit_diffusion fetch weights NAME

Downloads a data set, checked against its checksums, into $LIT_DIFFUSION_DATA (default ~/.cache/lit_diffusion/data).
NAME is CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN, CelebA, or OWNER/NAME of a data set of the Hugging Face hub.
Nothing else in lit_diffusion downloads anything. No metric needs weights yet, so there are none to fetch."""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        UserError: for anything that cannot be fetched.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)  # noqa: T201 (this is its output)
        return
    kind, *names = arguments
    if kind not in ("data", "weights") or len(names) != 1:
        raise UserError("fetch takes what and its name: python -m lit_diffusion fetch data CIFAR10")
    if kind == "weights":
        raise UserError(f"there are no weights {names[0]!r} to fetch: no metric of this version needs any")
    root = fetch(names[0])
    sys.stdout.write(f"{names[0]} is in {root}\n")
