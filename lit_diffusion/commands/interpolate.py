"""``interpolate``: a picture of interpolations between samples, or real images, in the noise of the DDIM sampler."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_diffusion.checkpoints import build_datamodule
from lit_diffusion.commands.options import add_model_options, choose_sampler, load_model, parse
from lit_diffusion.commands.outputs import RULE, output_path
from lit_diffusion.conditions import Condition
from lit_diffusion.config.parser import Parser
from lit_diffusion.errors import UserError, require_positive
from lit_diffusion.evaluation.interpolation import interpolate
from lit_diffusion.images import about_shown, image_grid, save_png, to_uint8
from lit_diffusion.methods.base import Method
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers import DDIM


def _parser() -> Parser:
    parser = Parser(
        prog="python -m lit_diffusion interpolate",
        description="A picture of interpolations between pairs of samples, or of held-out images, by the DDIM sampler.",
    )
    add_model_options(parser)
    parser.add_argument("--out", type=str, required=True, help=f"NAME.png, a row for each pair. {RULE}")
    parser.add_argument(
        "--between",
        type=Literal["samples", "images"],
        default="samples",
        help="samples: between two draws of noise; images: between held-out images of the run's data, encoded to noise "
        "first and shown at both ends of their row.",
    )
    parser.add_argument(
        "--label",
        type=str | None,
        default=None,
        help="Class of all samples, or of the held-out images taken, by name or number. Default: row i of samples has "
        "the i-th class of the data; an image has its own, and a point between two images the nearer one's.",
    )
    parser.add_argument("--pairs", type=int, default=8, help="Number of rows of the picture.")
    parser.add_argument("--columns", type=int, default=11, help="Number of points in a row, both ends included.")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``interpolate``."""
    asked = parse(_parser(), arguments, "\nThe sampler is DDIM, by default in 50 steps: --sampler.steps 200")
    if asked is None:
        return
    options, name, keys = asked
    require_positive(options, "pairs", "columns")
    if options.columns < 2:
        raise UserError("--columns is 1; a row has two ends, so give at least 2")
    out = output_path(options.out, (".png",))
    method = load_model(options)
    data_spec = method.require_data_spec()
    if not data_spec.is_image:
        raise UserError("interpolate draws images; this model was trained on points")
    default = method.sampler if isinstance(method.sampler, DDIM) else DDIM()
    sampler = choose_sampler(default, name, keys)
    if not isinstance(sampler, DDIM) or sampler.eta != 0.0:
        raise UserError("interpolation needs the deterministic sampler: --sampler ddim with eta 0")
    sampler.check(method.denoiser)
    pairs = options.pairs
    cond = method.condition(torch.arange(pairs), options.label)
    if options.between == "samples":
        noise = SampleNoise(options.seed, torch.arange(2 * pairs, device=method.device), method.sample_shape)
        both = sampler.start(method.denoiser.process, noise)
        found = interpolate(method, both[:pairs], both[pairs:], options.columns, sampler, cond)
        made = found.x
    else:
        x, labels = _held_out(method, 2 * pairs, options.label)
        parts = slice(0, pairs), slice(pairs, 2 * pairs)
        conds = [None if labels is None else Condition(label=labels[part]) for part in parts]
        noise = SampleNoise(options.seed, torch.arange(2 * pairs, device=method.device), tuple(x.shape[1:]))
        z = method.encode(x, noise.stream("encode")).z
        first, second = (
            sampler.encode(method.denoiser, z[part], of_part).x for part, of_part in zip(parts, conds, strict=True)
        )
        found = interpolate(method, first, second, options.columns, sampler, *conds)
        made = found.x
        error = (torch.cat((made[:, 0], made[:, -1])) - x).square().mean().sqrt()
        made = torch.cat((x[:pairs, None], made, x[pairs:, None]), dim=1)
        sys.stdout.write(
            f"encoded and decoded images differ from themselves by {float(error):.4g} (root mean square)\n"
        )
    if not torch.isfinite(made).all():
        raise UserError("the sampler diverged (NaN or infinity): use other weights")
    save_png(image_grid(to_uint8(made.flatten(0, 1), data_spec), made.shape[1]), out)
    sys.stdout.write(f"wrote {pairs} rows of {made.shape[1]} images to {out} ({found.evaluations} evaluations each)\n")
    if shown := about_shown(data_spec.shape[0]):
        sys.stdout.write(f"note: {shown}\n")


def _held_out(method: Method, count: int, label: str | None) -> tuple[Tensor, Tensor | None]:
    """The first held-out images of the run's data, or of one class, on the method's device.

    Returns:
        Normalized ``[count, ...]``, and their classes ``[count]`` where the model is conditioned on them.

        Raises:
            UserError: if the run has no data section, or too few held-out images.
    """
    config = method.run_config or {}
    if "data" not in config:
        raise UserError(
            "--between images: the checkpoint does not name its data, which came from a DataLoader; leave it out"
        )
    data = build_datamodule(config["data"])
    chosen, labels = torch.arange(len(data.held_out_indices)), None
    if method.num_classes is not None:
        method.require_fitting_classes(data)
        data.data_spec.require_classes_of(method.require_data_spec(), "the model")
        assert data.held_out_labels is not None
        labels = torch.from_numpy(data.held_out_labels)[data.held_out_indices]
        if label is not None:
            chosen = chosen[labels == method.class_number(label)]
    if len(chosen) < count:
        of_class = "" if label is None else f" of the class {label}"
        raise UserError(
            f"the run's data have {len(chosen)} held-out images{of_class}, {count} are needed; give fewer --pairs"
        )
    chosen = chosen[:count]
    return data.held_out_values(chosen).to(method.device), None if labels is None else labels[chosen].to(method.device)
