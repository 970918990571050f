"""Checks of a recipe before it is trained: what ``fit`` would build from the same arguments, on its first data."""

from __future__ import annotations

import io
import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_diffusion.callbacks import EMA, Checkpoint, Evaluator, Likelihood, NoiseLevels, Samples, Telemetry
from lit_diffusion.callbacks.ema import choose_average
from lit_diffusion.checks import Finding, first_line, in_bytes, machine, note, ok, problem, warning
from lit_diffusion.cli.lightning_cli import CLI
from lit_diffusion.cli.lightning_cli import main as run_cli
from lit_diffusion.data_spec import in_brief
from lit_diffusion.errors import UserError
from lit_diffusion.methods.base import Method
from lit_diffusion.metrics.choice import left_out_line
from lit_diffusion.metrics.reference import RealData
from lit_diffusion.metrics.weights import WEIGHTS
from lit_diffusion.processes import VE
from lit_diffusion.randomness import keyed_permutation
from lit_diffusion.runs.clock import Cadence
from lit_diffusion.runs.dashboard import Dashboard, logged_in
from lit_diffusion.runs.events import require_known_events
from lit_diffusion.runs.lock import writer_of
from lit_diffusion.runs.logger import RUN_DIR_FILES, RunLogger
from lit_diffusion.samplers import Ancestral
from lit_diffusion.training.datamodule import DataModule
from lit_diffusion.training.precision import precision_name
from lit_diffusion.training.trainer import Trainer, callbacks_of

LOOKED_AT = 512
"""Number of the first training data that are measured."""
TOO_OFTEN = 1_000
"""Number of drawings, evaluations or checkpoints above which they cost more than they tell."""
TOO_MANY_EVENTS = 100_000
"""Number of telemetry events above which metrics.jsonl is slow to read."""
LONG_AVERAGE = 0.2
"""Part of a run above which a half-life averages over its bad beginning."""
PRIOR_GAP = 0.01
"""Bits per dimension between the noised data and the prior above which samples start from the wrong place."""

AnyCallback = TypeVar("AnyCallback", bound=pl.Callback)
Check = Callable[["Recipe"], Iterator[Finding]]


class Prepared(CLI):
    """``fit`` up to its start, with none of its effects: no directory, no event, no step."""

    def run_command(self, subcommand: str) -> None:
        """Do nothing: ``doctor`` stops before the work."""

    def _hold(self, run_dir: str | None, wait: bool = False) -> None:
        """Do nothing: nothing is written."""

    def _set_lost_events_aside(self, run_dir: Path) -> None:
        """Do nothing: the run is not continued."""


@dataclass
class Recipe:
    """Everything that ``fit`` would train with.

    Attributes:
        method: the model.
        data: its data.
        trainer: the Trainer, with the named callbacks.
        logger: the run's logger, not opened.
        dashboard: the dashboard, as configured.
    """

    method: Method
    data: DataModule
    trainer: Trainer
    logger: RunLogger
    dashboard: Dashboard

    def callback(self, kind: type[AnyCallback]) -> AnyCallback:
        """The Trainer's callback of a class, or one with its defaults."""
        return next((each for each in callbacks_of(self.trainer) if isinstance(each, kind)), kind())

    @property
    def processes(self) -> int:
        """Number of processes that train together."""
        return self.trainer.num_devices * self.trainer.num_nodes

    @property
    def batch(self) -> int:
        """Images per step, over all processes."""
        return self.data.global_batch_size

    @property
    def length(self) -> int | None:
        """Images of the whole run; None where only a time, or nothing, ends it."""
        ends = [self.trainer.max_images, self.trainer.max_steps * self.batch if self.trainer.max_steps > 0 else None]
        return min((end for end in ends if end is not None), default=None)

    @property
    def on_cuda(self) -> bool:
        """True where it would train on CUDA GPUs."""
        return isinstance(self.trainer.accelerator, CUDAAccelerator)

    @property
    def half_lives(self) -> list[int]:
        """Half-lives of the averages, in images."""
        averages = self.callback(EMA)
        averages.setup(self.trainer, self.method, "fit")  # Turns steps into images.
        return averages.half_lives

    @property
    def run_dir(self) -> Path:
        """The run's directory, or the folder in which it would get one."""
        return self.logger.wanted or self.logger.root / self.logger.experiment_name

    @cached_property
    def first(self) -> Tensor:
        """The run's first training data, as the model would see them: float32 ``[N, ...]``.

        Raises:
            UserError: if the source does not yield what it declares.
        """
        train = self.data.train_indices
        order = keyed_permutation(self.data.seed, "order", len(train), 0)[:LOOKED_AT]
        raw = torch.from_numpy(np.stack([self.data.source.value(int(train[i])) for i in order]))
        return self.data.prepare(raw, torch.full((len(order),), -1), torch.arange(len(order)), training=True).x


def prepare(arguments: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Build the recipe that ``fit`` would train with these arguments, and collect the lines that it would print.

    Raises:
        UserError: where ``fit`` would raise it.
    """
    said = io.StringIO()
    with redirect_stdout(said):
        made = run_cli(["fit", *arguments], Prepared)
    assert isinstance(made.trainer, Trainer)
    recipe = Recipe(made.model, made.datamodule, made.trainer, made.run_logger, made.config_init["fit"]["wandb"])
    return recipe, [line.strip() for line in said.getvalue().splitlines() if line.strip()]


def findings(recipe: Recipe, checks: Sequence[Check] | None = None) -> Iterator[Finding]:
    """Run all checks, or the given ones, in order; a check that breaks yields a warning, and the others go on."""
    for check in CHECKS if checks is None else checks:
        try:
            yield from check(recipe)
        except UserError as error:
            yield problem(str(error))
        except Exception as error:
            yield warning(
                f"the check '{check.__name__.replace('_', ' ')}' broke ({first_line(error)})",
                "the run may still be sound; please report this",
            )


# ---- data --------------------------------------------------------------------------------------------------------


def data_found(recipe: Recipe) -> Iterator[Finding]:
    """Report the data to train on."""
    data = recipe.data
    data_spec = data.data_spec
    shape = " x ".join(str(side) for side in data_spec.shape)
    levels = f", {data_spec.num_grey_levels} grey levels" if data_spec.num_grey_levels is not None else ""
    classes = f", {data_spec.num_classes} classes" if data_spec.num_classes is not None else ""
    train, held_out = len(data.train_indices), len(data.held_out_indices)
    yield ok(f"data {data_spec.source}: {train} to train on, {held_out} held out, {shape}{levels}{classes}")
    if held_out == 0:
        yield note("nothing is held out: no held-out loss, no likelihood", "set data.held_out_fraction 0.1")


def classes(recipe: Recipe) -> Iterator[Finding]:
    """Check the backbone's classes against the data's; ``fit`` refuses a backbone with too few."""
    classes, data_spec = recipe.method.denoiser.backbone.num_classes, recipe.data.data_spec
    if classes is None or data_spec.num_classes is None or data_spec.class_counts is None:
        return
    names = data_spec.class_names or range(data_spec.num_classes)
    empty = [str(name) for name, count in zip(names, data_spec.class_counts, strict=True) if count == 0]
    if empty:
        yield warning(f"no training data of the classes {in_brief(empty)}", "number the classes without gaps")
    if classes > data_spec.num_classes:
        yield note(
            f"the backbone has {classes} classes, the data {data_spec.num_classes}: the others are not trained",
            f"set model.init_args.backbone.init_args.num_classes {data_spec.num_classes}",
        )
    elif not empty:
        least, most = min(data_spec.class_counts), max(data_spec.class_counts)
        yield ok(f"the model is conditioned on {classes} classes, of {least} to {most} training data each")


def data_range(recipe: Recipe) -> Iterator[Finding]:
    """Check that the first data, normalized, are finite, vary, and fill their declared range."""
    x = recipe.first
    if not bool(torch.isfinite(x).all()):
        yield problem("the data hold values that are not finite", "clean the source")
        return
    low, high, deviation = float(x.min()), float(x.max()), float(x.std())
    said = f"first {len(x)} data: from {low:.4g} to {high:.4g}, mean {float(x.mean()):.3g}, deviation {deviation:.3g}"
    wanted = recipe.data.data_spec.value_range
    if deviation == 0.0:
        yield problem(f"{said}: they are all the same", "look at what the source reads")
    elif wanted is None:
        yield ok(said)
    elif low < wanted[0] - 1e-4 or high > wanted[1] + 1e-4:
        yield problem(f"{said}: outside data.value_range {list(wanted)}", "correct the source's grey levels")
    elif high - low < 0.5 * (wanted[1] - wanted[0]):
        yield warning(
            f"{said}: they fill little of data.value_range {list(wanted)}",
            f"the source declares {recipe.data.data_spec.num_grey_levels} grey levels; correct that, or the images",
        )
    else:
        yield ok(f"{said}, within {list(wanted)}")


def sigma_data(recipe: Recipe) -> Iterator[Finding]:
    """Check ``sigma_data`` against the measured deviation, where the model divides by it."""
    denoiser = recipe.method.denoiser
    if not denoiser.unit_variance:
        return
    measured = float(recipe.first.std())
    said = f"sigma_data is {denoiser.sigma_data:g}, the data's deviation {measured:.3g}"
    if measured > 0.0 and 1 / 1.5 < denoiser.sigma_data / measured < 1.5:
        yield ok(said)
    else:
        yield warning(said, f"set model.init_args.sigma_data {measured:.2g}")


def largest_noise(recipe: Recipe) -> Iterator[Finding]:
    """Check that the largest noise level of a variance-exploding process covers the data.

    NCSNv2 (Song and Ermon 2020, https://arxiv.org/abs/2006.09011), technique 1: sigma_max as large as the largest
    distance between two training data.
    """
    process = recipe.method.denoiser.process
    if not isinstance(process, VE) or process.num_timesteps == 1:
        return
    flat = recipe.first.flatten(1).double()
    centred = flat - flat.mean(0)
    # The largest eigenvalue of the covariance, by the smaller of the two matrices that share it.
    gram = centred @ centred.T if len(flat) < flat.shape[1] else centred.T @ centred
    widest = math.sqrt(float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0.0)) / max(len(flat) - 1, 1))
    farthest = float(torch.pdist(flat).max()) if len(flat) > 1 else 0.0
    said = f"sigma_max is {process.sigma_max:.4g}"
    if process.sigma_max < widest:
        yield warning(
            f"{said}, below the data's {widest:.3g} along their widest direction: samples start where no data were",
            f"raise it to {farthest:.3g}, the largest distance among the first {len(flat)} data (NCSNv2, technique 1)",
        )
    elif process.sigma_max < 0.95 * farthest:  # Of all the data the largest is a little above that of the first.
        yield note(
            f"{said}, above the data's widest deviation {widest:.3g} and below their largest distance {farthest:.3g}",
            "sampling may not mix far modes; NCSNv2's technique 1 would raise it to that",
        )
    else:
        yield ok(f"{said}; the data's widest deviation is {widest:.3g}, their largest distance {farthest:.3g}")


def prior_mismatch(recipe: Recipe) -> Iterator[Finding]:
    """Check that the data at t_max match the prior, from which samples start, where the process is not VE.

    The gap is ``E_x KL(N(alpha x, sigma^2) || N(0, prior_std^2))`` in bits per dimension.
    """
    process = recipe.method.denoiser.process
    if isinstance(process, VE):
        return
    end = process.coefficients(torch.tensor([process.t_max], dtype=torch.float64))
    alpha, ratio = float(end.alpha), (float(end.sigma) / process.prior_std) ** 2
    power = float(recipe.first.double().square().mean()) / process.prior_std**2
    # KL(N(alpha x, sigma^2) || N(0, prior^2)) in bits per dimension, averaged over the data.
    gap = 0.5 * (alpha**2 * power + ratio - 1.0 - math.log(ratio)) / math.log(2.0)
    said = f"at t = {process.t_max:g} the data weigh alpha = {alpha:.2g}, {gap:.2g} bits per dimension from the prior"
    if gap > PRIOR_GAP:
        yield warning(
            f"{said}: samples start from noise that training never saw",
            "raise the last beta (a linear schedule of T timesteps wants beta_1 and beta_T times 1000 / T)",
        )
    else:
        yield ok(said)
    wanted = recipe.data.data_spec.value_range
    if wanted is not None and not wanted[0] < 0.0 < wanted[1]:
        yield warning(
            f"data.value_range {list(wanted)} is not centred, and this process draws data towards 0",
            "set data.value_range [-1, 1]",
        )


def reverse_chain(recipe: Recipe) -> Iterator[Finding]:
    """Check that samples are drawn with the reverse variance that the method trains."""
    method = recipe.method
    trained = method.reverse_variance
    if trained is None or not isinstance(method.sampler, Ancestral):
        return
    drawn = method.reverse_chain.variance_of(method.denoiser)
    if drawn == trained:
        yield ok(f"samples are drawn with the reverse variance of the model, {trained}")
    else:
        yield warning(
            f"model.init_args.variance is {trained}, and the sampler's is {drawn}: samples, and the bound that test "
            f"reports, have {drawn}",
            f"set model.init_args.sampler.init_args.variance {trained}",
        )


# ---- the length of the run ---------------------------------------------------------------------------------------


def length(recipe: Recipe) -> Iterator[Finding]:
    """Report the length of the run, by which several checks go."""
    if recipe.trainer.endless:
        yield problem("a run needs an end", "give trainer.max_images, trainer.max_steps or trainer.max_time")
    elif recipe.length is None:
        yield note("only time ends this run: averages, warm-up and cadences are not compared with its length")
    else:
        passes = recipe.length / len(recipe.data.train_indices)
        steps = math.ceil(recipe.length / recipe.batch)
        yield ok(f"{recipe.length:,} images, {steps:,} steps of {recipe.batch}, {passes:.3g} times through the data")


def averages(recipe: Recipe) -> Iterator[Finding]:
    """Check the averages' half-lives against the length of the run."""
    half_lives, length = recipe.half_lives, recipe.length
    if not half_lives:
        yield note("no averaged weights: samples of the raw ones are noisier", "set ema.half_lives_images")
        return
    if length is None:
        return
    long = [half_life for half_life in half_lives if half_life > LONG_AVERAGE * length]
    if long:
        yield warning(
            f"averages of half-life {', '.join(f'{each:,}' for each in long)} images are long for a run of {length:,}",
            f"set ema.half_lives_images to about [{max(1, length // 20)}]",
        )
    else:
        yield ok(f"averages of half-life {', '.join(f'{each:,}' for each in half_lives)} images")


def warmup(recipe: Recipe) -> Iterator[Finding]:
    """Check the learning rate's warm-up against the length of the run."""
    images = max(recipe.method.warmup_of(name, recipe.batch) for name in recipe.method.trained())
    if recipe.length is None or images == 0:
        return
    said = f"the learning rate warms up over {images:,} of {recipe.length:,} images"
    if images > 0.5 * recipe.length:
        yield warning(said, "shorten model.init_args.warmup_images, or train longer")
    else:
        yield ok(said)


def cadences(recipe: Recipe) -> Iterator[Finding]:
    """Check for cadences that are never due before the end, or so often that the run is spent on them."""
    if recipe.length is None:
        return
    evaluator, samples, levels = recipe.callback(Evaluator), recipe.callback(Samples), recipe.callback(NoiseLevels)
    usual: list[tuple[str, Cadence, int]] = [("checkpoint", recipe.callback(Checkpoint).cadence, TOO_OFTEN)]
    if evaluator.metrics != []:
        usual.append(("eval", evaluator.cadence, TOO_OFTEN))
    if samples.count:
        usual.append(("samples", samples.cadence, TOO_OFTEN))
    if levels.num_levels:
        usual.append(("noise_levels", levels.cadence, TOO_OFTEN))
    usual.append(("telemetry", recipe.callback(Telemetry).cadence, TOO_MANY_EVENTS))
    fine = []
    for name, cadence, most in usual:
        times = how_often(cadence, recipe.length, recipe.batch)
        if times is None:
            if name in ("checkpoint", "telemetry"):
                yield note(f"{name} has no cadence", f"set {name}.every_n_images")
        elif times > most:
            yield warning(
                f"{name} is due {times:,} times in {recipe.length:,} images",
                f"raise {name}.every_n_images to {max(1, recipe.length // 50)} or so",
            )
        elif times < 1:
            fix = f"lower {name}.every_n_images below {recipe.length}"
            if name == "checkpoint":
                yield warning(f"a checkpoint is written at the end alone: a kill before loses {recipe.length:,}", fix)
            elif name == "telemetry":
                yield warning("telemetry is never due: no loss is written", fix)
            else:
                yield note(f"{name} is due at the end alone", fix)
        else:
            fine.append(f"{name} {times:,}")
    if fine:
        yield ok(f"number of times due: {', '.join(fine)}")


def how_often(cadence: Cadence, length: int, batch: int) -> int | None:
    """Number of times that a cadence is due in a run; None for an empty cadence."""
    steps = math.ceil(length / batch)
    by_images = 0 if cadence.images is None else min(steps, steps * batch // cadence.images)
    by_steps = 0 if cadence.steps is None else steps // cadence.steps
    return None if cadence == Cadence() else max(by_images, by_steps)


# ---- batches and processes ---------------------------------------------------------------------------------------


def batches(recipe: Recipe) -> Iterator[Finding]:
    """Check the global batch against processes, micro batch and data."""
    data, processes = recipe.data, recipe.processes
    if recipe.batch % processes != 0:
        yield problem(
            f"data.global_batch_size {recipe.batch} is not a multiple of the {processes} processes",
            f"set it to {processes * math.ceil(recipe.batch / processes)}",
        )
        return
    held_out = len(data.held_out_indices)
    if 0 < held_out < processes:
        yield problem(f"{held_out} held-out images for {processes} processes", "hold out more, or none")
    share, micro = recipe.batch // processes, data.micro_batch_size
    if micro is not None and micro < share and share % micro != 0:
        yield note(
            f"{share} images of a process in parts of data.micro_batch_size {micro}: the last part has {share % micro}",
            f"a divisor of {share} keeps all parts alike",
        )
    elif micro is not None and micro > share:
        yield note(f"data.micro_batch_size {micro} is above a process's share of {share} and changes nothing")
    if recipe.batch > len(data.train_indices):
        yield note(
            f"a batch of {recipe.batch} is more than the {len(data.train_indices)} training data: "
            f"a step sees some of them twice",
            "a smaller data.global_batch_size learns as much from a step",
        )
    parts = 1 if micro is None else math.ceil(share / micro)
    plural = "es" if processes > 1 else ""
    yield ok(f"batch {recipe.batch} on {processes} process{plural}: {share} each, in {parts} part{'s' * (parts > 1)}")


# ---- evaluation and sampling -------------------------------------------------------------------------------------


def samplers(recipe: Recipe) -> Iterator[Finding]:
    """Check that the sampler fits the model, and that the weights to sample with are kept."""
    method = recipe.method
    method.sampler.check(method.denoiser)
    samples = recipe.callback(Samples)
    averages = recipe.callback(EMA)
    if samples.count:
        choose_average(recipe.half_lives, averages.kept(samples.weights))
    yield ok(f"sampler {type(method.sampler).__name__} fits the model")


def likelihoods(recipe: Recipe) -> Iterator[Finding]:
    """Check that the model learns the times at which `test` would measure."""
    recipe.callback(Likelihood).check_times(recipe.method.denoiser.process)
    yield from ()


def evaluation(recipe: Recipe) -> Iterator[Finding]:
    """Check that the configured metrics can be measured."""
    evaluator = recipe.callback(Evaluator)
    if evaluator.metrics == [] or evaluator.cadence == Cadence():
        yield note("no metrics of samples while training", "set eval.every_n_images")
        return
    averages = recipe.callback(EMA)
    averages.setup(recipe.trainer, recipe.method, "fit")  # Turns steps into images.
    found, choice = evaluator.check(recipe.method, recipe.data, averages, "fit")  # Checks the weights' sha256, too.
    name, real = found.extractor.name, found.data.reference
    if name in WEIGHTS:
        yield ok(f"weights of {name} are here, sha256 {found.extractor.sha256[:16]}...")
    if evaluator.samples == "auto":
        yield note("eval.samples auto: the count is found at the first evaluation", "give a number to compare runs")
    else:
        for caveat in choice.caveats:
            yield note(caveat, "raise eval.samples")
    if choice.left_out:
        yield note(f"left out: {left_out_line(choice.left_out)}")
    assert isinstance(real, RealData)
    if real.count < (dimension := found.extractor.dimension):
        yield note(f"{real.count} real data are fewer than the {dimension} dimensions of features of {name}")
    measured = f"{', '.join(choice.metrics)} of {evaluator.samples} samples in features of {name}"
    yield ok(f"{measured}, against {real.count} data")


# ---- device, memory, directory -----------------------------------------------------------------------------------


def precision(recipe: Recipe) -> Iterator[Finding]:
    """Check that the device is fast in the configured precision."""
    dtype, name = recipe.trainer.autocast_dtype, precision_name(recipe.trainer.autocast_dtype)
    device = type(recipe.trainer.accelerator).__name__.removesuffix("Accelerator")
    if dtype is not None and recipe.on_cuda:
        least = (8, 0) if dtype == torch.bfloat16 else (7, 0)
        version = torch.cuda.get_device_capability()
        if version < least:
            yield warning(f"precision {name}: a GPU of capability {version[0]}.{version[1]} emulates it", "use 32-true")
            return
    elif dtype == torch.float16:
        yield warning(f"precision {name} on {device}: slower than float32", "set trainer.precision 32-true")
        return
    elif dtype == torch.bfloat16 and device == "CPU" and machine.fast_bf16_on_cpu() is False:
        yield warning(f"precision {name} on a CPU without bfloat16: slow", "set trainer.precision 32-true")
        return
    elif device == "CPU" and torch.cuda.is_available():
        yield note("it trains on the CPU, and there is a GPU", "set trainer.accelerator auto")
    yield ok(f"trains on {device} in {name}")


def compiling(recipe: Recipe) -> Iterator[Finding]:
    """Check that ``trainer.compile`` finds its compiler."""
    if not recipe.trainer.compile:
        return
    if reason := machine.compiler(recipe.on_cuda):
        yield problem(f"trainer.compile: {reason}", "install one, or set trainer.compile false")
    elif not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        yield warning("trainer.compile: Python's headers are not here", "install python3-dev, or trainer.compile false")
    else:
        yield ok("trainer.compile finds a compiler")


def states_of(make_optimizer: OptimizerCallable) -> int:
    """Number of values that an optimizer keeps per weight (Adam: 2), found by a step on a tiny parameter."""
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    optimizer = make_optimizer([weight])
    optimizer.step()
    return sum(
        1 for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.shape == weight.shape
    )


def sizes(recipe: Recipe) -> tuple[int, int, int]:
    """Number of trained parameters, bytes of a checkpoint, and bytes in training without activations."""
    parameters = checkpoint = training = 0
    for name, network in recipe.method.trained().items():
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        kept = 1 + states_of(recipe.method.optimizer_of(name)) + len(recipe.half_lives)
        parameters += sum(p.numel() for p in network.parameters())
        checkpoint += kept * weights
        # Besides what is kept: gradients, and the raw weights while a picture has an average.
        training += (kept + 2) * weights
    return parameters, checkpoint, training


def memory(recipe: Recipe) -> Iterator[Finding]:
    """Check the memory for weights, gradients, optimizer and averages; activations come on top."""
    parameters, _, need = sizes(recipe)
    backbone, averages = type(recipe.method.denoiser.backbone).__name__, len(recipe.half_lives)
    said = (
        f"{backbone} of {parameters / 1e6:.3g} million parameters: {in_bytes(need)} with gradients, optimizer and "
        f"{averages} average{'s' * (averages != 1)}, activations on top"
    )
    if recipe.on_cuda:
        have, where = torch.cuda.get_device_properties(0).total_memory, "the GPU"
    else:
        have, where = machine.memory() // recipe.trainer.num_devices, "a process"
    if need > have:
        yield problem(f"{said}; {where} has {in_bytes(have)}", "take a smaller backbone or fewer averages")
    elif need > 0.7 * have:
        yield warning(f"{said}; {where} has {in_bytes(have)}", "take a smaller backbone or fewer averages")
    else:
        yield ok(said)


def disk(recipe: Recipe) -> Iterator[Finding]:
    """Check the room for the best checkpoints, the newest, the one before it, and the one being written."""
    _, size, _ = sizes(recipe)
    evaluator = recipe.callback(Evaluator)
    best = evaluator.keep if evaluator.metrics != [] and evaluator.cadence != Cadence() else 0
    yield from machine.disk(recipe.run_dir, (3 + best) * size, f"{3 + best} checkpoints of {in_bytes(size)}")


def run_directory(recipe: Recipe) -> Iterator[Finding]:
    """Check that the run's directory can be made, or the run in it continued."""
    directory = recipe.run_dir
    if reason := machine.writable(directory):
        yield problem(f"run_dir {directory} cannot be written ({reason})", "choose another by --run_dir")
    elif writer := writer_of(directory):
        yield problem(
            f"run_dir {directory} is being written by {writer}",
            "wait until it has ended, or choose another; --resume auto takes a dead one over",
        )
    elif recipe.logger.continues:
        if (directory / "metrics.jsonl").exists():  # Not in a run that was killed before its first event.
            require_known_events(directory)
        yield ok(f"continues the run in {directory}")
    elif recipe.logger.wanted is not None and any((directory / name).exists() for name in RUN_DIR_FILES):
        yield problem(
            f"run_dir {directory} already holds a run",
            "choose another, or continue that one with --resume auto",
        )
    else:
        yield ok(f"the run goes to {directory}{'' if recipe.logger.wanted else '/<run id>'}")


def shared_memory(recipe: Recipe) -> Iterator[Finding]:
    """Check the shared memory and the open files of data workers."""
    yield from machine.shared_memory(recipe.data.num_workers)
    yield from machine.open_files(recipe.data.num_workers)


def dashboard(recipe: Recipe) -> Iterator[Finding]:
    """Report the run's use of Weights & Biases."""
    yield from weights_and_biases(recipe.dashboard)


def weights_and_biases(view: Dashboard) -> Iterator[Finding]:
    """Report the mode of a dashboard; asks no server."""
    if view.mode == "disabled":
        yield note("Weights & Biases is disabled: metrics.jsonl and `report` have all of a run")
        return
    try:
        mode, known = view.resolved_mode(), logged_in()
    except Exception as error:  # A view in trouble ends no run.
        yield warning(
            f"Weights & Biases cannot be used ({first_line(error)})", "reinstall wandb, or --wandb.mode disabled"
        )
        return
    if mode == "online" and not known:
        yield warning("Weights & Biases is to be online, and you are not logged in", "wandb login, or WANDB_API_KEY")
    elif mode == "online":
        yield ok(f"Weights & Biases: online, project {view.project}")
    elif mode == "offline":
        yield note("Weights & Biases: offline", "wandb login to see runs online; wandb-sync shows them later")
    else:
        yield note("Weights & Biases is disabled: metrics.jsonl and `report` have all of a run")


CHECKS: tuple[Check, ...] = (
    data_found,
    classes,
    data_range,
    sigma_data,
    largest_noise,
    prior_mismatch,
    reverse_chain,
    length,
    averages,
    warmup,
    cadences,
    batches,
    samplers,
    likelihoods,
    evaluation,
    precision,
    compiling,
    memory,
    disk,
    run_directory,
    shared_memory,
    dashboard,
)

SAID_BY_FIT: tuple[Check, ...] = (
    classes,
    data_range,
    sigma_data,
    largest_noise,
    prior_mismatch,
    reverse_chain,
    averages,
    warmup,
)
"""Quick checks whose warnings ``fit`` prints, too: of what makes a run learn or sample something else."""
