"""``evaluate``: metrics of any images, of this project's models or others'."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

import lit_diffusion.data
from lit_diffusion.commands.options import add_threads_option, choose_device, use_threads
from lit_diffusion.commands.outputs import RULE, output_path
from lit_diffusion.config.parser import Parser, users_own_errors
from lit_diffusion.data.as_given import classes_as_given, images_as_given
from lit_diffusion.data.source import Source
from lit_diffusion.errors import UserError, meant, require_choice, require_positive
from lit_diffusion.evaluation import Evaluation, RealSets
from lit_diffusion.evaluation.measure import Batch
from lit_diffusion.files import atomic_write
from lit_diffusion.metrics.base import ScoreOptions
from lit_diffusion.metrics.catalogue import CATALOGUE, default_metrics
from lit_diffusion.metrics.choice import Choice, left_out_line
from lit_diffusion.metrics.extractors import (
    CLIP,
    Extractor,
    default_extractor,
    load_extractor,
)
from lit_diffusion.metrics.reference import RealData, Reference, reference_of_moments
from lit_diffusion.metrics.scores import Result
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.formats import FORMAT_VERSION

DARK = 32
"""Images whose values all lie below an eighth of the range get a note: probably another scale, not night."""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m lit_diffusion evaluate",
        description="Metrics of images against real ones, FID and related metrics, each with its protocol. Images are "
        ".npz (arr_0, uint8 [N, H, W, C]; points: float [N, D]), a folder or a zip file; only the extractor crops or "
        "resizes them.",
    )
    parser.add_argument("--samples", type=str, required=True, help="Images to evaluate.")
    parser.add_argument(
        "--reference",
        type=str,
        required=True,
        help="Real images as above, an .npz with mu and sigma (for fid alone), or a data source by its name, "
        "e.g. CIFAR10.",
    )
    parser.add_argument(
        "--metrics",
        type=str | None,
        default=None,
        help=f"Metrics, with commas: {','.join(CATALOGUE)}. Default: those of {','.join(default_metrics())} that fit. "
        "In features that are not Inception's, the Frechet distance is named fd/..., the kernel distance kd/....",
    )
    parser.add_argument(
        "--extractor",
        type=Literal["auto", "inception", "dinov2", "clip", "vgg16", "digits", "points"],
        default="auto",
        help="Feature extractor; auto: digits for 8 x 8 grey images, points for points, else inception.",
    )
    parser.add_argument(
        "--weights_path", type=str | None, default=None, help="File of its weights; default: the fetched one."
    )
    parser.add_argument(
        "--captions", type=str | None, default=None, help="Text file for clip_score: a line for each image, in order."
    )
    parser.add_argument(
        "--clip_weights_path", type=str | None, default=None, help="File of CLIP's weights; default: the fetched one."
    )
    parser.add_argument("--batch_size", type=int, default=250, help="Images at a time.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add_threads_option(parser)
    parser.add_argument(
        "--out", type=str | None, default=None, help=f"NAME.json for values, errors, intervals and protocol. {RULE}"
    )
    parser.add_class_arguments(ScoreOptions)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``evaluate``."""
    parser = _parser()
    options = parser.parse_args(list(arguments))
    require_positive(options, "batch_size")
    with users_own_errors():
        score_options = ScoreOptions(**{key: options[key] for key in ScoreOptions.__dataclass_fields__})
    out = None if options.out is None else output_path(options.out, (".json",))
    use_threads(options)
    device = choose_device(options.device)
    source = images_as_given(options.samples)
    _say_notes(source)
    samples = RealData.of(source, torch.arange(len(source)), "all")
    wanted = None if options.metrics is None else _metrics(options.metrics)
    captions = None if options.captions is None else _captions(Path(options.captions), samples.count)
    if ("clip_score" in (wanted or ())) != (captions is not None):
        raise UserError("clip_score needs --captions, and --captions are for it: give both, or neither")
    name = default_extractor(samples.shape) if options.extractor == "auto" else options.extractor
    extractor = load_extractor(name, samples.shape, options.weights_path).to(device)
    clip = None
    if wanted is not None and "clip_score" in wanted and not isinstance(extractor, CLIP):
        clip = CLIP(options.clip_weights_path)
        clip.to(device)
    reference, real_classes = _reference(options.reference, samples.shape, extractor)
    evaluation = Evaluation(
        RealSets(reference, samples.shape), extractor, wanted, score_options, clip=clip, say=print_note
    )
    choice = evaluation.choose(samples.count, has_captions=captions is not None)
    brightest = 0

    def batches() -> Iterator[Batch]:
        nonlocal brightest
        for part in tqdm(torch.arange(samples.count).split(options.batch_size), desc="samples", unit=" batches"):
            words = None if captions is None else [captions[i] for i in part.tolist()]
            images = samples.values(part)
            brightest = max(brightest, int(images.max()))
            yield part, images, words

    result = evaluation.of_batches(
        batches(), samples.count, device, has_captions=captions is not None, show_progress=True
    )
    result.protocol.update(
        samples=str(options.samples), samples_fingerprint=samples.record["fingerprint"], stage="evaluate"
    )
    if "memorisation" in choice.metrics:
        result.protocol["memorisation_split"] = "the reference as given, whatever the model was trained on"
    caveat = _caveat(samples, brightest, reference.record)
    if caveat := caveat or other_shares(classes_as_given(options.samples, source), real_classes):
        result.protocol["caveat"] = caveat
    _print(result, choice, samples.count)
    if out is not None:
        with atomic_write(out) as file:
            file.write((json.dumps(as_plain(result), indent=1) + "\n").encode())
        sys.stdout.write(f"wrote {out}\n")


def _caveat(samples: RealData, brightest: int, reference: dict[str, Any]) -> str | None:
    """A reason why all the metrics mean less than they seem, None where there is none."""
    if samples.record["fingerprint"] == reference.get("fingerprint"):
        return "the samples are the reference itself, so these values say nothing about a model"
    if 0 < brightest < DARK:
        return (
            f"the brightest value of the samples is {brightest} of 255: if they are grey levels 0 .. {brightest}, "
            f"scale them to 0 .. 255 first"
        )
    return None


def as_plain(result: Result) -> dict[str, Any]:
    """Convert a result to plain types for JSON."""
    return {
        "format_version": FORMAT_VERSION,
        "values": result.values,
        "errors": result.errors,
        "intervals": {key: list(interval) for key, interval in result.intervals.items()},
        "left_out": result.left_out,
        "protocol": result.protocol,
    }


def _metrics(given: str) -> list[str]:
    names = [name.strip() for name in given.strip("[]").split(",") if name.strip()]
    for name in names:
        require_choice("", "--metrics", name, CATALOGUE)
    if not names:
        raise UserError("--metrics is empty; name one, e.g. --metrics fid,precision,recall")
    return names


def _captions(path: Path, count: int) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the captions {path}: {error}") from error
    if len(lines) != count:
        raise UserError(f"{path} has {len(lines)} lines for {count} images; give one caption a line, one for each")
    return lines


OTHER_SHARES = 0.05
"""Part of the samples that may be of other classes than the reference's without a note."""


def other_shares(samples: Sequence[str] | None, real: Sequence[str] | None) -> str | None:
    """A note where the classes have other frequencies among the samples than among the real data, None otherwise.

    The total variation distance ``1/2 sum_k |p_k - q_k|`` of the frequencies, the part of the samples that would have
    to be of other classes, is compared with what chance gives: below ``sqrt(K / n)`` for K classes and n of the fewer
    data. Names on one side and numbers on the other are not compared.
    """
    if samples is None or real is None:
        return None
    if all(map(str.isdecimal, samples)) != all(map(str.isdecimal, real)):  # Numbers here, names there.
        return None
    mine, theirs = Counter(samples), Counter(real)
    gaps = {name: mine[name] / len(samples) - theirs[name] / len(real) for name in mine | theirs}
    part = 0.5 * sum(abs(gap) for gap in gaps.values())
    if part < max(OTHER_SHARES, math.sqrt(len(gaps) / min(len(samples), len(real)))):
        return None
    name = max(gaps, key=lambda name: abs(gaps[name]))
    return (
        f"the classes are not as often as in the reference ({name}: {mine[name] / len(samples):.1%} of the samples, "
        f"{theirs[name] / len(real):.1%} there), and the metrics compare that, too"
    )


def _reference(
    given: str, shape: tuple[int, ...], extractor: Extractor
) -> tuple[RealData | Reference, list[str] | None]:
    """The reference by its path or its source's name, and the classes of its images, where they are known.

    Raises:
        UserError: if there is no such file, folder or source, or its images are of another size.
    """
    path = Path(given).expanduser()
    if path.suffix.lower() == ".npz" and path.is_file() and _has_moments_only(path):
        return reference_of_moments(path, extractor.dimension), None
    source = images_as_given(path) if path.exists() or path.suffix.lower() in (".npz", ".zip") else _source(given)
    if (source.num_grey_levels is None) != (len(shape) == 1):
        raise UserError(
            f"--reference {given} holds points; evaluate compares images"
            if source.num_grey_levels is None
            else f"--reference {given} holds images, the samples are points: give points, e.g. GaussianMixturePoints"
        )
    if len(shape) == 1 and tuple(source.shape) != shape:
        raise UserError(f"the samples have {shape[0]} dimensions, the reference has {source.shape[0]}")
    if tuple(source.shape[1:]) != tuple(shape[1:]):
        raise UserError(
            f"the samples are {shape[1]} x {shape[2]}, the reference is {source.shape[1]} x {source.shape[2]}: resize "
            f"both to one size; the way of resizing is part of the protocol, so it is not done here"
        )
    extractor.require_fit(tuple(source.shape))
    _say_notes(source)
    return RealData.of(source, torch.arange(len(source)), "all"), classes_as_given(path, source)


def _say_notes(source: Source) -> None:
    for line in source.notes():
        print_note(line)


def _has_moments_only(path: Path) -> bool:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {"mu", "sigma"} <= set(archive.files) and "arr_0" not in archive.files
    except Exception:  # Whatever reads it next refuses what is no archive.
        return False


def _source(name: str) -> Source:
    classes = {key: getattr(lit_diffusion.data, key) for key in lit_diffusion.data.__all__}
    known = {key: found for key, found in classes.items() if isinstance(found, type) and issubclass(found, Source)}
    if name not in known:
        raise UserError(
            f"--reference {name}: there is no such file, folder or data source; give images, or one of "
            f"{', '.join(sorted(known))}{meant(name, known)}"
        )
    try:
        found = known[name]()
    except TypeError as error:
        raise UserError(f"--reference {name} needs arguments ({error}); give its images as a folder or file") from error
    assert isinstance(found, Source)
    return found


def _print(result: Result, choice: Choice, count: int) -> None:
    protocol = result.protocol
    sys.stdout.write(
        f"{count} samples against {protocol['n_real'] or 'the moments'} of {protocol['reference_source']}, "
        f"{protocol['extractor']}\n"
    )
    for name, value in result.values.items():
        line = f"  {name:<28} {value:.6g}"
        if name in result.errors:
            line += f"  +- {result.errors[name]:.2g}"
        if name in result.intervals:
            line += "  [{:.6g}, {:.6g}]".format(*result.intervals[name])
        sys.stdout.write(line + "\n")
    if result.left_out:
        sys.stdout.write(f"  left out: {left_out_line(result.left_out)}\n")
    if "caveat" in protocol:
        sys.stdout.write(f"  note: {protocol['caveat']}\n")
    if result.flagged:
        sys.stdout.write("  note: many samples are copies of reference images (near_copies)\n")
    for caveat in choice.caveats:
        sys.stdout.write(f"  note: {caveat}\n")
