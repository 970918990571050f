"""fit, validate, test and predict: LightningCLI with this project's parser, precedence and run directory.

Precedence, from lowest to highest: defaults, the configuration in ``--ckpt_path``, configuration files in their order,
the command line.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

import lit_diffusion.data
import lit_diffusion.methods  # noqa: F401 (short class names in YAML resolve once their modules are imported)
from lit_diffusion.callbacks import (
    EMA,
    Checkpoint,
    Evaluator,
    Likelihood,
    NoiseLevels,
    ProgressBar,
    Samples,
    Telemetry,
)
from lit_diffusion.checkpoints import (
    build_method,
    checkpoint_config,
    newest_checkpoint,
    open_checkpoint,
    require_fitting_weights,
)
from lit_diffusion.cli.arguments import in_order, last_value
from lit_diffusion.config.parser import Parser, users_own_errors
from lit_diffusion.config.yaml_files import Loader
from lit_diffusion.data_spec import DataSpec
from lit_diffusion.errors import UserError
from lit_diffusion.failures import is_first_process
from lit_diffusion.interrupts import Interrupted
from lit_diffusion.methods.base import Method
from lit_diffusion.runs.best import read_best
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.dashboard import Dashboard
from lit_diffusion.runs.events import drop_lost_events
from lit_diffusion.runs.formats import CHECKPOINT_KEY, FORMAT_VERSION, require_known_format
from lit_diffusion.runs.lock import RunLock
from lit_diffusion.runs.logger import RunLogger
from lit_diffusion.training import threads
from lit_diffusion.training.callback import Callback
from lit_diffusion.training.datamodule import DataModule
from lit_diffusion.training.lightning_internals import OpenCLI
from lit_diffusion.training.trainer import Trainer, callbacks_of

# Interpolations are resolved after all files and arguments are merged, and absolute ones work below subcommands.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)

OF_THE_RUN = frozenset({"config", "run_dir", "resume", "ckpt_path", "init_from", "format_version", "experiment"})
"""Keys of one run, not of what is computed: neither inherited from a checkpoint nor compared with it."""


TRAINER_DEFAULTS = {
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    # Fixed by Trainer for every run; repeated here so that config.yaml says what was done.
    "max_epochs": -1,
    "inference_mode": False,
    "use_distributed_sampler": False,
}


CALLBACKS: dict[str, type[pl.Callback]] = {
    "ema": EMA,
    "checkpoint": Checkpoint,
    "samples": Samples,
    "telemetry": Telemetry,
    "noise_levels": NoiseLevels,
    "eval": Evaluator,
    "likelihood": Likelihood,
}
"""Callbacks that every run has, by the key that configures each."""


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested dictionary to dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


class LightningParser(Parser, LightningArgumentParser):
    """Parser of LightningCLI's commands."""


class CLI(OpenCLI):
    """LightningCLI with named callbacks, checkpoint precedence, ``auto`` values and run directories."""

    lock: RunLock | None = None
    """Lock of the run's directory, if that is known before the Trainer has connected its processes."""

    def __init__(self, args: Sequence[str], **kwargs: Any) -> None:
        self._command = args[0]
        try:
            super().__init__(args=list(args), **kwargs)
        finally:
            if self.lock is not None:
                self.lock.release()

    # ---- the parser --------------------------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning, which asks self
        """The running command alone, without the option ``weights_only``, which would unpickle code.

        The parsers of the other commands, each with all keys, would take half of a command's start-up time.
        """
        return {self._command: OpenCLI.subcommands()[self._command] | {"weights_only"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed."""
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="Seed of data order, noise and initial weights."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys besides model, data and trainer; callbacks are named keys, so that no list can drop them."""
        parser.add_argument(
            "--format_version", type=int, default=FORMAT_VERSION, help="Format version of this configuration."
        )
        parser.add_argument(
            "--experiment", type=str | None, default=None, help="Family of runs; null: the configuration file's name."
        )
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="The run's directory; null: runs/<experiment>/<run id>."
        )
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: continue the run in --run_dir, or start it there; null: start a new run.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Checkpoint, or a run's directory, to take the initial weights from, and nothing else.",
        )
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.add_class_arguments(Dashboard, "wandb")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; with a checkpoint, parse them on top of its configuration."""
        self.checkpoint: dict[str, Any] | None = None
        self.inherited: dict[str, Any] = {}
        command, *rest = list(args)
        self.changed: dict[str, Any] = {}
        """Values that differ from the checkpoint's, by dotted key: the checkpoint's and the new one."""
        self.continues = False
        """True where the run in run_dir is continued."""
        ckpt_path, run_dir, resume = (last_value(rest, key) for key in ("ckpt_path", "run_dir", "resume"))
        if ckpt_path is None and (resume != "auto" or run_dir is None or not Path(run_dir, "checkpoints").is_dir()):
            self.config = _parsed(parser, [command, *rest])
            ckpt_path, run_dir, resume = (self.config[command].get(key) for key in ("ckpt_path", "run_dir", "resume"))
        self._hold(run_dir, wait=resume == "auto")  # Before its checkpoint is read.
        if resume == "auto":
            newest = self._newest(command, ckpt_path, run_dir)
            if newest is not None:
                ckpt_path, self.checkpoint = str(newest[0]), newest[1]
                rest += ["--ckpt_path", ckpt_path]
        if ckpt_path is None:
            if not hasattr(self, "config"):
                self.config = _parsed(parser, [command, *rest])
            return
        if self.checkpoint is None:
            path, self.checkpoint = open_checkpoint(ckpt_path)
            if path != Path(ckpt_path):  # A run's directory was given.
                ckpt_path = str(path)
                rest += ["--ckpt_path", ckpt_path]
        self.inherited = {
            key: value
            for key, value in checkpoint_config(self.checkpoint, ckpt_path).items()
            if key not in OF_THE_RUN or key == "experiment"
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.yaml"
            path.write_text(yaml.safe_dump(self.inherited))
            self.config = _parsed(parser, [command, "--config", str(path), *rest])

    def _hold(self, run_dir: str | None, wait: bool = False) -> None:
        """Take the lock of a run's directory before anything in it is read or touched; only in the first process.

        Where several processes were started together, a refusal is raised later by the run's logger, once they are
        connected, so that all of them end.
        """
        if run_dir is None or self.lock is not None or not is_first_process():
            return
        self.lock = RunLock(Path(run_dir), print_note)
        try:
            self.lock.take(wait)
        except Interrupted:
            raise
        except UserError:
            if all(os.environ.get(name, "1") == "1" for name in ("WORLD_SIZE", "SLURM_NTASKS")):
                raise

    def _newest(self, command: str, ckpt_path: str | None, run_dir: str | None) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that ``--resume auto`` continues from, None where there is none yet."""
        if command != "fit":
            raise UserError(f"--resume continues a training; {command} takes --ckpt_path")
        if run_dir is None:
            raise UserError("--resume auto needs --run_dir, the directory in which the run is started and continued")
        if ckpt_path is not None:
            raise UserError("give --resume auto or --ckpt_path, not both")
        self.continues = (Path(run_dir) / "run_id").is_file()
        return newest_checkpoint(Path(run_dir)) if self.continues else None

    # ---- from configuration to objects -------------------------------------------------------------------------

    @property
    def _section(self) -> Namespace:
        return self.config[self.subcommand]

    def instantiate_classes(self) -> None:
        """Instantiate the data, then the values that the model takes from them, then the model, then the Trainer."""
        section = self._section
        require_known_format(section.format_version, "the configuration")
        if section.eval.samples == "auto" and isinstance(self.inherited.get("eval", {}).get("samples"), int):
            # A continued run keeps its number of samples, so that its metrics stay comparable.
            section["eval.samples"] = self.inherited["eval"]["samples"]
        self._set_threads(section)
        model = section.pop("model")
        with users_own_errors():
            self.config_init = self.parser.instantiate(self.config)
        section["model"] = model
        self.datamodule = self.instantiated("data")
        self.datamodule.seed = section.seed_everything
        self.model = self._build_model(section)
        self.trainer = self.instantiate_trainer()

    def _set_threads(self, section: Namespace) -> None:
        """Set the number of threads before any work: the one given, else the continued run's, else this machine's."""
        here = threads.suggested(threads.local_processes(section.trainer.devices, section.trainer.accelerator))
        own = self.inherited.get("trainer", {}).get("threads")
        if section.trainer.threads is None:
            section["trainer.threads"] = here if own is None else own
        threads.use(section.trainer.threads)
        if own is not None and section.trainer.threads == own != here:
            print_note(f"trainer.threads {own} is the run's own; this machine would choose {here}")

    def _build_model(self, section: Namespace) -> Method:
        inherited = flatten(self.inherited)
        for key, value in flatten({"model": section.model.as_dict()}).items():
            # A continued run keeps the numbers that it was started with, whatever its data look like now.
            if value == "auto" and inherited.get(key) is not None:
                section[key] = inherited[key]
        found = _import(section.model.class_path).resolve_auto(
            section.model.init_args.as_dict(), self.datamodule, print_note
        )
        for key, value in found.items():
            section[f"model.init_args.{key}"] = value
        # The weights' first values follow from the seed, whatever the data set-up drew before.
        torch.manual_seed(section.seed_everything)
        method = build_method(section.model.as_dict())
        method.seed = section.seed_everything
        method.data_spec = self.datamodule.data_spec
        method.require_fitting_classes(self.datamodule)
        method.clock.batch = self.datamodule.global_batch_size
        self._load_weights(method, section)
        return method

    def _load_weights(self, method: Method, section: Namespace) -> None:
        if self.checkpoint is not None:
            if self.continues:
                self._require_same_method(section)
            require_fitting_weights(method, self.checkpoint["state_dict"], section.ckpt_path)
            trained = self.checkpoint[CHECKPOINT_KEY]["data_spec"]
            if trained is not None and method.num_classes is not None:
                trained = DataSpec.from_plain(trained)
                self.datamodule.data_spec.require_classes_of(trained, f"checkpoint {section.ckpt_path}")
            method.on_load_checkpoint(self.checkpoint)  # So that the run's first event has its clock.
            print_note(f"checkpoint {section.ckpt_path}: {method.clock.images} images seen")
            self._print_differences(section)
        if section.init_from is not None and not self.continues:  # A continued run has weights.
            if self.checkpoint is not None:
                raise UserError("give --ckpt_path (continue a run) or --init_from (start from weights), not both")
            path, checkpoint = open_checkpoint(section.init_from)
            require_fitting_weights(method, checkpoint["state_dict"], path)
            method.load_state_dict(checkpoint["state_dict"])
            print_note(f"weights from {path}")

    def _require_same_method(self, section: Namespace) -> None:
        """Refuse a checkpoint of another method: weights of equal shapes do not distinguish methods on one network."""
        then, now = (str(model["class_path"]).rsplit(".", 1)[-1] for model in (self.inherited["model"], section.model))
        if then != now:
            raise UserError(
                f"checkpoint {section.ckpt_path} is of {then}, and the configuration is of {now}: continue the run "
                f"with its own, or start another in another --run_dir"
            )

    def _print_differences(self, section: Namespace) -> None:
        now, then = flatten(_plain(self._config_text(section))), flatten(self.inherited)
        roots = self.inherited.keys() - OF_THE_RUN
        for key in sorted(now.keys() | then.keys()):
            if key.split(".")[0] in roots and now.get(key) != then.get(key):
                print_note(f"differs from the checkpoint: {key}: {then.get(key)} there, {now.get(key)} now")
                self.changed[key] = [then.get(key), now.get(key)]

    def _config_text(self, section: Namespace) -> str:
        """Text of config.yaml: complete, resolved, runnable as it is."""
        again = section.clone()
        for key in ("run_dir", "resume", "ckpt_path", "init_from"):
            again[key] = None
        again["experiment"] = self._experiment(section)
        return str(self.parser_of(self.subcommand).dump(again, skip_unset=False, format="yaml"))

    @staticmethod
    def _experiment(section: Namespace) -> str:
        if section.experiment:
            return str(section.experiment)
        files = [Path(str(path)) for path in section.get("config") or []]
        return files[-1].stem if files else "run"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Instantiate the Trainer with the run's logger before any others, and the named callbacks."""
        section = self._section
        others = self.config_init[self.subcommand]["trainer"]["logger"]
        fast = bool(section.trainer.fast_dev_run)
        text = self._config_text(section)
        self.model.run_config = _plain(text)
        self.run_logger = self._make_run_logger(section, text)
        self.run_logger.clock = self.model.clock
        if isinstance(others, bool) or others is None:
            others = []
        loggers = [self.run_logger, *(others if isinstance(others, list) else [others])]
        try:
            trainer = super().instantiate_trainer(logger=False if fast else loggers)
        except (MisconfigurationException, ValueError, TypeError, KeyError, ImportError) as error:
            raise UserError(f"Lightning refuses the keys of trainer: {' '.join(str(error).split())[:300]}") from error
        assert isinstance(trainer, Trainer)
        if self.continues:  # Only now, when the configuration is known to be right.
            self._set_lost_events_aside(Path(section.run_dir))
        if trainer.progress_bar_callback is not None:
            callbacks = callbacks_of(trainer)
            callbacks.remove(trainer.progress_bar_callback)
            callbacks.insert(0, ProgressBar())
        return trainer

    def _make_run_logger(self, section: Namespace, config_text: str) -> RunLogger:
        run_dir = None if section.run_dir is None else Path(section.run_dir)
        if self.subcommand == "fit" and run_dir is not None and self.checkpoint is not None:
            self.continues = run_dir.resolve() in Path(section.ckpt_path).resolve().parents
        self._hold(section.run_dir)  # If it comes from a file below --ckpt_path.
        return RunLogger(
            experiment=self._experiment(section),
            config_text=config_text,
            config=self.model.run_config,
            run_dir=run_dir,
            dashboard=self.config_init[self.subcommand]["wandb"],
            continues=self.continues,
            changed=self.changed,
            lock=self.lock,
        )

    def _set_lost_events_aside(self, run_dir: Path) -> None:
        if self.lock is None or not self.lock.held:  # Another process does it, or the logger will refuse.
            return
        seen, again = -1, set[str]()  # Killed before its first checkpoint: all events are made again.
        if self.checkpoint is not None:
            seen, again = made_again(self.checkpoint)
        lost = drop_lost_events(run_dir, seen, again)
        print_note(f"continuing the run in {run_dir}" + (f" ({lost} later events set aside)" if lost else ""))

    # ---- lines at the start and at the end ---------------------------------------------------------------------

    def before_fit(self) -> None:
        """Print the warnings of ``doctor`` that take no time; a continued run printed them when it started."""
        from lit_diffusion.checks import recipe  # It imports this module.

        if not self.trainer.is_global_zero or self.continues or self._section.trainer.fast_dev_run:
            return
        assert isinstance(self.trainer, Trainer)
        dashboard = self.config_init[self.subcommand]["wandb"]
        made = recipe.Recipe(self.model, self.datamodule, self.trainer, self.run_logger, dashboard)
        for finding in recipe.findings(made, recipe.SAID_BY_FIT):
            if finding.severity in ("warning", "problem"):
                print_note(str(finding))

    def after_fit(self) -> None:
        """Print where everything is, and what to do next."""
        if not self.trainer.is_global_zero or self._section.trainer.fast_dev_run:
            return
        run_dir = _short(self.run_logger.run_dir)
        checkpoint = f"{run_dir}/checkpoints/last.ckpt"
        print_note(f"done: {self.model.clock.images} images in {self.model.clock.steps} steps")
        print_note(f"  run         {run_dir}")
        print_note(f"  samples     {run_dir}/samples")
        print_note(f"  checkpoint  {checkpoint}")
        for entry in read_best(self.run_logger.run_dir / "checkpoints"):
            print_note(
                f"  best        {run_dir}/checkpoints/{entry['file']} ({entry['metric']} {entry['value']:.4g}, "
                f"{entry['images']} images)"
            )
        if failed := self.run_logger.failed:
            what = ", ".join(f"{name} {count} times" if count > 1 else name for name, count in failed.items())
            count = f"{failed.total()} failure" + ("s" if failed.total() > 1 else "")
            print_note(f"  {count}, see the events `failed` of {run_dir}/metrics.jsonl: {what}")
        print_note(f"  curves      python -m lit_diffusion report {run_dir}")
        print_note(
            f"  more        python -m lit_diffusion sample --ckpt_path {checkpoint} --num_samples 64 --out samples.png"
        )


def _plain(config_text: str) -> dict[str, Any]:
    plain = yaml.load(config_text, Loader)
    assert isinstance(plain, dict)
    return plain


def _parsed(parser: LightningArgumentParser, arguments: list[str]) -> Namespace:
    config = parser.parse_args(arguments)
    seed = config[arguments[0]].seed_everything
    if not 0 <= seed < 2**32:
        raise UserError(f"seed_everything is {seed}; give a whole number from 0 to {2**32 - 1}")
    return config


def made_again(checkpoint: dict[str, Any]) -> tuple[int, set[str]]:
    """Images seen at a checkpoint, and names of events and pictures that a run continued from it makes again there."""
    state, callbacks = checkpoint[CHECKPOINT_KEY], checkpoint.get("callbacks", {})
    again = {"metrics"} if state.get("validation_due", False) else set[str]()
    for callback in CALLBACKS.values():
        if issubclass(callback, Callback):
            again |= callback.made_again(callbacks.get(callback.__name__, {}), state["images_seen"])
    return state["images_seen"], again


def _short(path: Path) -> str:
    """Make a path relative to the working directory, if it is below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _import(class_path: str) -> type[Method]:
    module, name = class_path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type)
    assert issubclass(found, Method)
    return found


def main(arguments: Sequence[str], cli: type[CLI] = CLI) -> CLI:
    """Run one of LightningCLI's commands; ``doctor`` passes a CLI that stops before the work."""
    # Lightning's hints on hardware and workers are not about this run; its warnings and errors stay.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)`.*")
    try:
        return _run(arguments, cli)
    except OmegaConfBaseException as error:
        raise UserError(
            f"an interpolation of the configuration does not resolve: {str(error).splitlines()[0]}"
        ) from error


def _run(arguments: Sequence[str], cli: type[CLI]) -> CLI:
    return cli(
        model_class=Method,
        datamodule_class=DataModule,
        subclass_mode_model=True,
        save_config_callback=None,
        trainer_class=Trainer,
        trainer_defaults=TRAINER_DEFAULTS,
        parser_class=LightningParser,
        parser_kwargs={"parser_mode": "omegaconf+", "prog": "python -m lit_diffusion"},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=in_order(arguments),
    )
