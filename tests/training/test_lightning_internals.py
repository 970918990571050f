"""The private names of Lightning that the package uses are there, and mean what they meant."""

from __future__ import annotations

import ast
from pathlib import Path

from helpers.tiny import digits_data, fit, ncsn
from lightning.pytorch.strategies import ModelParallelStrategy

import lit_diffusion
from lit_diffusion.training import lightning_internals as internals
from lit_diffusion.training.trainer import Trainer


def test_every_private_name_is_there(tmp_path):
    seen = []
    method = ncsn()
    step = method.training_step

    def watched(batch, batch_idx):
        loop = method.trainer.fit_loop
        seen.append((loop._data_fetcher is not None, callable(loop.epoch_loop._should_check_val_fx)))
        step(batch, batch_idx)
        seen.append(method.trainer.global_step)

    method.training_step = watched
    made = fit(method, digits_data(), tmp_path, 64, limit_val_batches=1.0, val_check_interval=2)
    assert seen == [(True, True), 1, (True, True), 2]
    assert hasattr(made._logger_connector, "_first_loop_iter")
    assert internals.checkpoint_of(made)["global_step"] == 2
    assert isinstance(made._signal_connector, internals._NoHandlers)
    assert isinstance(made.fit_loop, internals._NeverSkipped)
    assert "_data_parallel_size" in vars(ModelParallelStrategy())


def test_they_are_used_in_one_file():
    names = {"_FitLoop", "_SignalConnector", "_first_loop_iter", "_data_fetcher", "_should_check_val_fx"}
    names |= {"_logger_connector", "_checkpoint_connector", "_data_parallel_size", "_signal_connector"}
    names |= {"_parse_ckpt_path", "_run_subcommand", "_get"}
    root, found = Path(lit_diffusion.__file__).parent, set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", None)
            if name in names:
                found.add(path.relative_to(root).as_posix())
    assert found == {"training/lightning_internals.py"}
    assert issubclass(internals._NeverSkipped, type(Trainer(logger=False, accelerator="cpu").fit_loop).__mro__[1])
