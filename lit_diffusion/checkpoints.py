"""Reading checkpoints, and rebuilding a model from one alone."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.callbacks.checkpoint import LAST, PREVIOUS
from lit_diffusion.callbacks.ema import choose_average, load_average
from lit_diffusion.config.parser import Parser, users_own_errors
from lit_diffusion.data_spec import DataSpec
from lit_diffusion.errors import UserError
from lit_diffusion.methods.base import Method
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.formats import CHECKPOINT_KEY, require_known_format
from lit_diffusion.training.datamodule import DataModule


class DamagedError(UserError):
    """Error for a checkpoint that is not whole."""


def open_checkpoint(given: str | Path) -> tuple[Path, dict[str, Any]]:
    """Open the checkpoint that ``--ckpt_path`` names; in a run's directory its newest whole one, which is printed.

    Args:
        given: a checkpoint, a run's directory, or its ``checkpoints`` folder.

    Returns:
        The file and its contents.

    Raises:
        DamagedError: if the file is not whole, or none of the run's is.
        UserError: if it is missing, foreign, or of an unknown format version, or the directory holds no run.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return path, read_checkpoint(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = _newest_in(folder, "taking")
    if newest is None:
        raise UserError(
            f"{given} is a directory without a checkpoint of a run: {folder / LAST} does not exist; give a run's "
            f"directory or a file"
        )
    print_note(f"{given}: taking {newest[0]}, {newest[1][CHECKPOINT_KEY]['images_seen']} images seen")
    return newest


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Open a run's newest checkpoint that is whole; None where it has written none yet.

    Raises:
        DamagedError: if there are checkpoints and none is whole.
        UserError: if it is of an unknown format version.
    """
    return _newest_in(run_dir / "checkpoints", "continuing from")


def _newest_in(folder: Path, doing: str) -> tuple[Path, dict[str, Any]] | None:
    damaged: DamagedError | None = None
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = read_checkpoint(path)
        except DamagedError as error:
            damaged = error
            continue
        if damaged is not None:
            print_note(f"{damaged}; {doing} {path}, the one before")
        return path, found
    if damaged is not None:
        raise damaged
    return None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project, on the CPU; never unpickles code.

    Raises:
        DamagedError: if the file is truncated or its bytes are not those that were written.
        UserError: if it is missing, foreign, or of an unknown format version.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; a run keeps its own in <run_dir>/checkpoints/last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as parts:  # torch.load does not look at the checksums that torch.save wrote.
            if (broken := parts.testzip()) is not None:
                raise ValueError(f"checksum of {broken}")
    except Exception as error:  # A damaged file makes the unpickler raise whatever it may.
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise DamagedError(
            f"cannot read checkpoint {path}: truncated, or not a checkpoint ({reason}); use an earlier one"
        ) from error
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise UserError(f"{path} was not written by lit_diffusion; only its own checkpoints can be read")
    require_known_format(checkpoint[CHECKPOINT_KEY].get("format_version"), f"checkpoint {path}")
    return checkpoint


def checkpoint_config(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The resolved configuration of the run that wrote a checkpoint.

    Raises:
        UserError: if the run was not started from the command line and so has none.
    """
    config = checkpoint[CHECKPOINT_KEY]["config"]
    if config is None:
        raise UserError(
            f"checkpoint {path} holds no configuration (its run was not started by `python -m lit_diffusion fit`): "
            f"build the model in Python as it was and give it: lit_diffusion.load(path, method=...)"
        )
    config = dict(config)
    if "trace" in config.get("eval", {}):  # Written before the likelihood had a key of its own.
        config["likelihood"] = config.pop("eval")
    return config


def _instantiated(parser: Parser, key: str, section: dict[str, Any]) -> object:
    config = parser.parse_object({key: section})
    with users_own_errors():
        return parser.instantiate(config)[key]


def build_method(model: dict[str, Any]) -> Method:
    """Instantiate a method from the ``model`` section of a resolved configuration, which its checkpoints keep.

    Raises:
        UserError: if the section does not fit the classes of this version.
    """
    import lit_diffusion.methods  # noqa: F401 (short class names resolve once their modules are imported)

    parser = Parser()
    parser.add_subclass_arguments(Method, "model")
    method = _instantiated(parser, "model", model)
    assert isinstance(method, Method)
    method.run_config = {"model": model}
    return method


def build_datamodule(data: dict[str, Any]) -> DataModule:
    """Instantiate the DataModule from a resolved configuration's ``data`` section.

    Raises:
        UserError: if the data are not where the section says, or the section does not fit the classes of this version.
    """
    import lit_diffusion.data  # noqa: F401 (short class names resolve once their modules are imported)

    parser = Parser()
    parser.add_class_arguments(DataModule, "data")
    datamodule = _instantiated(parser, "data", data)
    assert isinstance(datamodule, DataModule)
    return datamodule


def require_fitting_weights(method: Method, state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Refuse weights that do not fit the model.

    Raises:
        UserError: naming the first tensor that differs.
    """
    mine = method.state_dict()
    where = f"checkpoint {path} does not fit this model"
    for name in sorted(set(mine) | set(state_dict)):
        if name not in mine or name not in state_dict:
            lacking = "this model" if name not in mine else "the checkpoint"
            raise UserError(f"{where}: {lacking} has no {name}; use the model section that it was trained with")
        if mine[name].shape != state_dict[name].shape:
            raise UserError(
                f"{where}: {name} is {list(state_dict[name].shape)} there and {list(mine[name].shape)} here; "
                f"use the model section that it was trained with"
            )


def load(
    path: str | Path,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    method: Method | None = None,
) -> Method:
    """Load the method of a checkpoint, rebuilt from the file alone, in evaluation mode: ready for a notebook.

    >>> method = lit_diffusion.load("runs/ncsn/<id>")
    >>> images = method.generate(torch.arange(16), seed=0).x

    Args:
        path: the checkpoint, or a run's directory, whose newest is taken.
        weights: ``raw``, ``ema`` or ``ema:HALF_LIFE``; None: ``ema`` if an average is kept, else ``raw``.
        device: the device to put the method on.
        method: a method to load the weights into, for a checkpoint without a configuration, of a run in Python;
            None: it is built from the checkpoint's configuration.

    Raises:
        UserError: if the file or the weights asked for cannot be used.
    """
    path, checkpoint = open_checkpoint(path)
    method = build_method(checkpoint_config(checkpoint, path)["model"]) if method is None else method
    require_fitting_weights(method, checkpoint["state_dict"], path)
    method.load_state_dict(checkpoint["state_dict"])
    state = checkpoint[CHECKPOINT_KEY]
    if state["data_spec"] is not None:
        method.data_spec = DataSpec.from_plain(state["data_spec"])
        method.require_fitting_classes()
    method.clock.images, method.clock.steps = state["images_seen"], state["steps"]
    method.run_config = state["config"]
    ema = checkpoint.get("callbacks", {}).get("EMA")
    half_lives = list(ema["half_lives"]) if ema else []
    weights = weights or ("ema" if half_lives else "raw")
    choose_average(half_lives, weights)
    load_average(method, ema, weights)
    return method.to(device).eval()
