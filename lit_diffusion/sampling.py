"""Many samples from a method, batch by batch, at one fixed batch shape."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from lit_diffusion.errors import UserError
from lit_diffusion.methods.base import Method
from lit_diffusion.samplers.base import Progress, Sampler


def generate_in_batches(
    method: Method,
    count: int,
    seed: int,
    batch_size: int,
    sampler: Sampler | None = None,
    label: int | None = None,
    show_progress: bool = True,
) -> Iterator[Tensor]:
    """Samples ``0 .. count - 1`` of a seed, in order, ``[b, *shape]`` at a time on the CPU.

    The network always sees the same batch shape, so that nothing is compiled or tuned twice: the last batch is filled
    up with further samples, which are dropped.

    Raises:
        UserError: if the sampler does not fit, or its walk ended in NaN.
    """
    sampler = sampler or method.sampler
    sampler.check(method.denoiser)
    batch_size = min(batch_size, count)
    starts = range(0, count, batch_size)
    length = sampler.length(method.denoiser.process)
    with tqdm(total=length * len(starts), unit=" steps", desc=f"sampling {count}", disable=not show_progress) as bar:

        def on_step(progress: Progress) -> None:
            bar.update(begun + progress.step - bar.n)

        for number, start in enumerate(starts):
            begun = number * length
            indices = torch.arange(start, start + batch_size)
            cond = method.condition(indices, label)
            x = method.generate(indices, seed, cond, sampler, on_step)[: count - start].cpu()
            if not torch.isfinite(x).all():
                raise UserError(
                    f"the sampler diverged (NaN or infinity among samples {start} to {start + len(x) - 1}): "
                    f"choose smaller steps or other weights"
                )
            yield x
