"""Sampling in batches of one fixed shape, by one or several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from lit_diffusion import interrupts
from lit_diffusion.denoisers import Guidance
from lit_diffusion.distributed import all_gather_objects, many_processes
from lit_diffusion.errors import UserError
from lit_diffusion.evaluation.model import GenerativeModel
from lit_diffusion.failures import AloneError, Failure, agree
from lit_diffusion.interrupts import Interrupted
from lit_diffusion.samplers.base import OnStep, Progress, Sampler, Strays


class DivergedError(UserError):
    """A sampler ended in NaN or infinity."""


@dataclass(frozen=True)
class Drawn:
    """A batch of samples.

    Attributes:
        indices: numbers of the samples, int64 ``[b]``.
        x: the samples ``[b, *shape]``, on the CPU.
        evaluations: network evaluations per sample.
        strays: samples far outside the data's range, in this batch of all processes.
    """

    indices: Tensor
    x: Tensor
    evaluations: int
    strays: Strays


@dataclass(frozen=True)
class Shard:
    """The share of one process in a number of samples.

    Attributes:
        indices: numbers of its samples, every world_size-th, int64 ``[n]``.
        batches: number of batches, the same on every process, if need be of samples that are dropped, since a sharded
            network is evaluated by all processes or by none.
    """

    indices: Tensor
    batches: int

    @classmethod
    def of(cls, count: int, batch_size: int, rank: int, world_size: int) -> Shard:
        """The share of process ``rank`` in samples ``0 .. count - 1``."""
        largest = math.ceil(count / world_size)
        return cls(torch.arange(count)[rank::world_size], math.ceil(largest / batch_size))


def generate_in_batches(
    method: GenerativeModel,
    samples: Tensor | Shard,
    seed: int,
    batch_size: int,
    sampler: Sampler | None = None,
    label: int | str | None = None,
    show_progress: bool = True,
    on_step: OnStep | None = None,
    class_counts: Sequence[int] | None = None,
    say: Callable[[str], None] = lambda line: None,
    guidance: Guidance | None = None,
) -> Iterator[Drawn]:
    """Samples of a seed, in order, batch by batch.

    All batches have the same shape, so that nothing is compiled or tuned twice: the last one is padded with further
    samples, which are dropped. At the end one line reports samples far outside the data's range, if any.

    Args:
        method: the model.
        samples: numbers of the samples, int64 ``[n]``; or this process's share of them: then all processes call it, and
            an error on one ends the work of all after the same batch.
        seed: the samples' seed.
        batch_size: samples at a time.
        sampler: the sampler; None for the method's default.
        label: class of all samples; None: by ``class_counts``.
        show_progress: if true, draw a progress bar.
        on_step: called after every sampler step.
        class_counts: number of data of each class, the proportions of the samples' classes, see
            :meth:`~lit_diffusion.methods.base.Method.condition_by_counts`; None: all classes in turn.
        say: prints one line.
        guidance: see :meth:`~lit_diffusion.methods.base.Method.generate`.

    Raises:
        DivergedError: if a sampler ended in NaN.
        Interrupted: if the run was asked to stop.
        AloneError: for any other failure among processes that share one network's weights.
        UserError: if the sampler does not fit.
    """
    sampler = sampler or method.sampler
    method.check_sampler(sampler)
    together = isinstance(samples, Shard)
    indices = samples.indices if isinstance(samples, Shard) else samples
    batches = samples.batches if isinstance(samples, Shard) else math.ceil(len(indices) / batch_size)
    size = max(1, min(batch_size, len(indices)))
    length = sampler.length(method.denoiser.process)
    name = f"sampling {len(indices)}"
    begun, astray = 0, Strays()
    with tqdm(total=length * batches, unit=" steps", desc=name, leave=None, disable=not show_progress) as bar:

        def stepped(progress: Progress) -> None:
            if not method.sharded:  # A sharded network's other processes wait for this one at every evaluation.
                _stop_if_asked()
            bar.update(begun + progress.step - bar.n)
            if on_step is not None:
                on_step(progress)

        for number in range(batches):
            if together:
                agree()  # Before the network: a sharded one would wait for a process that failed in the last batch.
            begun = number * length
            part = indices[number * size : (number + 1) * size]
            first = int(part[-1]) + 1 if len(part) else 0
            filled = torch.cat((part, first + torch.arange(size - len(part))))
            trouble: UserError | None = None
            strays = Strays()
            try:
                cond = method.condition_by_counts(filled, seed, class_counts, label)
                made = method.generate(filled, seed, cond, sampler, stepped, guidance)
                x, strays = made.x[: len(part)].cpu(), Strays.among(made.farthest[: len(part)])
                if not torch.isfinite(x).all():
                    trouble = DivergedError(
                        f"the sampler diverged (NaN or infinity among samples {int(part[0])} to {int(part[-1])}): "
                        f"choose smaller steps or other weights"
                    )
                _stop_if_asked()
            except Interrupted as caught:
                trouble = caught
            except Exception as error:
                if together and method.sharded and many_processes():
                    raise AloneError(
                        f"sampling failed ({Failure.of(error)}) with trainer.strategy fsdp, where the other processes "
                        f"wait for this one: the run ends; continue it from its last checkpoint"
                    ) from error
                raise
            if together:
                trouble, strays = _of_all(trouble, strays)
            astray += strays
            if trouble is not None:
                raise trouble
            yield Drawn(part, x, made.evaluations, strays)
    if astray.count:
        say(str(astray))


def _stop_if_asked() -> None:
    if (signal := interrupts.asked()) is not None:
        raise Interrupted(f"stopped by {signal} while sampling")


def _of_all(trouble: UserError | None, strays: Strays) -> tuple[UserError | None, Strays]:
    """The error of this process or of another, and the strays of all; all processes call it."""
    shares = all_gather_objects((isinstance(trouble, Interrupted), isinstance(trouble, DivergedError), strays))
    total = sum((share[2] for share in shares), Strays())
    if any(interrupted for interrupted, _, _ in shares):
        return trouble if isinstance(trouble, Interrupted) else Interrupted("another process was asked to stop"), total
    if any(diverged for _, diverged, _ in shares):
        return trouble or DivergedError("the sampler diverged on another process"), total
    return None, total
