"""``sample``: images from a checkpoint alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lit_diffusion.commands.options import (
    add_model_options,
    choose_sampler,
    load_model,
    parse,
    require_positive,
    require_writable,
    sampler_help,
)
from lit_diffusion.data.facts import DataFacts
from lit_diffusion.errors import UserError
from lit_diffusion.files import atomic_write
from lit_diffusion.images import about_shown, image_grid, save_png, to_uint8
from lit_diffusion.parser import Parser
from lit_diffusion.sampling import generate_in_batches


def _parser() -> Parser:
    parser = Parser(
        prog="python -m lit_diffusion sample",
        description="Images from a checkpoint alone. Sample i depends on (seed, i, its label) and nothing else.",
    )
    add_model_options(parser)
    parser.add_argument("--num_samples", type=int, required=True, help="How many.")
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        help="NAME.npz: key arr_0, uint8 [N, H, W, C] (points: float32 [N, D]); NAME.png: one grid; else a folder, one "
        "PNG each, of grey or RGB images.",
    )
    parser.add_argument("--batch_size", type=int, default=250, help="Samples at a time; changes memory and speed only.")
    parser.add_argument(
        "--label", type=int | None, default=None, help="Class of all samples; default: all classes in turn."
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    asked = parse(_parser(), arguments, sampler_help())
    if asked is None:
        return
    options, name, keys = asked
    require_positive(options, "num_samples", "batch_size")
    out = Path(options.out)
    method = load_model(options)
    facts = method.require_facts()
    require_fitting(out, facts)
    require_writable(out)
    sampler = choose_sampler(method.sampler, name, keys)
    batches = generate_in_batches(
        method, torch.arange(options.num_samples), options.seed, options.batch_size, sampler, options.label
    )
    if facts.is_image:
        write_images(np.concatenate([to_uint8(x, facts) for _, x in batches]), out)
    else:
        write_points(torch.cat([x for _, x in batches]).numpy(), out, facts)
    sys.stdout.write(f"wrote {options.num_samples} samples to {out} ({sampler.evaluations} network evaluations each)\n")
    if caveat := sampler.caveat():
        sys.stdout.write(f"note: {caveat}\n")
    if facts.is_image and out.suffix == ".png" and (shown := about_shown(facts.shape[0])):
        sys.stdout.write(f"note: {shown}\n")


def require_fitting(out: Path, facts: DataFacts) -> None:
    """Refuse a folder of PNG files for samples that none would hold.

    Raises:
        UserError: for points, and for images of other than 1 or 3 channels.
    """
    if out.suffix in (".npz", ".png") or (facts.is_image and facts.shape[0] in (1, 3)):
        return
    what = f"images of {facts.shape[0]} channels" if facts.is_image else "points"
    raise UserError(f"--out {out}: {what} go into a .npz or a .png, not into a folder of images")


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
    """float32 ``[N, D]`` as an archive, or a scatter plot of the first two coordinates."""
    if out.suffix == ".npz":
        with atomic_write(out) as file:
            np.savez_compressed(file, arr_0=points)
    else:
        from lit_diffusion.figures import scatter

        scatter(points, out, title=f"{len(points)} samples of {facts.source}")
