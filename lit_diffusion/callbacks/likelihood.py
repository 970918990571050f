"""Bits per dimension of held-out data, measured by ``test``."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from tqdm import tqdm

from lit_diffusion.callbacks.ema import averages_of
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.evaluation.bits import (
    BoundBits,
    BoundSettings,
    Held,
    ODEBits,
    ODESettings,
    frechet_by_time,
    pixel_moments,
)
from lit_diffusion.likelihood import Probe, Trace, require_chain
from lit_diffusion.methods.base import Method
from lit_diffusion.plots.figures import bars_panel, lines_panel, new_figure, render
from lit_diffusion.processes import Process
from lit_diffusion.reverse import ReverseVariance
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.logger import RunLogger, run_logger_of, survived
from lit_diffusion.samplers import Ancestral
from lit_diffusion.samplers.ode import refuse_grid_only
from lit_diffusion.samplers.times import timesteps_to_zero
from lit_diffusion.training.datamodule import PADDING_INDEX, Batch, DataModule

Metric = Literal["bpd_ode", "bpd_bound", "smallest_time"]

BREAKDOWN_BINS = 20
"""Number of bars of the bound by noise level, each of equally many steps."""


def _with_error(name: str, mean: float, error: float) -> tuple[dict[str, float], str]:
    """A value and its standard error, where it has one: as numbers for the event, and as text."""
    if math.isnan(error):
        return {name: mean}, f"{mean:.4f}"
    return {name: mean, f"{name}_error": error}, f"{mean:.4f} +- {error:.4f}"


class Likelihood(pl.Callback):
    """Bits per dimension by the ODE and by the variational bound, and how both depend on the smallest time.

    ``-log2 p(x) / D`` of grey levels. The ODE's is the change of density along the probability flow (score SDE, Song et
    al. 2021, https://arxiv.org/abs/2011.13456, section 4.3); the bound's is the sum of the prior's, the steps' and the
    decoder's terms (DDPM, Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 5).

    Every value is printed and written to metrics.jsonl, event ``test``, with its standard error over the images and its
    protocol. Image i has the same noise whatever the batch and the number of processes.

    Args:
        metrics: any of ``bpd_ode``, ``bpd_bound``, ``smallest_time`` (a figure of bits per dimension by the ODE and
            Frechet distance in pixels against the smallest time; minutes); null: the first two, where they fit the
            model.
        weights: the weights to measure: ``ema`` (raw ones where no average is kept), ``ema:HALF_LIFE`` or ``raw``.
        seed: seed of the dequantization noise, of the probes and of the bound.
        trace: the ODE's divergence: ``hutchinson``, estimated, or ``exact``, for few dimensions.
        probe: entries of Hutchinson's vectors: ``rademacher`` or ``gaussian``.
        probes: number of Hutchinson's vectors per image.
        rtol: relative tolerance of the ODE's solver.
        atol: absolute tolerance of the ODE's solver.
        t_min: smallest time of the ODE, at least the process's smallest time; null: the process's.
        bound_steps: number of steps of the chain that is bounded; null: the method's sampler's where that is
            ancestral, else every timestep of the model's grid, or 1000 in continuous time.
        bound_sampled: number of the bound's terms evaluated per image, chosen at random; null: all.
        bound_variance: variance of the reverse steps: ``beta``, ``beta_tilde`` or ``learned``; null: the method's
            sampler's where that is ancestral, else the method's. The chain's ``clip_x0`` is the sampler's as well, or
            ``data``.
        smallest_times: smallest times in the figure, each at least the process's; null: those of 1e-1, 1e-2, ... 1e-5
            that are.
        samples: number of samples generated for the figure's Frechet distance.

    Raises:
        UserError: for an argument out of range, naming its key.
    """

    def __init__(
        self,
        metrics: list[Metric] | None = None,
        weights: str = "ema",
        seed: int = 0,
        trace: Trace = "hutchinson",
        probe: Probe = "rademacher",
        probes: int = 1,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        t_min: float | None = None,
        bound_steps: int | None = None,
        bound_sampled: int | None = None,
        bound_variance: ReverseVariance | None = None,
        smallest_times: tuple[float, ...] | None = None,
        samples: int = 1000,
    ) -> None:
        for metric in metrics or []:
            require_choice("likelihood", "metrics", metric, get_args(Metric))
        require_choice("likelihood", "trace", trace, get_args(Trace))
        require_choice("likelihood", "probe", probe, get_args(Probe))
        for key, value in (("probes", probes), ("bound_steps", bound_steps), ("bound_sampled", bound_sampled)):
            if value is not None and value < 1:
                raise UserError(f"likelihood.{key} is {value}; give a positive number")
        if samples < 2:
            raise UserError(f"likelihood.samples is {samples}; a Frechet distance needs at least 2")
        for time in (*(smallest_times or ()), *(() if t_min is None else (t_min,))):
            if not 0.0 < time < 1.0:
                raise UserError(f"likelihood: a smallest time of {time:g} is not between 0 and 1")
        self.metrics = metrics
        self.weights = weights
        self.seed = seed
        self.trace: Trace = trace
        self.probe: Probe = probe
        self.probes = probes
        self.rtol = rtol
        self.atol = atol
        self.t_min = t_min
        self.bound_steps = bound_steps
        self.bound_sampled = bound_sampled
        self.bound_variance = bound_variance
        self.smallest_times = smallest_times
        self._times_drawn: list[float] = []
        self.samples = samples
        self._applied = ExitStack()

    # ---- hooks -------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse times that the model does not learn, in training, too."""
        assert isinstance(pl_module, Method)
        self.check_times(pl_module.denoiser.process)

    def check_times(self, process: Process) -> None:
        """Refuse times that a network on this process does not learn.

        Raises:
            UserError: naming the key.
        """
        if self.t_min is not None:
            process.require_time("likelihood.t_min", self.t_min)
        for time in self.smallest_times or ():
            process.require_time("likelihood.smallest_times", time)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose what can be measured, before measuring any of it, and give the model the weights."""
        assert isinstance(pl_module, Method)
        if pl_module.sharded and self.metrics != []:
            raise UserError(
                "test: likelihoods are not measured with trainer.strategy fsdp: use one process or ddp, which open the "
                "same checkpoint, or set likelihood.metrics: []"
            )
        averages = averages_of(trainer)
        weights = averages.kept(self.weights)
        self._applied.enter_context(averages.applied(pl_module, weights))
        self._used_weights = weights
        run = run_logger_of(trainer)
        if run is not None:
            run.weights = weights
        self._chosen = self._fitting(pl_module)
        data = getattr(trainer, "datamodule", None)
        if self._chosen and isinstance(data, DataModule) and len(data.held_out_indices) == 0:
            print_note(f"test: not measured: {', '.join(self._chosen)}: no data are held out")
            self._chosen = []
        self._reset(pl_module)

    def _fitting(self, method: Method) -> list[Metric]:
        """The configured metrics, each checked; by default those that fit the model, with a note for any other."""
        wanted: list[Metric] = ["bpd_ode", "bpd_bound"] if self.metrics is None else list(self.metrics)
        if "bpd_bound" in wanted and method.denoiser.process.num_timesteps != 1:
            # A wrong key is a mistake, not a metric that does not fit.
            self._bound_settings(method).chain.check(method.denoiser)
            timesteps_to_zero(method.denoiser.process, self.bound_steps)
        chosen: list[Metric] = []
        for metric in wanted:
            try:
                if metric == "bpd_bound":
                    require_chain(method.denoiser, metric)
                else:
                    refuse_grid_only(method.denoiser, metric)
                if metric == "smallest_time":
                    self._times_drawn = self._times_to_draw(method.denoiser.process)
            except UserError as error:
                if self.metrics is not None:
                    raise
                print_note(f"test: not measured: {error}")
                continue
            chosen.append(metric)
        return chosen

    def _times_to_draw(self, process: Process) -> list[float]:
        """Smallest times of the figure, from the largest to the smallest."""
        if process.num_timesteps is not None:
            raise UserError("smallest_time: this model's smallest time is its first timestep")
        given = self.smallest_times
        if given is None:
            return [time for time in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5) if time >= process.t_min] or [process.t_min]
        return sorted(set(given), reverse=True)

    def _reset(self, method: Method) -> None:
        self._ode = ODEBits(method, self._ode_settings, self.seed)
        self._bound = BoundBits(method, self._bound_settings(method), self.seed)
        self._by_time = [
            ODEBits(method, replace(self._ode_settings, t_min=time), self.seed) for time in self._times_drawn
        ]

    @property
    def _ode_settings(self) -> ODESettings:
        return ODESettings(self.trace, self.probe, self.probes, self.rtol, self.atol, self.t_min)

    def _bound_settings(self, method: Method) -> BoundSettings:
        chain, sampler = method.reverse_chain, method.sampler
        if self.bound_variance is not None:
            chain = replace(chain, variance=self.bound_variance)
        if not isinstance(sampler, Ancestral):
            return BoundSettings(chain, self.bound_steps, sampled=self.bound_sampled)
        steps = sampler.steps if self.bound_steps is None else self.bound_steps
        return BoundSettings(chain, steps, sampler.spacing, self.bound_sampled)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the batch."""
        assert isinstance(pl_module, Method)
        if not isinstance(batch, Batch) or int(batch.index[0]) == PADDING_INDEX:  # No held-out data, or padding.
            return
        held, name = Held(batch.x, batch.index, batch.cond), f"batch {batch_idx + 1}"
        if "bpd_ode" in self._chosen:
            self._take(trainer, self._ode, held, f"{name}: ODE")
        if "bpd_bound" in self._chosen:
            with self._bar(trainer, 1, f"{name}: bound") as bar:

                def on_step(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                self._bound.take(held, on_step)
        if "smallest_time" in self._chosen:
            for time, bits in zip(self._times_drawn, self._by_time, strict=True):
                self._take(trainer, bits, held, f"{name}: ODE from {time:g}")

    def _take(self, trainer: pl.Trainer, bits: ODEBits, held: Held, name: str) -> None:
        process = bits.model.denoiser.process
        start, end = bits.settings.t_min or process.t_min, process.t_max
        with self._bar(trainer, 100, name) as bar:

            def on_time(t: float) -> None:
                bar.update(int(100 * (t - start) / (end - start)) - bar.n)

            bits.take(held, on_time)

    def _bar(self, trainer: pl.Trainer, total: int, name: str) -> tqdm[Any]:
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        return tqdm(total=total, desc=name, leave=False, disable=not shown, unit="%" if total == 100 else " steps")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather over the processes, print, record and draw; give the model its own weights back."""
        assert isinstance(pl_module, Method)
        run = run_logger_of(trainer)
        if self._chosen:
            print_note(f"test with weights {self._used_weights}:")
        ode = self._report_ode(run) if "bpd_ode" in self._chosen else None
        bound = self._report_bound(trainer, pl_module, run) if "bpd_bound" in self._chosen else None
        if ode is not None and bound is not None:
            print_note(
                f"  difference             {bound - ode:+.4f}: the ODE and the chain are two models that share a "
                f"network, neither number bounds the other"
            )
        if "smallest_time" in self._chosen:
            self._report_smallest_time(trainer, pl_module, run)
        self._close(run)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the model its own weights back."""
        self._close(run_logger_of(trainer))

    def _close(self, run: RunLogger | None) -> None:
        self._applied.close()
        if run is not None:
            run.weights = "raw"

    # ---- reports -----------------------------------------------------------------------------------------------

    @property
    def _protocol(self) -> dict[str, Any]:
        return {"weights": self._used_weights, "seed": self.seed}

    @property
    def _ode_protocol(self) -> dict[str, Any]:
        return {**self._protocol, **self._ode_settings.protocol()}

    def _report_ode(self, run: RunLogger | None) -> float:
        mean, error, count = self._ode.mean.compute()
        low, high = min(self._ode.evaluations), max(self._ode.evaluations)
        evaluations = f"{low}" if low == high else f"{low} to {high}"
        measured, text = _with_error("bpd_ode", mean, error)
        values: dict[str, Any] = {**measured, "images": count, **self._ode_protocol, "t_min": self.t_min}
        if run is not None:
            run.record("test", values)
        print_note(
            f"  bits/dim by the ODE    {text}  ({count} held-out data, trace {values['trace']}, "
            f"tolerance {max(self.rtol, self.atol):g}, {evaluations} evaluations)"
        )
        return mean

    def _report_bound(self, trainer: pl.Trainer, method: Method, run: RunLogger | None) -> float:
        found, settings = self._bound.result(), self._bound.settings
        chain = settings.chain.describe(method.denoiser, method.grey_levels is not None)
        measured, text = _with_error("bpd_bound", found.value, found.error)
        values: dict[str, Any] = {**measured, "images": found.count, **self._protocol}
        values |= {f"bpd_bound_{name}": value for name, value in found.parts.items()}
        by_step, parts = found.by_step, found.parts
        values |= {"steps": len(by_step), "spacing": settings.spacing, "sampled": settings.sampled, **chain}
        print_note(
            f"  bits/dim by the bound  {text}  (prior {parts['prior']:.4f}, KL {parts['kl']:.4f}, "
            f"decoder {parts['decoder']:.4f}; {len(by_step)} steps, variance {chain['variance']}, "
            f"first {chain['first_variance']}, clip_x0 {chain['clip_x0']})"
        )
        # The decoder's step is not one of the KL terms: it has its own number.
        groups = torch.arange(1, len(by_step)).tensor_split(min(BREAKDOWN_BINS, len(by_step) - 1))
        bits = [float(by_step[group].sum()) for group in groups]
        ends = [(float(found.times[group[0]]), float(found.times[group[-1]])) for group in groups]
        if run is not None:
            run.record("test", {**values, "kl_by_time": bits, "times": [list(pair) for pair in ends]})
        with survived(trainer, "bound-by-noise-level"):
            if run is not None and trainer.is_global_zero:
                self._draw_bound(run, method, bits, ends, parts["kl"])
        return found.value

    def _draw_bound(
        self, run: RunLogger, method: Method, bits: list[float], ends: list[tuple[float, float]], kl: float
    ) -> None:
        figure, axes = new_figure(1, 1, side=4.5)
        log_snr = method.denoiser.process.log_snr(torch.tensor([sum(pair) / 2 for pair in ends]).double())
        labels = [f"{value:.1f}" for value in log_snr.tolist()]
        bars_panel(axes[0, 0], labels, bits, "log SNR", "bits/dim", f"the bound's KL: {kl:.3f} bits/dim")
        run.picture("bound-by-noise-level", render(figure), "the variational bound by noise level", self._protocol)

    # ---- bits per dimension and Frechet distance against the smallest time ---------------------------------------

    def _report_smallest_time(self, trainer: pl.Trainer, method: Method, run: RunLogger | None) -> None:
        bits = [each.mean.compute()[0] for each in self._by_time]
        distances = self._frechet_by_time(trainer, method) if method.require_data_spec().is_image else None
        times = self._times_drawn
        for position, time in enumerate(times):
            distance = "" if distances is None else f", fd/pixels-{self.samples} {distances[position]:.4f}"
            print_note(f"  smallest time {time:<8g} bits/dim by the ODE {bits[position]:.4f}{distance}")
        if run is None:
            return
        values = {"smallest_times": times, "bpd_ode": bits, **self._ode_protocol}
        if distances is not None:
            values[f"fd/pixels-{self.samples}"] = distances
        run.record("smallest_time", values)
        with survived(trainer, "smallest-time"):
            if trainer.is_global_zero:
                self._draw_smallest_time(run, times, bits, distances)

    def _draw_smallest_time(
        self, run: RunLogger, times: list[float], bits: list[float], distances: list[float] | None
    ) -> None:
        figure, axes = new_figure(1, 1 if distances is None else 2, side=4.0)
        lines_panel(axes[0, 0], times, {"ODE": bits}, "smallest time", "bits/dim", "held-out data", log_x=True)
        if distances is not None:
            title = f"{self.samples} samples, pixels"
            lines_panel(axes[0, 1], times, {"ODE": distances}, "smallest time", "Frechet distance", title, log_x=True)
        run.picture("smallest-time", render(figure), "bits per dimension and Frechet distance", self._ode_protocol)

    def _frechet_by_time(self, trainer: pl.Trainer, method: Method) -> list[float]:
        data = getattr(trainer, "datamodule", None)
        assert isinstance(data, DataModule)
        parts = torch.arange(len(data.train_indices)).split(1000)
        real = pixel_moments(method, (data.training_values(indices) for indices in parts))
        with self._bar(trainer, 1, "samples for the figure") as bar:

            def on_batch(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return frechet_by_time(
                method, real, self._times_drawn, self._ode_settings, self.samples, self.seed, on_batch=on_batch
            )
