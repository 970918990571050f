"""A sampler on a process of its own, whatever the one that a network was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_diffusion.denoisers import Denoiser, OtherProcess
from lit_diffusion.errors import UserError
from lit_diffusion.processes import PowerVE, Process
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers.base import Move, Run, Sampler
from lit_diffusion.samplers.ode import Heun, refuse_grid_only


class OnProcess(Sampler):
    r"""A sampler on a process of its own: another schedule and scaling of the noise than a network was trained on.

    The trajectory is made on ``process``, and the network is asked at the times of its own process with the same
    :math:`\sigma / \alpha`, see :class:`~lit_diffusion.denoisers.OtherProcess`. EDM samples networks of
    score-SDEs and of DDPM so (Karras et al. 2022, https://arxiv.org/abs/2206.00364, section 3 and table 1).

    Args:
        sampler: what samples there; null: EDM's, Heun's method in 17 steps of ``karras:7`` and the posterior mean.
        process: the process of the trajectory, in continuous time; null: EDM's, ``PowerVE`` from 0.002 to 80.

    Raises:
        UserError: for a process on a grid.
    """

    def __init__(self, sampler: Sampler | None = None, process: Process | None = None) -> None:
        self.sampler = Heun(steps=17, denoise=True, spacing="karras:7") if sampler is None else sampler
        self.process = PowerVE() if process is None else process
        if self.process.num_timesteps is not None:
            raise UserError(
                f"process: a sampler's own process is in continuous time, and this one has "
                f"{self.process.num_timesteps} timesteps: set its num_timesteps null, or choose another"
            )
        self.adaptive = self.sampler.adaptive
        self.takes = self.sampler.takes

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse a network that does not know the noise levels of the process, and what the sampler refuses."""
        refuse_grid_only(denoiser, "a sampler on a process of its own")
        times = torch.tensor([float(t) for move in plan for t in (move.t, move.s)], dtype=torch.float64)
        # No network is asked at time 0, of the data themselves.
        ratio = torch.exp(-0.5 * self.process.log_snr(times[times > 0.0]))
        for end in (ratio.min(), ratio.max()):
            denoiser.process.t_at_sigma(float(end))
        self.sampler.require_fit(OtherProcess(denoiser, self.process), plan)

    def start(self, process: Process, noise: SampleNoise) -> Tensor:
        """The sampler's own start, on its process."""
        return self.sampler.start(self.process, noise)

    def plan(self, process: Process) -> Sequence[Move]:
        """The sampler's moves on its process."""
        return self.sampler.plan(self.process)

    def begin(self, run: Run) -> None:
        """Read the denoiser on the sampler's process, and begin the sampler, whose state the run's is."""
        run.denoiser = OtherProcess(run.denoiser, self.process)
        self.sampler.begin(run)

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """The sampler's step."""
        return self.sampler.step(run, x, move)

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The sampler's end."""
        return self.sampler.finish(run, x)
