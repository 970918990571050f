"""Metrics of samples, while a model trains and after: FID and related metrics, each with its protocol."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch

from lit_diffusion.callbacks.checkpoint import (
    checkpoint_folder,
    save_after,
    save_before,
    write_checkpoint,
)
from lit_diffusion.callbacks.ema import EMA, averages_of, choose_average
from lit_diffusion.callbacks.periodic import PeriodicCallback
from lit_diffusion.data.npz import label_arrays
from lit_diffusion.distributed import all_gather_objects
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.evaluation import Evaluated, Evaluation, RealSets
from lit_diffusion.evaluation.sampling import DivergedError
from lit_diffusion.failures import Failure, agree
from lit_diffusion.files import atomic_write
from lit_diffusion.images import image_grid
from lit_diffusion.methods.base import Method
from lit_diffusion.metrics.base import ScoreOptions
from lit_diffusion.metrics.catalogue import CATALOGUE, MetricName, row_of
from lit_diffusion.metrics.choice import Choice, left_out_line
from lit_diffusion.metrics.extractors import ExtractorName, default_extractor, load_extractor
from lit_diffusion.metrics.protocol import differing_keys
from lit_diffusion.metrics.reference import RealData
from lit_diffusion.metrics.scores import Result
from lit_diffusion.runs.best import best_name, is_among_best, list_best, read_best
from lit_diffusion.runs.clock import Cadence
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.logger import RunLogger, run_logger_of, survived, tell_of
from lit_diffusion.samplers import Sampler
from lit_diffusion.training.datamodule import DataModule
from lit_diffusion.training.precision import precision_name

Stage = Literal["fit", "test"]

COUNTS = (500, 1_000, 2_000, 5_000, 10_000, 50_000)
"""Sample counts that ``auto`` chooses from."""
KEPT_SAMPLES = 64
"""Number of samples of an evaluation that are kept as bytes, to be looked at and compared."""
PAIRS = 12
"""Number of samples drawn beside their nearest training image: those closest to one."""


class Evaluator(PeriodicCallback):
    """Generate samples on all processes and measure them: at intervals during training, and by ``test``.

    Each evaluation writes an event ``evaluation`` with the metrics, their errors and their protocol, keeps some of its
    samples, draws the samples nearest to a training image beside it, and saves the checkpoint if it is the best so far.
    A metric's name tells its features and its number of samples: ``fid-2k``, ``fd/digits-500``.

    Args:
        every_n_images: interval while training, in images seen; null: not by images.
        every_n_steps: interval in steps; null: not by steps. With neither, only ``test`` evaluates.
        samples: number of samples while training; ``auto``: chosen at the first evaluation, the most of 500, 1k, 2k,
            5k, 10k and 50k that stay within ``budget``. The choice is written to config.yaml and the checkpoints.
        budget: share of the training time that evaluations may take, for ``auto``.
        metrics: any of ``fid``, ``fid_infinity``, ``is``, ``kid``, ``precision``, ``recall``, ``density``,
            ``coverage``, ``memorisation``; null: all but ``fid_infinity``, where they fit; []: none.
        extractor: feature extractor: ``inception``, ``dinov2``, ``clip``, ``vgg16``, ``digits``, ``points``; ``auto``:
            ``digits`` for 8 x 8 grey images, ``points`` for points, else ``inception``.
        weights_path: file of the extractor's weights; null: the file that ``fetch weights`` brought.
        weights: the model's weights: ``ema`` (raw ones where no average is kept), ``ema:HALF_LIFE`` or ``raw``.
        sampler: sampler used while training; null: the method's own.
        seed: seed of the samples while training.
        reference: the real data: ``train`` or ``held_out``. Copies are looked for among the training images either
            way, and among their mirror images where ``data.flip`` mirrors. A class-conditional model draws its samples'
            classes as often as the real data have them; the protocol says so under ``labels``.
        best: metric by which the best checkpoints are kept; its name as in ``metrics``.
        keep: number of best checkpoints kept; 0: none.
        batch_size: samples at a time on each process; changes memory and speed only.
        test_samples: number of samples for each seed of ``test``.
        test_sampler: sampler used by ``test``; null: the method's own.
        test_seeds: seeds of ``test``, which reports the mean and the minimum over them.
        options: options of the metrics.

        Raises:
            UserError: for an argument out of range, or a metric that cannot be measured here.
    """

    state_key = "Evaluator"
    name = "evaluation"
    makes = frozenset({"evaluation", "neighbours"})

    def __init__(
        self,
        every_n_images: int | None = None,
        every_n_steps: int | None = None,
        samples: int | Literal["auto"] = "auto",
        budget: float = 0.05,
        metrics: list[MetricName] | None = None,
        extractor: ExtractorName | Literal["auto"] = "auto",
        weights_path: str | None = None,
        weights: str = "ema",
        sampler: Sampler | None = None,
        seed: int = 0,
        reference: Literal["train", "held_out"] = "train",
        best: MetricName = "fid",
        keep: int = 1,
        batch_size: int = 250,
        test_samples: int = 50_000,
        test_sampler: Sampler | None = None,
        test_seeds: tuple[int, ...] = (0, 1, 2),
        options: ScoreOptions = ScoreOptions(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(Cadence.of("eval", every_n_images, every_n_steps))
        for metric in metrics or ():
            require_choice("", "eval.metrics", metric, CATALOGUE)
            if "captions" in CATALOGUE[metric].needs:
                raise UserError(f"eval.metrics: {metric} needs samples with captions: use the command evaluate")
        require_choice("", "eval.best", best, CATALOGUE)
        if CATALOGUE[best].better is None:
            raise UserError(f"eval.best is {best!r}, of which no value is better or worse; choose another metric")
        for key, value in (("samples", samples), ("test_samples", test_samples), ("batch_size", batch_size)):
            if isinstance(value, int) and value < 1:
                raise UserError(f"eval.{key} is {value}; give a positive number")
        if not 0.0 < budget < 1.0:
            raise UserError(f"eval.budget is {budget:g}; it is a share of the training time, between 0 and 1")
        if keep < 0:
            raise UserError(f"eval.keep is {keep}; give how many of the best checkpoints to keep, or 0")
        if not test_seeds or len(set(test_seeds)) != len(test_seeds):
            raise UserError(f"eval.test_seeds is {list(test_seeds)}; give one seed or several different ones")
        self.samples = samples
        self.budget = budget
        self.metrics = metrics
        self.extractor = extractor
        self.weights_path = weights_path
        self.weights = weights
        self.sampler = sampler
        self.seed = seed
        self.reference = reference
        self.best = best
        self.keep = keep
        self.batch_size = batch_size
        self.test_samples = test_samples
        self.test_sampler = test_sampler
        self.test_seeds = tuple(test_seeds)
        self.options = options
        self.last: dict[str, Any] = {}
        """Images seen, values and protocol of the last evaluation; saved in every checkpoint."""
        self._chosen: int | None = None
        self._evaluation: Evaluation | None = None
        self._began = 0.0
        self._began_at = 0
        self._warned = False

    @property
    def _on(self) -> bool:
        return self.metrics != []

    # ---- hooks -------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check now what would fail hours later: weights of the model and of the extractor, sampler, metrics."""
        assert isinstance(pl_module, Method)
        if self._while_training(trainer):
            self.check(pl_module, self._datamodule(trainer), averages_of(trainer), "fit")
            if self._chosen is not None:
                self._write_chosen_count(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and make up for an evaluation that a kill or a stop cut short."""
        assert isinstance(pl_module, Method)
        self._began, self._began_at = time.perf_counter(), pl_module.clock.images
        super().on_train_start(trainer, pl_module)

    @classmethod
    def made_again(cls, state: Mapping[str, Any], images: int) -> set[str]:
        """Names of its events where an evaluation had not ended when the checkpoint was written."""
        return set() if images in (state.get("last", {}).get("images"), state.get("done_at")) else set(cls.makes)

    def _is_missing(self, method: Method) -> bool:
        # Without a chosen count it was never begun, and the speed that a choice needs is not known yet.
        made = method.clock.images in (self.last.get("images"), self._done_at)
        missing = self._on and self._count is not None and not made
        if missing:
            print_note(f"the evaluation at {method.clock.images} images is missing: made now")
        return missing

    def exclude(self, seconds: float) -> None:
        """Leave ``seconds`` out of the training time, by which ``auto`` chooses."""
        self._began += seconds

    def wanted(self, trainer: pl.Trainer, method: Method) -> bool:
        """True where there is anything to evaluate."""
        return self._while_training(trainer) and self.last.get("images") != method.clock.images

    def draw(self, trainer: pl.Trainer, method: Method) -> None:
        """Evaluate; the run's state is saved before and after, so that a kill meanwhile loses nothing."""
        count = self._choose_count(trainer, method)
        # An evaluation takes long: a kill in it must lose no picture of the same moment.
        save_before(trainer, method, again=True)
        result = self._evaluate(trainer, method, count, self.seed, "fit")
        if result is None:
            return
        self._keep_the_best(trainer, method, result)
        self._done_at = method.clock.images
        save_after(trainer, method)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what would fail, before the likelihoods take their minutes."""
        assert isinstance(pl_module, Method)
        if self._on:
            self.check(pl_module, self._datamodule(trainer), averages_of(trainer), "test")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the full protocol: every seed, then mean and minimum."""
        assert isinstance(pl_module, Method)
        if not self._on or getattr(trainer, "fast_dev_run", False):
            return
        results = []
        for seed in self.test_seeds:
            result = self._evaluate(trainer, pl_module, self.test_samples, seed, "test")
            assert result is not None
            results.append(result)
        self._report(trainer, results)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the networks."""
        self._evaluation = None

    def state_dict(self) -> dict[str, Any]:
        """Return the chosen count and the last evaluation, for a checkpoint."""
        return {**super().state_dict(), "samples": self._chosen, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the count that the run was started with, so that its metrics stay comparable."""
        self._chosen, self.last = state_dict["samples"], state_dict["last"]
        self._done_at = state_dict.get("done_at", -1)

    # ---- what can be measured ----------------------------------------------------------------------------------

    def _while_training(self, trainer: pl.Trainer) -> bool:
        cadence = self.cadence.images is not None or self.cadence.steps is not None
        return self._on and cadence and not getattr(trainer, "fast_dev_run", False)

    @property
    def _count(self) -> int | None:
        return self._chosen if self.samples == "auto" else self.samples

    def _sampler(self, method: Method, stage: Stage) -> Sampler:
        return (self.sampler if stage == "fit" else self.test_sampler) or method.sampler

    def check(self, method: Method, data: DataModule, averages: EMA, stage: Stage) -> tuple[Evaluation, Choice]:
        """Prepare an evaluation and choose its metrics, before any work; reads the extractor's weights.

        Args:
            method: the model.
            data: its data.
            averages: the averaged weights that are kept.
            stage: ``fit`` while training, or ``test``.

        Raises:
            UserError: for weights, a sampler, metrics or data that cannot be used.
        """
        choose_average(averages.half_lives, averages.kept(self.weights))
        method.check_sampler(self._sampler(method, stage))
        evaluation = self._evaluation = self._evaluation or self._made(data)
        choice = evaluation.choose((self._count or COUNTS[0]) if stage == "fit" else self.test_samples)
        if self.keep and stage == "fit" and self.best not in choice.metrics:
            raise UserError(
                f"eval.best is {self.best!r}, which is not among the metrics here: {', '.join(choice.metrics)}"
            )
        return evaluation, choice

    def _made(self, data: DataModule) -> Evaluation:
        shape = tuple(data.data_spec.shape)
        name = default_extractor(shape) if self.extractor == "auto" else self.extractor
        extractor = load_extractor(name, shape, self.weights_path)
        held_out = self.reference == "held_out"
        training = RealData.of(data.source, data.train_indices, "train")
        reference = RealData.of(data.held_out_source, data.held_out_indices, "held_out") if held_out else training
        if reference.count < 2:
            raise UserError(
                f"eval.reference {self.reference}: there are {reference.count} such data; hold out more, or take train"
            )
        mirrored = RealData.of(data.source, data.train_indices, "train", mirrored=True) if data.flip else None
        sets = RealSets(reference, shape, training, mirrored, data.class_counts(held_out))
        return Evaluation(sets, extractor, self.metrics, self.options, PAIRS, say=print_note)

    @staticmethod
    def _datamodule(trainer: pl.Trainer) -> DataModule:
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, DataModule):
            raise UserError("evaluation compares with a lit_diffusion DataModule: trainer.fit(method, datamodule=...)")
        return datamodule

    # ---- one evaluation ----------------------------------------------------------------------------------------

    def _evaluate(self, trainer: pl.Trainer, method: Method, count: int, seed: int, stage: Stage) -> Result | None:
        """Make one evaluation, a collective call; None where the sampler diverged while training."""
        began = time.perf_counter()
        averages = averages_of(trainer)
        evaluation, choice = self.check(method, self._datamodule(trainer), averages, stage)
        weights = averages.kept(self.weights)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        try:
            with averages.applied(method, weights):
                evaluated = evaluation.of_model(
                    method,
                    self._sampler(method, stage),
                    count,
                    seed,
                    self.batch_size,
                    keep=KEPT_SAMPLES,
                    survives=stage == "fit",
                    show_progress=shown,
                )
        except DivergedError as error:
            if stage == "test":
                raise
            print_note(f"evaluation at {method.clock.images} images: {error}; no values this time")
            tell_of(trainer, self.name, [Failure.of(error)], said=True)
            return None
        result = evaluated.result
        for metric, failures in result.failed.items():
            tell_of(trainer, f"{self.name}/{metric}", failures)
        if not result.values:
            return None
        result.protocol.update(
            weights=weights, backbone_precision=precision_name(method.denoiser.backbone.autocast_dtype), stage=stage
        )
        if method.num_classes is not None:
            result.protocol["labels"] = f"as in the {'training' if self.reference == 'train' else 'held-out'} data"
        if evaluation.data.mirrored is not None:
            result.protocol["reference_mirrored"] = False  # Half of what the model learns is not in it.
        self._record(trainer, method, evaluated, choice, time.perf_counter() - began)
        return result

    def _record(
        self, trainer: pl.Trainer, method: Method, evaluated: Evaluated, choice: Choice, seconds: float
    ) -> None:
        result = evaluated.result
        protocol = result.protocol
        shares = all_gather_objects(evaluated.kept)
        line = ", ".join(f"{name} {value:.4g}" for name, value in result.values.items())
        print_note(f"evaluation at {method.clock.images} images, seed {protocol['seed']}: {line} ({seconds:.1f} s)")
        if result.flagged:
            print_note(
                "  these samples look like copies of training images (near_copies): see samples/neighbours-*.png; more "
                "data, dropout, mirroring or a shorter training help"
            )
        if not self._warned:
            self._warned = True
            for caveat in choice.caveats:
                print_note(f"  note: {caveat}")
            if result.left_out:
                print_note(f"  left out: {left_out_line(result.left_out)}")
        run = run_logger_of(trainer)
        if run is not None and trainer.is_global_zero:
            self._write(run, method, evaluated, shares, seconds)
        agree()
        self.last = {"images": method.clock.images, "values": dict(result.values), "protocol": dict(protocol)}
        if run is not None and (protocol["stage"] == "fit" or protocol["seed"] == self.test_seeds[0]):
            with survived(trainer, "neighbours"):
                if trainer.is_global_zero:
                    self._draw_pairs(run, method, result)

    def _write(
        self,
        run: RunLogger,
        method: Method,
        evaluated: Evaluated,
        shares: list[dict[int, np.ndarray]],
        seconds: float,
    ) -> None:
        """Write some of the samples, and the event."""
        result = evaluated.result
        protocol = result.protocol
        images = {index: image for share in shares for index, image in share.items()}
        name = f"evaluation-{method.clock.images:010d}" + (
            f"-seed{protocol['seed']}" if protocol["stage"] == "test" else ""
        )
        path = run.run_dir / "samples" / f"{name}.npz"
        assert self._evaluation is not None
        counts = self._evaluation.data.class_counts
        cond = method.condition_by_counts(torch.tensor(sorted(images)), protocol["seed"], counts)
        labels = label_arrays(None if cond is None else cond.label, method.require_data_spec().class_names)
        with atomic_write(path) as file:
            np.savez_compressed(
                file, allow_pickle=False, arr_0=np.stack([images[index] for index in sorted(images)]), **labels
            )
        values: dict[str, Any] = {
            **result.values,
            "seconds": round(seconds, 2),
            "errors": result.errors,
            "samples_file": f"samples/{path.name}",
            "protocol": protocol,
        }
        if result.left_out:
            values["left_out"] = result.left_out
        if evaluated.strays.count:
            values["strays"] = asdict(evaluated.strays)
        if result.intervals:
            values["intervals"] = {key: list(interval) for key, interval in result.intervals.items()}
        run.record("evaluation", values)

    def _draw_pairs(self, run: RunLogger, method: Method, result: Result) -> None:
        """Draw the samples closest to training images, each above its image."""
        if not result.pairs:
            return
        assert self._evaluation is not None
        real = self._evaluation.nearest_training_data(result.pairs)
        both = np.concatenate((np.stack([pair.image for pair in result.pairs]), real))
        caption = f"samples nearest to a training image, above it; {method.clock.images} images seen"
        distances = {"distances": [round(pair.distance, 6) for pair in result.pairs]}
        run.picture("neighbours", image_grid(both, columns=len(result.pairs)), caption, distances)

    # ---- how many ----------------------------------------------------------------------------------------------

    def _choose_count(self, trainer: pl.Trainer, method: Method) -> int:
        if self._count is not None:
            return self._count
        elapsed = time.perf_counter() - self._began
        per_image = elapsed / max(method.clock.images - self._began_at, method.clock.batch)
        images, steps = self.cadence.images, self.cadence.steps
        between = per_image * min(images or float("inf"), (steps or float("inf")) * method.clock.batch)
        evaluation, _ = self.check(method, self._datamodule(trainer), averages_of(trainer), "fit")
        batch = min(self.batch_size, COUNTS[0])
        each = evaluation.seconds_a_sample(method, self._sampler(method, "fit"), batch, self.seed)
        each /= trainer.world_size
        affordable = [count for count in COUNTS if count * each <= self.budget * between]
        self._chosen = int(all_gather_objects(affordable[-1] if affordable else COUNTS[0])[0])
        share = self._chosen * each / between
        print_note(
            f"eval.samples auto: {self._chosen}, {1000 * each:.3g} ms each, about {share:.1%} of the training time"
            + ("" if affordable else f"; that is over eval.budget {self.budget:.1%}: evaluate less often")
        )
        run = run_logger_of(trainer)
        if run is not None:
            run.record("budget", {"samples": self._chosen, "seconds_a_sample": each, "share": share})
        self._write_chosen_count(trainer, method)
        return self._chosen

    def _write_chosen_count(self, trainer: pl.Trainer, method: Method) -> None:
        """Write the chosen count to config.yaml and the checkpoints' configuration, in place of ``auto``."""
        if self.samples != "auto":
            return
        if method.run_config is not None:
            method.run_config.setdefault("eval", {})["samples"] = self._chosen
        run = run_logger_of(trainer)
        if run is not None:
            run.write_resolved("eval.samples", self._chosen)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _keep_the_best(self, trainer: pl.Trainer, method: Method, result: Result) -> None:
        """Save the checkpoint if it is among the best; a file is removed only once the list no longer names it."""
        if not self.keep or run_logger_of(trainer) is None:
            return
        key = next((key for key in result.values if row_of(key) is CATALOGUE[self.best]), None)
        if key is None:  # Its computation failed: keep the best so far.
            return
        folder = checkpoint_folder(trainer)
        # Values may differ in the last digit between processes: what one of them has counts.
        mine = (result.values[key], read_best(folder) if trainer.is_global_zero else [])
        value, listed = all_gather_objects(mine)[0]
        entry = (self.best, key, value, method.clock.images, self.keep)
        if not is_among_best(listed, *entry):
            return
        write_checkpoint(trainer, method, folder / best_name(key, value, method.clock.images))
        if trainer.is_global_zero:
            list_best(folder, listed, *entry)

    # ---- the end of a test -------------------------------------------------------------------------------------

    def _report(self, trainer: pl.Trainer, results: list[Result]) -> None:
        """Print and record mean and minimum over the seeds."""
        seeds = list(self.test_seeds)
        protocol = {key: value for key, value in results[0].protocol.items() if key != "seed"}
        for key in differing_keys([result.protocol for result in results], frozenset({"seed"})):
            protocol[key] = [result.protocol.get(key) for result in results]
        summary: dict[str, Any] = {"protocol": {**protocol, "seeds": seeds}}
        if results[0].left_out:
            summary["left_out"] = results[0].left_out
        plural = "s" if len(seeds) > 1 else ""
        print_note(f"test with weights {protocol['weights']}, {protocol['sampler']}, seed{plural} {seeds}:")
        for name in results[0].values:
            values = torch.tensor([result.values[name] for result in results], dtype=torch.float64)
            summary[f"{name}/mean"], summary[f"{name}/min"] = float(values.mean()), float(values.min())
            spread = (
                f", minimum {float(values.min()):.4f}, standard deviation {float(values.std()):.2g}" if plural else ""
            )
            print_note(f"  {name:<28} {float(values.mean()):.4f}{spread}")
        run = run_logger_of(trainer)
        if run is not None:
            run.record("test", summary)
