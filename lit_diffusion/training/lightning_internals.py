"""Every private name of Lightning that this package uses, each with its reason.

None of them is promised to stay: ``tests/training/test_lightning_internals.py`` fails for the one that goes.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector


class _NoHandlers(_SignalConnector):
    """Connector without Lightning's signal handlers, which save in the handler; ours set a flag (interrupts.py)."""

    def register_signal_handlers(self) -> None:
        self.received_sigterm = False


class _NeverSkipped(_FitLoop):
    """Fit loop that runs its start and end hooks even if no step is left: ours make up for a stop there."""

    @property
    def skip(self) -> bool:
        """True where there is nothing to do."""
        return bool(self.trainer.limit_train_batches == 0)


def use_own_signals_and_loop(trainer: pl.Trainer) -> None:
    """Replace the signal connector and the fit loop of a Trainer that was just built by the two classes above."""
    trainer._signal_connector = _NoHandlers(trainer)
    loop = _NeverSkipped(trainer, min_epochs=trainer.fit_loop.min_epochs, max_epochs=trainer.fit_loop.max_epochs)
    loop.epoch_loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop = loop


def count_step(trainer: pl.Trainer) -> None:
    """Advance ``trainer.global_step``, by which ``max_steps`` ends a training, by one step of the clock.

    Lightning counts every call of every optimizer: two would halve a run, and a skipped step would not count.
    """
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def validation_follows(trainer: pl.Trainer) -> bool:
    """True where the held-out loss is measured after the step that is being made."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def validate_now(trainer: pl.Trainer) -> None:
    """Measure the held-out loss as Lightning does after a step; no public call does that inside a training."""
    first_iteration = trainer._logger_connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.restarting = False
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first_iteration


def checkpoint_of(trainer: pl.Trainer) -> dict[str, Any]:
    """The content of a checkpoint; ``Trainer.save_checkpoint`` would hang where one process cannot write."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def shard_over_all_processes(strategy: ModelParallelStrategy) -> None:
    """Make a sharded strategy shard over the processes of all nodes; its default is over the nodes."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


class OpenCLI(LightningCLI):
    """LightningCLI with public names for the private methods that this package's overrides or calls."""

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's would let the checkpoint override the command line."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_command(subcommand)

    def run_command(self, subcommand: str) -> None:
        """Call the Trainer's method of the command's name; the constructor's last act."""
        super()._run_subcommand(subcommand)

    def instantiated(self, key: str) -> Any:
        """The object instantiated from a key of the running command."""
        return self._get(self.config_init, key)

    def parser_of(self, subcommand: str | None) -> LightningArgumentParser:
        """The parser of a command, without the argument that chooses the command."""
        parser: LightningArgumentParser = self._parser(subcommand)
        return parser
