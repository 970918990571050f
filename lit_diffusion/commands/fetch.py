"""``fetch``: the only command that downloads."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lit_diffusion.data.download import fetch
from lit_diffusion.errors import UserError
from lit_diffusion.metrics.weights import fetch_weights

USAGE = """usage: python -m lit_diffusion fetch data NAME
       python -m lit_diffusion fetch weights NAME

data: a data set, checked against its checksums, into $LIT_DIFFUSION_DATA (default ~/.cache/lit_diffusion/data). NAME is
CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN, CelebA, or OWNER/NAME of a data set of the Hugging Face hub.
weights: a network in whose features samples are evaluated, checked against the published sha256, into
$LIT_DIFFUSION_WEIGHTS (default ~/.cache/lit_diffusion/weights). NAME is inception (96 MB), vgg16 (553 MB), dinov2
(1.2 GB) or clip (354 MB). Nothing else in lit_diffusion downloads anything."""


def main(arguments: Sequence[str]) -> None:
    """Run ``fetch``.

    Raises:
        UserError: for anything that cannot be fetched.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)  # noqa: T201 (this is its output)
        return
    kind, *names = arguments
    if kind not in ("data", "weights") or len(names) != 1:
        raise UserError("fetch takes data or weights, and a name: python -m lit_diffusion fetch data CIFAR10")
    where = fetch_weights(names[0]) if kind == "weights" else fetch(names[0])
    sys.stdout.write(f"{names[0]} is in {where}\n")
