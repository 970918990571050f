"""Options shared by the commands that sample from a checkpoint: the model, the device and the sampler."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence

import torch
from jsonargparse import Namespace

from lit_diffusion.checkpoints import load
from lit_diffusion.config.parser import Parser, users_own_errors
from lit_diffusion.errors import UserError, nearest
from lit_diffusion.methods.base import Method
from lit_diffusion.samplers import SAMPLERS, Sampler
from lit_diffusion.samplers.base import described
from lit_diffusion.training import threads
from lit_diffusion.training.precision import PrecisionName, autocast_dtype


def add_model_options(parser: Parser) -> None:
    """Add the options of the checkpoint, its weights and the device that they run on."""
    parser.add_argument(
        "--ckpt_path", type=str, required=True, help="Checkpoint, or a run's directory, whose newest is taken."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples.")
    parser.add_argument(
        "--weights", type=str | None, default=None, help="raw, ema or ema:HALF_LIFE; default: ema if kept, else raw."
    )
    parser.add_argument("--precision", type=PrecisionName, default="32-true", help="Precision of the backbone.")
    parser.add_argument("--compile", type=bool, default=False, help="Compile the backbone first; for many samples.")
    parser.add_argument("--cuda_graphs", type=bool, default=False, help="Record the backbone and replay it; CUDA only.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add_threads_option(parser)


def add_threads_option(parser: Parser) -> None:
    """Add the option of the number of CPU threads, for :func:`use_threads`."""
    parser.add_argument(
        "--threads", type=int | None, default=None, help="Number of CPU threads; default: from this machine's cores."
    )


def use_threads(options: Namespace) -> None:
    """Set the number of threads that ``--threads`` gives.

    Raises:
        UserError: if it is not positive.
    """
    threads.use(threads.suggested() if options.threads is None else options.threads, "--threads")


def choose_device(given: str) -> torch.device:
    """The device of ``--device``; ``auto``: a GPU where there is one.

    Raises:
        UserError: if it cannot be used.
    """
    name = given if given != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def load_model(options: Namespace) -> Method:
    """Load the method that the options of :func:`add_model_options` name, on its device.

    Raises:
        UserError: for a checkpoint, weights, a device or a number of threads that cannot be used.
    """
    use_threads(options)
    method = load(options.ckpt_path, options.weights, choose_device(options.device))
    if options.cuda_graphs and method.device.type != "cuda":
        raise UserError(f"--cuda_graphs needs a CUDA device, and the model is on {method.device}; leave it out")
    for network in method.networks():
        network.run_as(
            autocast_dtype(options.precision),
            compiled=options.compile,
            rows=getattr(options, "batch_size", None),
            cuda_graphs=options.cuda_graphs,
        )
    return method


def parse(
    parser: Parser, arguments: Sequence[str], about_samplers: str
) -> tuple[Namespace, str | None, dict[str, str]] | None:
    """Parse a command line with a sampler in it; None where it asked for help, which was printed.

    Args:
        parser: parser of the other options.
        arguments: the whole command line.
        about_samplers: text added to the help.

    Returns:
        The options, the sampler's name or None, and its keys, for :func:`choose_sampler`.
    """
    others, name, keys = split_sampler_arguments(arguments)
    if any(argument in ("-h", "--help") for argument in others):
        parser.print_help()
        print(about_samplers)  # noqa: T201 (this is its output)
        return None
    return parser.parse_args(others), name, keys


def sampler_help() -> str:
    """Text for ``--help`` on the samplers and their keys."""
    lines = ["", "samplers (--sampler NAME, or a class path; --sampler.KEY VALUE; default: the method's own):"]
    for name, sampler in SAMPLERS.items():
        defaults = {key: p.default for key, p in inspect.signature(sampler).parameters.items()}
        keys = ", ".join(f"{key}={'null' if value is None else value}" for key, value in defaults.items())
        lines.append(f"  {name}: {keys}")
    return "\n".join(lines)


def split_sampler_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None, dict[str, str]]:
    """Separate ``--sampler NAME`` and ``--sampler.KEY VALUE`` from a command line.

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
    """Instantiate the sampler that the command line asks for.

    Keys that are not given come from the method's sampler where the class is the same, else from the class's defaults.

    Raises:
        UserError: for an unknown name or key, or a value that does not fit.
    """
    own = described(default)
    class_path = own["class_path"] if name is None else _class_path(name)
    start = own if class_path == own["class_path"] else {"class_path": class_path}
    parser = Parser()
    parser.add_subclass_arguments(Sampler, "sampler")
    # A sampler inside a sampler may be given by its short name, too.
    given = {key: _class_path(value) if value in SAMPLERS else value for key, value in keys.items()}
    config = parser.parse_args([f"--sampler={json.dumps(start)}", *(f"--sampler.{k}={v}" for k, v in given.items())])
    with users_own_errors():
        chosen = parser.instantiate(config).sampler
    assert isinstance(chosen, Sampler)
    return chosen


def _class_path(name: str) -> str:
    if name in SAMPLERS:
        return f"{SAMPLERS[name].__module__}.{SAMPLERS[name].__qualname__}"
    if "." in name:
        return name
    near = nearest(name, SAMPLERS)
    guess = f"; did you mean {near!r}? Choose" if near else "; choose"
    raise UserError(f"there is no sampler {name!r}{guess} one of {', '.join(SAMPLERS)}, or give a class path")
