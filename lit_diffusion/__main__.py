"""``python -m lit_diffusion``: dispatch of the commands, and one line for every mistake."""

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
    "validate": "measure the loss on held-out data: validate --ckpt_path RUN",
    "test": "measure FID and related metrics, and bits per dimension of held-out data: test --ckpt_path RUN",
    "predict": "sample through the Trainer, on all its processes, into the run's directory: predict --ckpt_path RUN",
    "sample": "sample images from a checkpoint: sample --ckpt_path RUN --num_samples N --out samples.npz",
    "interpolate": "draw interpolations between samples: interpolate --ckpt_path RUN --out picture.png",
    "gallery": "make a page to judge images by eye, side by side and blind: gallery RUN_OR_SAMPLES --out gallery.html",
    "report": "make one web page of a run's curves, pictures and results, without an account: report RUN",
    "evaluate": "measure FID and related metrics of any images: evaluate --samples FILE_OR_DIR --reference FILE_OR_DIR",
    "doctor": "find what is wrong with this machine or a recipe, before hours are spent on it: doctor --config FILE",
    "wandb-sync": "replay a run's metrics.jsonl as one Weights & Biases run: wandb-sync RUN",
    "fetch": "download data or weights, the only command that does: fetch data NAME",
}

"""Commands and their help; each is the file of its name in commands/, or one of LightningCLI's."""

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def usage() -> str:
    """Text of the top-level help."""
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
    """Let OpenMP's threads sleep while they wait for each other, unless the user has set how they wait.

    By default they spin for milliseconds. On cores shared with another program they thereby take the time in which the
    thread that they wait for could work; benchmarks/RESULTS.md has measurements.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        # Read when torch is loaded: the first by GNU's library, the second by LLVM's and Intel's.
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0")


def dispatch(arguments: Sequence[str]) -> None:
    """Run a command.

    Raises:
        UserError: for a mistake that the user can fix.
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
    # A command is imported only when it is run.
    if command in LIGHTNING_COMMANDS:
        importlib.import_module("lit_diffusion.cli.lightning_cli").main([command, *rest])
    else:
        importlib.import_module(f"lit_diffusion.commands.{command.replace('-', '_')}").main(rest)


def as_one_line(error: UserError) -> str:
    """An error's message in one line; of torch's traceback from a data worker, the last line."""
    message = str(error)
    if "Original Traceback" in message:
        message = re.sub(r"^[\w.]+: ", "", message.strip().splitlines()[-1])
    return " ".join(message.split())


def main() -> int:
    """Console entry point.

    Returns:
        Exit code: 0; 2, with one line, for a mistake that the user can fix; 75, with one line, for a training that was
        asked to stop by SIGTERM, SIGUSR1 or Ctrl-C and has saved its state.
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
    except BrokenPipeError:  # Whoever reads the output, such as head, has enough of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # For what Python flushes at its end.
        return 0
    except PermissionError as error:  # For a path that may not even be looked at.
        sys.stderr.write(f"lit_diffusion: error: {error.filename}: {error.strerror}; give another place\n")
        return 2
    finally:
        interrupts.forget()
    return 0


if __name__ == "__main__":
    sys.exit(main())
