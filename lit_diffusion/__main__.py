"""``python -m lit_diffusion``: one command, its arguments, and one line for every mistake."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence

from lit_diffusion import __version__, interrupts
from lit_diffusion.errors import UserError, nearest

COMMANDS = {
    "fit": "train a method: fit --config experiments/ncsn.yaml",
    "validate": "the loss on held-out data: validate --ckpt_path RUN",
    "test": "FID and its kin of many samples, bits per dimension of held-out data: test --ckpt_path RUN",
    "predict": "samples through the Trainer, on all its processes, into the run's directory: predict --ckpt_path RUN",
    "sample": "images from a checkpoint: sample --ckpt_path RUN --num_samples N --out samples.npz",
    "interpolate": "a picture of what lies between samples: interpolate --ckpt_path RUN --out picture.png",
    "gallery": "a page to judge images by eye, side by side and blind: gallery RUN_OR_SAMPLES ... --out gallery.html",
    "report": "a run's curves, pictures and results as one web page, without an account: report RUN",
    "evaluate": "FID and its kin of anybody's images: evaluate --samples FILE_OR_FOLDER --reference FILE_OR_FOLDER",
    "doctor": "what is wrong with this machine or a recipe, before hours are spent on it: doctor --config FILE",
    "wandb-sync": "a finished or interrupted run as one Weights & Biases run, from its metrics.jsonl: wandb-sync RUN",
    "fetch": "download data or weights, the only command that does: fetch data NAME",
}

"""Commands and their lines in the help; each is the file of its name in commands/, or one of LightningCLI's."""

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def usage() -> str:
    """The top-level help."""
    width = max(map(len, COMMANDS))
    lines = [
        f"lit_diffusion {__version__}: score-based and diffusion generative models",
        "",
        "usage: python -m lit_diffusion COMMAND [arguments]",
        "",
        "commands:",
        *(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()),
        "",
        "python -m lit_diffusion COMMAND --help shows a command's arguments.",
    ]
    return "\n".join(lines)


def wait_passively() -> None:
    """Let the threads of OpenMP sleep while they wait for each other, unless the user says how they wait.

    By themselves they spin for milliseconds. On cores that another program uses too they so take the time in which the
    thread that they wait for could work; benchmarks/RESULTS.md has how much.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        # Read when torch is loaded: the first by GNU's library, the second by LLVM's and Intel's.
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0")


def dispatch(arguments: Sequence[str]) -> None:
    """Run a command.

    Raises:
        UserError: for whatever the user can mend.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())  # noqa: T201 (this is its output)
        return
    if arguments[0] in ("--version", "-V"):
        print(__version__)  # noqa: T201
        return
    command, *rest = arguments
    if command not in COMMANDS:
        near = nearest(command, COMMANDS)
        hint = f"did you mean {near!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {command!r}; {hint}")
    wait_passively()
    # Each command imports what it needs only once it is asked for.
    if command in LIGHTNING_COMMANDS:
        importlib.import_module("lit_diffusion.cli.lightning_cli").main([command, *rest])
    else:
        importlib.import_module(f"lit_diffusion.commands.{command.replace('-', '_')}").main(rest)


def as_one_line(error: UserError) -> str:
    """An error's message; one that crossed from a data worker brings torch's traceback, whose last line it is."""
    message = str(error)
    if "Original Traceback" in message:
        message = re.sub(r"^[\w.]+: ", "", message.strip().splitlines()[-1])
    return " ".join(message.split())


def main() -> int:
    """The console's entry point.

    Returns:
        0; 2 with one line for a mistake that the user can mend; 75 with one line for a training that was asked to stop
        by SIGTERM, SIGUSR1 or Ctrl-C and has saved its state.
    """
    if sys.argv[1:2] == ["fit"]:
        interrupts.listen()  # Before anything slow is imported: a signal is not lost while a run starts.
    try:
        dispatch(sys.argv[1:])
    except interrupts.Interrupted as stop:
        if not stop.quiet:
            sys.stderr.write(f"lit_diffusion: {as_one_line(stop)}\n")
        return stop.exit_code
    except UserError as error:
        sys.stderr.write(f"lit_diffusion: error: {as_one_line(error)}\n")
        return 2
    except PermissionError as error:  # Of a path that may not even be looked at, wherever it was given.
        sys.stderr.write(f"lit_diffusion: error: {error.filename}: {error.strerror}; give another place\n")
        return 2
    finally:
        interrupts.forget()
    return 0


if __name__ == "__main__":
    sys.exit(main())
