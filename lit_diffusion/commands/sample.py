"""``sample``: images from a checkpoint alone."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.commands.options import add_model_options, choose_sampler, load_model, parse, sampler_help
from lit_diffusion.commands.outputs import RULE, is_folder, output_path, require_free_for_a_set
from lit_diffusion.config.parser import Parser
from lit_diffusion.data.dataset_json import DATASET_JSON, labels_text
from lit_diffusion.data.npz import label_arrays
from lit_diffusion.data_spec import DataSpec
from lit_diffusion.errors import UserError, require_positive
from lit_diffusion.evaluation.sampling import generate_in_batches
from lit_diffusion.files import atomic_write, write_set
from lit_diffusion.images import about_shown, image_grid, png_bytes, save_png, to_uint8
from lit_diffusion.runs.console import print_note
from lit_diffusion.samplers.base import describe

ENDINGS = (".npz", ".png")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m lit_diffusion sample",
        description="Images from a checkpoint alone. Sample i depends on (seed, i, its label) and nothing else.",
    )
    add_model_options(parser)
    parser.add_argument("--num_samples", type=int, required=True, help="Number of samples.")
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        help="NAME.npz: key arr_0, uint8 [N, H, W, C] (points: float32 [N, D]); NAME.png: one grid; FOLDER/: a PNG of "
        "each grey or RGB image, and samples.json, which lists them and how they were made. "
        f"Classes are in the key labels, or in the folder's dataset.json. {RULE} A folder holds one set.",
    )
    parser.add_argument(
        "--overwrite",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="If true and --out is a folder that is not empty, replace what `sample` wrote there, and nothing else.",
    )
    parser.add_argument("--batch_size", type=int, default=250, help="Samples at a time; changes memory and speed only.")
    parser.add_argument(
        "--label",
        type=str | None,
        default=None,
        help="Class of all samples, by name or number. Default: classes as often as in the training data, so that the "
        "samples can be evaluated; in a grid all classes in turn.",
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``sample``."""
    asked = parse(_parser(), arguments, sampler_help())
    if asked is None:
        return
    options, name, keys = asked
    require_positive(options, "num_samples", "batch_size")
    out = output_path(options.out, ENDINGS, folder=True)
    if is_folder(out, ENDINGS):
        require_free_for_a_set(out, options.overwrite)
    method = load_model(options)
    data_spec = method.require_data_spec()
    require_fitting(out, data_spec)
    indices = torch.arange(options.num_samples)
    counts = None if data_spec.is_image and out.suffix.lower() == ".png" else data_spec.class_counts
    cond = method.condition_by_counts(indices, options.seed, counts, options.label)
    labels = None if cond is None else cond.label
    sampler = choose_sampler(method.sampler, name, keys)
    evaluations = 0

    def drawn() -> Iterator[Tensor]:
        nonlocal evaluations
        for batch in generate_in_batches(
            method,
            indices,
            options.seed,
            options.batch_size,
            sampler,
            options.label,
            class_counts=counts,
            say=print_note,
        ):
            evaluations = max(evaluations, batch.evaluations)
            yield batch.x

    if data_spec.is_image:
        images = np.concatenate([to_uint8(x, data_spec) for x in drawn()])
        about = {
            **{key: options[key] for key in ("ckpt_path", "weights", "seed", "label")},
            "images_seen": method.clock.images,
            "sampler": describe(sampler, method.denoiser),
            "count": options.num_samples,
        }
        write_images(images, out, about, labels, data_spec.class_names)
    else:
        write_points(torch.cat(list(drawn())).numpy(), out, data_spec, labels)
    sys.stdout.write(f"wrote {options.num_samples} samples to {out} ({evaluations} network evaluations each)\n")
    if labels is not None:
        described = "all classes in turn" if counts is None else "as often as in the training data"
        if options.label is not None:
            number = int(labels[0])
            described = f"all {number}" + (f" ({data_spec.class_names[number]})" if data_spec.class_names else "")
        sys.stdout.write(f"labels: {described}\n")
    if data_spec.is_image and out.suffix.lower() == ".png" and (shown := about_shown(data_spec.shape[0])):
        sys.stdout.write(f"note: {shown}\n")


def require_fitting(out: Path, data_spec: DataSpec) -> None:
    """Refuse a folder of PNG files for samples that are no PNG.

    Raises:
        UserError: for points, and for images of other than 1 or 3 channels.
    """
    if not is_folder(out, ENDINGS) or (data_spec.is_image and data_spec.shape[0] in (1, 3)):
        return
    what = f"images of {data_spec.shape[0]} channels" if data_spec.is_image else "points"
    raise UserError(f"--out {out}: {what} go into a .npz or a .png, not into a folder of images")


def write_images(
    images: np.ndarray,
    out: Path,
    about: Mapping[str, Any],
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write images as an archive, a grid or a folder, by the ending of ``out``.

    Args:
        images: uint8 ``[N, H, W, C]``.
        out: the file or folder.
        about: how they were made, for a folder's list.
        labels: their classes ``[N]``.
        class_names: names of the classes.
    """
    if out.suffix.lower() == ".npz":
        with atomic_write(out) as file:
            np.savez_compressed(file, allow_pickle=False, arr_0=images, **label_arrays(labels, class_names))
    elif out.suffix.lower() == ".png":
        save_png(image_grid(images), out)
    else:
        names = [f"{number:06d}.png" for number in range(len(images))]
        files: Iterable[tuple[str, bytes]] = (
            (name, png_bytes(image)) for name, image in zip(names, images, strict=True)
        )
        if labels is not None:
            files = itertools.chain(files, [(DATASET_JSON, labels_text(names, labels.tolist(), class_names))])
        write_set(out, files, about)


def write_points(points: np.ndarray, out: Path, data_spec: DataSpec, labels: Tensor | None = None) -> None:
    """Write float32 ``[N, D]`` as an archive, or as a scatter plot of the first two coordinates, by the ending."""
    if out.suffix.lower() == ".npz":
        with atomic_write(out) as file:
            np.savez_compressed(file, allow_pickle=False, arr_0=points, **label_arrays(labels, data_spec.class_names))
    else:
        from lit_diffusion.plots.figures import scatter

        scatter(points, out, title=f"{len(points)} samples of {data_spec.source}")
