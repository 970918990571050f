"""``sample``: images from a checkpoint alone."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_diffusion.checkpoints import load
from lit_diffusion.data.facts import DataFacts
from lit_diffusion.errors import UserError
from lit_diffusion.files import atomic_write
from lit_diffusion.images import image_grid, save_png, to_uint8
from lit_diffusion.parser import Parser, users_own_errors
from lit_diffusion.precision import PrecisionName, autocast_dtype
from lit_diffusion.samplers import SAMPLERS, Sampler
from lit_diffusion.sampling import generate_in_batches


def _parser() -> Parser:
    parser = Parser(
        prog="python -m lit_diffusion sample",
        description="Images from a checkpoint alone. Sample i depends on (seed, i, its label) and nothing else.",
    )
    parser.add_argument(
        "--ckpt_path", type=str, required=True, help="Checkpoint, e.g. <run_dir>/checkpoints/last.ckpt."
    )
    parser.add_argument("--num_samples", type=int, required=True, help="How many.")
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        help="NAME.npz: key arr_0, uint8 [N, H, W, C] (points: float32 [N, D]); NAME.png: one grid; else a folder, one "
        "PNG each.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the samples.")
    parser.add_argument("--batch_size", type=int, default=250, help="Samples at a time; changes memory and speed only.")
    parser.add_argument(
        "--label", type=int | None, default=None, help="Class of all samples; default: all classes in turn."
    )
    parser.add_argument(
        "--weights", type=str | None, default=None, help="raw, ema or ema:HALF_LIFE; default: ema where it is kept."
    )
    parser.add_argument("--precision", type=PrecisionName, default="32-true", help="Of the backbone.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def _sampler_help() -> str:
    lines = ["", "samplers (--sampler NAME, or a class path; --sampler.KEY VALUE; default: the method's own):"]
    for name, sampler in SAMPLERS.items():
        defaults = {key: p.default for key, p in inspect.signature(sampler).parameters.items()}
        keys = ", ".join(f"{key}={'null' if value is None else value}" for key, value in defaults.items())
        lines.append(f"  {name}: {keys}")
    return "\n".join(lines)


def split_sampler_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None, dict[str, str]]:
    """Take ``--sampler NAME`` and ``--sampler.KEY VALUE`` out of a command line.

    Returns:
        The other arguments, the name or None, and the keys with their values as typed.

    Raises:
        UserError: if one of them has no value.
    """
    others: list[str] = []
    name: str | None = None
    keys: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option != "--sampler" and not option.startswith("--sampler."):
            others.append(argument)
            continue
        if not equals:
            value = next(rest, "")
        if not value or (not equals and value.startswith("--")):
            raise UserError(f"{option} needs a value, e.g. --sampler langevin --sampler.steps 500")
        if option == "--sampler":
            name = value
        else:
            keys[option.removeprefix("--sampler.").replace("init_args.", "")] = value
    return others, name, keys


def choose_sampler(default: Sampler, name: str | None, keys: dict[str, str]) -> Sampler:
    """The sampler that the command line asks for.

    Keys that are not given are the method's own where the class is the method's, else the class's defaults.

    Raises:
        UserError: for an unknown name or key, or a value that does not fit.
    """
    own = described(default)
    class_path = own["class_path"] if name is None else _class_path(name)
    start = own if class_path == own["class_path"] else {"class_path": class_path}
    parser = Parser()
    parser.add_subclass_arguments(Sampler, "sampler")
    # A sampler inside a sampler may be named as briefly as the one around it.
    given = {key: _class_path(value) if value in SAMPLERS else value for key, value in keys.items()}
    config = parser.parse_args([f"--sampler={json.dumps(start)}", *(f"--sampler.{k}={v}" for k, v in given.items())])
    with users_own_errors():
        chosen = parser.instantiate(config).sampler
    assert isinstance(chosen, Sampler)
    return chosen


def described(sampler: Sampler) -> dict[str, Any]:
    """A sampler as its class path and arguments, which it keeps as attributes of the same names."""
    arguments = {key: getattr(sampler, key) for key in inspect.signature(type(sampler)).parameters}
    plain = {key: described(value) if isinstance(value, Sampler) else value for key, value in arguments.items()}
    return {"class_path": f"{type(sampler).__module__}.{type(sampler).__qualname__}", "init_args": plain}


def _class_path(name: str) -> str:
    if name in SAMPLERS:
        return f"{SAMPLERS[name].__module__}.{SAMPLERS[name].__qualname__}"
    if "." in name:
        return name
    raise UserError(f"there is no sampler {name!r}; choose one of {', '.join(SAMPLERS)}, or give a class path")


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    others, name, keys = split_sampler_arguments(arguments)
    parser = _parser()
    if any(argument in ("-h", "--help") for argument in others):
        parser.print_help()
        print(_sampler_help())  # noqa: T201 (this is its output)
        return
    options = parser.parse_args(others)
    for key in ("num_samples", "batch_size"):
        if options[key] < 1:
            raise UserError(f"--{key} is {options[key]}; give a positive number")
    out = Path(options.out)
    _require_writable(out)
    device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        method = load(options.ckpt_path, options.weights, device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    method.denoiser.autocast_dtype = autocast_dtype(options.precision)
    sampler = choose_sampler(method.sampler, name, keys)
    batches = generate_in_batches(
        method, options.num_samples, options.seed, options.batch_size, sampler, options.label, show_progress=True
    )
    facts = method.require_facts()
    if facts.is_image:
        assert facts.value_range is not None
        write_images(np.concatenate([to_uint8(x, facts.value_range) for x in batches]), out)
    else:
        write_points(torch.cat(list(batches)).numpy(), out, facts)
    sys.stdout.write(f"wrote {options.num_samples} samples to {out} ({sampler.evaluations} network evaluations each)\n")
    if caveat := sampler.caveat():
        sys.stdout.write(f"note: {caveat}\n")


def _require_writable(out: Path) -> None:
    """Find out before the work, not after it.

    Raises:
        UserError: if there is no folder to write to.
    """
    folder = out if out.suffix not in (".npz", ".png") else out.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".lit_diffusion_probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error


def write_images(images: np.ndarray, out: Path) -> None:
    """uint8 ``[N, H, W, C]`` as an archive, a grid or a folder, by the name's ending."""
    if out.suffix == ".npz":
        with atomic_write(out) as file:
            np.savez_compressed(file, arr_0=images)
    elif out.suffix == ".png":
        save_png(image_grid(images), out)
    else:
        for number, image in enumerate(images):
            save_png(image, out / f"{number:06d}.png")


def write_points(points: np.ndarray, out: Path, facts: DataFacts) -> None:
    """float32 ``[N, D]`` as an archive, or a scatter plot of the first two coordinates.

    Raises:
        UserError: for a folder: points are no pictures.
    """
    if out.suffix == ".npz":
        with atomic_write(out) as file:
            np.savez_compressed(file, arr_0=points)
    elif out.suffix == ".png":
        from lit_diffusion.figures import scatter

        scatter(points, out, title=f"{len(points)} samples of {facts.source}")
    else:
        raise UserError(f"--out {out}: points go into a .npz or a .png, not into a folder of images")
