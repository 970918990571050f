"""Two figures of the NCSN paper (Song and Ermon 2019, https://arxiv.org/abs/1907.05600), the truth beside the estimate.

Both need data whose score is known: ``GaussianMixturePoints`` in two dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_diffusion.callbacks.checkpoint import save_before
from lit_diffusion.callbacks.ema import averages_of
from lit_diffusion.callbacks.noise_levels import known_mixture, score_error
from lit_diffusion.denoisers import Denoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.errors import UserError
from lit_diffusion.methods.base import Method
from lit_diffusion.plots.figures import field_panel, new_figure, points_panel, render
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.runs.logger import run_logger_of, survived
from lit_diffusion.samplers import AnnealedLangevin, Langevin, Sampler
from lit_diffusion.training.sharding import ShardedStrategy


def mixture_of(trainer: pl.Trainer) -> GaussianMixture:
    """The distribution of the training data.

    Raises:
        UserError: if it is not a known mixture in the plane.
    """
    mixture = known_mixture(trainer)
    if mixture is None or mixture.dimension != 2:
        raise UserError("this figure compares with the true score: it needs data.source GaussianMixturePoints in 2-D")
    return mixture


class _AtEnd(pl.Callback, ABC):
    """Base class of figures drawn with the averaged weights at a training's end; ``setup`` refuses what would fail."""

    writes_to_run = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse data without a known score, and sharded weights, before the work."""
        mixture_of(trainer)
        if isinstance(trainer.strategy, ShardedStrategy):
            raise UserError(
                f"{type(self).__name__} draws on one process; with trainer.strategy fsdp none has the model"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the figure."""
        assert isinstance(pl_module, Method)
        if run_logger_of(trainer) is None or pl_module.interrupted:
            return
        save_before(trainer, pl_module)
        averages = averages_of(trainer)
        weights = averages.kept("ema")
        with survived(trainer, type(self).__name__):
            if not trainer.is_global_zero:
                return
            pl_module.eval()
            try:
                with averages.applied(pl_module, weights):
                    self.draw(trainer, pl_module, weights)
            finally:
                pl_module.train()

    @abstractmethod
    def draw(self, trainer: pl.Trainer, method: Method, weights: str) -> None:
        """Draw the figure and record its values."""


class ScoreField(_AtEnd):
    r"""The estimated against the true score field (Song and Ermon 2019, https://arxiv.org/abs/1907.05600, figure 2).

    Recorded in metrics.jsonl, event ``score_error``: ``score_error``, :math:`E |s - s^*|^2 / E |s^*|^2` under the
    smoothed density, and ``score_error_everywhere``, the same ratio over the whole square, most of which holds no data.

    Args:
        sigma: noise level to compare at; null: the process's smallest.
        half_side: half the side of the square that is drawn, centred at 0.

    Raises:
        UserError: for a half side that is not positive.
    """

    def __init__(self, sigma: float | None = None, half_side: float = 8.0) -> None:
        if half_side <= 0:
            raise UserError(f"half_side is {half_side}; it must be positive")
        self.sigma = sigma
        self.half_side = half_side

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse also a noise level that the process does not have."""
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, Method)
        self._time(pl_module)

    def _time(self, method: Method) -> float:
        process = method.denoiser.process
        return process.t_min if self.sigma is None else process.t_at_sigma(self.sigma)

    def draw(self, trainer: pl.Trainer, method: Method, weights: str) -> None:
        """Draw three panels: truth, estimate, error."""
        mixture, process = mixture_of(trainer), method.denoiser.process
        exact = ExactDenoiser(mixture, process)
        time = self._time(method)
        noise = SampleNoise(0, torch.arange(20_000), (2,), dtype=torch.float64)
        data = mixture.sample(noise.normal(), noise.uniform(()))
        t = torch.full((len(data),), time, dtype=torch.float64)
        x = process.perturb(data, t, noise.normal()).float().to(method.device)
        error, norm = score_error(method.denoiser, exact, x, t.to(method.device))

        grid = torch.linspace(-self.half_side, self.half_side, 100)
        plane = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1).view(-1, 2).to(method.device)
        t = torch.full((len(plane),), time, dtype=torch.float64, device=method.device)
        plane_error, plane_norm = score_error(method.denoiser, exact, plane, t)
        with torch.no_grad():
            truth, estimate = exact(plane, t), method.denoiser(plane, t)
        assert truth.energy is not None
        side = (len(grid), len(grid))
        density = (-truth.energy).exp().view(side).cpu().numpy()
        relative = (plane_error / plane_norm.clamp(min=1e-12)).sqrt().clamp(max=1.0).view(side).cpu().numpy()
        axis = grid.numpy()

        def arrows(score: Tensor) -> np.ndarray:
            # Lengths on a root scale: the field spans orders of magnitude and its direction is the point.
            unit = score / score.norm(dim=1, keepdim=True).clamp(min=1e-12).sqrt()
            return unit.view(*side, 2).cpu().numpy()

        values = {
            "score_error": float(error.mean() / norm.mean()),
            "score_error_everywhere": float(plane_error.mean() / plane_norm.mean()),
            "sigma": float(truth.coefficients.sigma[0]),
            "weights": weights,
        }
        figure, axes = new_figure(1, 3)
        field_panel(axes[0, 0], axis, arrows(truth.score), density, "true score, density shaded")
        field_panel(axes[0, 1], axis, arrows(estimate.score), density, "estimated score")
        field_panel(
            axes[0, 2], axis, arrows(estimate.score - truth.score), relative, "error, shaded by its relative size"
        )
        figure.suptitle(
            f"noise level {values['sigma']:.3g}: relative squared error {values['score_error']:.2g} under the density, "
            f"{values['score_error_everywhere']:.2g} over the square",
            fontsize=9,
        )
        run = run_logger_of(trainer)
        assert run is not None
        run.record("score_error", values)
        run.picture("score-field", render(figure), f"estimated and true score, weights {weights}", values)


class ModeWeights(_AtEnd):
    """Langevin against annealed Langevin samples: wrong and right mode weights.

    Song and Ermon 2019, https://arxiv.org/abs/1907.05600, figure 3. Both samplers take the same number of steps from
    the same uniform start, with the learned and with the true score. Recorded in metrics.jsonl, event ``mode_weights``:
    the share of samples in the first mode for each.

    Args:
        count: number of samples of each sampler.
        eta: step size of plain Langevin dynamics, ``x + (eta/2) s + sqrt(eta) z``, at the smallest noise level; null:
            the step size of the method's annealed sampler.
        half_side: half the side of the square that is drawn and that chains start in.

    Raises:
        UserError: for a count or half side that is not positive.
    """

    def __init__(self, count: int = 2000, eta: float | None = None, half_side: float = 8.0) -> None:
        if count < 1 or half_side <= 0:
            raise UserError(f"count {count} and half_side {half_side} must be positive")
        self.count = count
        self.eta = eta
        self.half_side = half_side

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse also samplers that do not fit the model."""
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, Method)
        self._samplers(pl_module)

    def _samplers(self, method: Method) -> tuple[Langevin, AnnealedLangevin]:
        annealed = method.sampler
        if not isinstance(annealed, AnnealedLangevin):
            raise UserError("ModeWeights compares with annealed Langevin dynamics: the method's sampler must be that")
        plain = Langevin(
            len(annealed.plan(method.denoiser.process)),
            annealed.eta if self.eta is None else self.eta,
            initial="uniform",
            uniform_range=(-self.half_side, self.half_side),
        )
        plain.check(method.denoiser)
        return plain, annealed

    def draw(self, trainer: pl.Trainer, method: Method, weights: str) -> None:
        """Draw two rows, learned and true score, of three columns: data, Langevin, annealed Langevin."""
        plain, annealed = self._samplers(method)
        mixture, process = mixture_of(trainer), method.denoiser.process
        noise = SampleNoise(0, torch.arange(self.count), (2,), dtype=torch.float64)
        data = mixture.sample(noise.normal(), noise.uniform(()))
        rows: list[tuple[str, Denoiser]] = [
            ("learned", method.denoiser),
            ("true", ExactDenoiser(mixture, process)),
        ]
        columns: list[tuple[str, Sampler]] = [("langevin", plain), ("annealed", annealed)]
        values: dict[str, Any] = {"data": self._first_mode(mixture, data), "weights": weights, "steps": plain.steps}
        figure, axes = new_figure(2, 3)
        limits = (-self.half_side - 1.0, self.half_side + 1.0)
        for row, (score_name, denoiser) in enumerate(rows):
            points_panel(axes[row, 0], data.numpy(), f"data: {values['data']:.3f} in the first mode", limits)
            for column, (sampler_name, sampler) in enumerate(columns, start=1):
                start = SampleNoise(1, torch.arange(self.count, device=method.device), (2,))
                x = sampler.sample(denoiser, start).x.cpu()
                share = values[f"{score_name}_{sampler_name}"] = self._first_mode(mixture, x)
                title = f"{sampler_name} with the {score_name} score: {share:.3f}"
                points_panel(axes[row, column], x.numpy(), title, limits)
        run = run_logger_of(trainer)
        assert run is not None
        run.record("mode_weights", values)
        run.picture("mode-weights", render(figure), f"Langevin and annealed Langevin, weights {weights}", values)

    @staticmethod
    def _first_mode(mixture: GaussianMixture, x: Tensor) -> float:
        return float((mixture.component_of(x) == 0).double().mean())
