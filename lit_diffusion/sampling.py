"""Many samples from a method, batch by batch, at one fixed batch shape."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from lit_diffusion.errors import UserError
from lit_diffusion.methods.base import Method
from lit_diffusion.samplers.base import Progress, Sampler


class DivergedError(UserError):
    """A walk ended in NaN or infinity."""


def generate_in_batches(
    method: Method,
    indices: Tensor,
    seed: int,
    batch_size: int,
    sampler: Sampler | None = None,
    label: int | None = None,
    show_progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples number ``indices`` of a seed, in order, on the CPU: the next numbers ``[b]`` and samples ``[b, *shape]``.

    The network always sees the same batch shape, so that nothing is compiled or tuned twice: the last batch is filled
    up with further samples, which are dropped.

    Raises:
        DivergedError: if a walk ended in NaN.
        UserError: if the sampler does not fit.
    """
    sampler = sampler or method.sampler
    sampler.check(method.denoiser)
    parts = indices.split(batch_size) if len(indices) else ()
    length = sampler.length(method.denoiser.process)
    name = f"sampling {len(indices)}"
    with tqdm(total=length * len(parts), unit=" steps", desc=name, leave=None, disable=not show_progress) as bar:

        def on_step(progress: Progress) -> None:
            bar.update(begun + progress.step - bar.n)

        for number, part in enumerate(parts):
            begun = number * length
            missing = min(batch_size, len(indices)) - len(part)
            filled = torch.cat((part, part[-1] + 1 + torch.arange(missing)))
            x = method.generate(filled, seed, method.condition(filled, label), sampler, on_step)[: len(part)].cpu()
            if not torch.isfinite(x).all():
                raise DivergedError(
                    f"the sampler diverged (NaN or infinity among samples {int(part[0])} to {int(part[-1])}): "
                    f"choose smaller steps or other weights"
                )
            yield part, x
