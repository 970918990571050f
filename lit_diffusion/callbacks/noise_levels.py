"""Training at each noise level: loss, gradient norm and, where the true score is known, the score's error."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_diffusion.callbacks.periodic import PeriodicCallback
from lit_diffusion.data import GaussianMixturePoints
from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.errors import UserError
from lit_diffusion.methods.base import Method
from lit_diffusion.plots.figures import lines_panel, new_figure, render
from lit_diffusion.randomness import keyed_normal
from lit_diffusion.runs.clock import Cadence
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.logger import run_logger_of
from lit_diffusion.training.datamodule import Batch, DataModule


def known_mixture(trainer: pl.Trainer) -> GaussianMixture | None:
    """The distribution of the training data, None where it is not known."""
    source = getattr(getattr(trainer, "datamodule", None), "source", None)
    if not isinstance(source, GaussianMixturePoints):
        return None
    dimension = source.means.shape[1]
    covariance = source.std**2 * torch.eye(dimension, dtype=torch.float64)
    return GaussianMixture(source.weights, source.means, covariance.expand(len(source.means), dimension, dimension))


def score_error(denoiser: Any, exact: ExactDenoiser, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error ``|s - s*|^2`` of the estimated score at each row, and ``|s*|^2`` of the true one: both ``[B]``."""
    with torch.no_grad():
        truth = exact(x, t).score
        estimate = denoiser(x, t).score
    return (estimate - truth).square().sum(1), truth.square().sum(1)


class NoiseLevels(PeriodicCallback):
    """Draw loss, gradient norm and score error against the noise level, with the raw weights, and record them.

    The values are averages over the same training images with the same noise every time: event ``noise_levels`` in
    metrics.jsonl. The score's error is ``E |s - s*|^2 / E |s*|^2``, for data whose score is known
    (``GaussianMixturePoints``).

    Args:
        every_n_images: interval in images seen; null: at the end only.
        every_n_steps: interval in steps; null: not by steps.
        num_levels: number of noise levels, evenly spaced in time; 0: measure nothing.
        images: number of training images averaged over.

    Raises:
        UserError: for a negative ``num_levels``, or ``images`` below 1.
    """

    name = "noise_levels"
    makes = frozenset({"noise_levels", "noise-levels"})

    def __init__(
        self,
        every_n_images: int | None = None,
        every_n_steps: int | None = None,
        num_levels: int = 10,
        images: int = 128,
    ) -> None:
        if num_levels < 0 or images < 1:
            raise UserError(
                f"noise_levels: num_levels {num_levels} cannot be negative, images {images} must be positive"
            )
        super().__init__(Cadence.of("noise_levels", every_n_images, every_n_steps))
        self.num_levels = num_levels
        self.images = images

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print that nothing will be drawn where the weights are sharded."""
        assert isinstance(pl_module, Method)
        if pl_module.sharded and self.num_levels > 0:
            print_note("noise_levels: not drawn: with trainer.strategy fsdp no process has the whole gradient")

    def times(self, method: Method) -> Tensor:
        """Times of the noise levels, rising: float64 ``[num_levels]``, fewer where the grid has fewer timesteps."""
        process = method.denoiser.process
        if process.num_timesteps is None:
            return torch.linspace(process.t_min, process.t_max, self.num_levels, dtype=torch.float64)
        grid = process.grid()
        count = min(self.num_levels, len(grid))
        return grid[torch.linspace(0, len(grid) - 1, count).round().long()]

    def wanted(self, trainer: pl.Trainer, method: Method) -> bool:
        """True where there is anything to draw."""
        has_data = isinstance(getattr(trainer, "datamodule", None), DataModule)
        return self.num_levels > 0 and has_data and not method.sharded and run_logger_of(trainer) is not None

    def draw(self, trainer: pl.Trainer, method: Method) -> None:
        """Measure on process 0, which holds all weights, and save the picture."""
        if not trainer.is_global_zero:
            return
        was_training = method.training
        method.eval()
        try:
            self._draw(trainer, method)
        finally:
            method.train(was_training)

    def _draw(self, trainer: pl.Trainer, method: Method) -> None:
        run, data = run_logger_of(trainer), getattr(trainer, "datamodule", None)
        assert run is not None
        assert isinstance(data, DataModule)
        batch = data.training_batch(torch.arange(min(self.images, len(data.train_indices))))
        cond = None if batch.cond is None else batch.cond.to(method.device)
        batch = Batch(batch.x.to(method.device), batch.index.to(method.device), cond)
        batch = method.encoded(batch, method.seed)
        x = batch.x
        eps = keyed_normal(method.seed, "noise levels", batch.index, tuple(x.shape[1:]))
        times = self.times(method)
        mixture = known_mixture(trainer) if method.diffuses_data else None
        exact = None if mixture is None else ExactDenoiser(mixture, method.denoiser.process)
        parameters = [p for p in method.denoiser.parameters() if p.requires_grad]
        losses, norms, errors = [], [], []
        for time in times.tolist():
            t = torch.full((len(x),), time, dtype=torch.float64, device=method.device)
            loss = method.loss_given_t(batch, t, eps).per_sample.mean()
            # Not backward: these gradients must reach neither the optimizers nor other processes.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            losses.append(float(loss.detach()))
            norms.append(
                float(torch.stack([g.double().square().sum() for g in gradients if g is not None]).sum().sqrt())
            )
            if exact is not None:
                x_t = method.denoiser.process.perturb(x, t, eps)
                error, norm = score_error(method.denoiser, exact, x_t, t)
                errors.append(float(error.mean() / norm.mean()))
        coefficients = method.denoiser.process.coefficients(times)
        ratio = (coefficients.sigma / coefficients.alpha).tolist()
        values = {"times": times.tolist(), "sigma_over_alpha": ratio, "loss": losses, "gradient_norm": norms}
        panels = {"loss": losses, "gradient norm": norms}
        if errors:
            values["score_error"] = panels["relative squared score error"] = errors
        run.record("noise_levels", values)
        figure, axes = new_figure(1, len(panels), side=3.6)
        for axis, (name, y) in zip(axes[0], panels.items(), strict=True):
            lines_panel(axis, ratio, {name: y}, "sigma / alpha", name, name, log_x=True, log_y=min(y) > 0.0)
        caption = f"by noise level at {method.clock.images} images, raw weights, {len(x)} training images"
        figure.suptitle(caption, fontsize=9)
        run.picture("noise-levels", render(figure), caption, {"weights": "raw"})
