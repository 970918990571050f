"""``doctor``: find what is wrong with this machine or a recipe, before hours are spent on it.

It must work where the installation is broken: nothing heavy is imported before it is tried.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lit_diffusion.checks import SEVERITIES, Finding, first_line, installation, machine, note, problem
from lit_diffusion.errors import UserError

USAGE = """usage: python -m lit_diffusion doctor [--config FILE] [--KEY VALUE ...]

Checks this machine and, with a configuration or any other arguments of fit, what would be trained: exactly as fit reads
them, on the first data, without a run directory, a step, or the network. One line a finding:

  ok       nothing to do
  note     good to know
  warning  it runs, and probably not as meant
  problem  it cannot run; then the exit code is 2"""


def main(arguments: Sequence[str]) -> None:
    """Run ``doctor``.

    Raises:
        UserError: if there are problems.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)  # noqa: T201 (this is its output)
        return
    counts: Counter[str] = Counter()
    for finding in findings(arguments):
        sys.stdout.write(f"{finding}\n")
        sys.stdout.flush()  # Some checks take seconds.
        counts[finding.severity] += 1
    plural = {"ok": "ok", "note": "notes", "warning": "warnings", "problem": "problems"}
    totals = [f"{counts[each]} {each if counts[each] == 1 else plural[each]}" for each in SEVERITIES]
    sys.stdout.write(f"{', '.join(totals)}\n")
    if counts["problem"]:
        raise UserError(f"{totals[0]}; each line above says how to fix it, the first one first")


def findings(arguments: Sequence[str]) -> Iterator[Finding]:
    """Yield all findings, in order."""
    yield from installation.versions()
    importing = list(installation.imports())
    yield from importing
    if any(finding.severity == "problem" for finding in importing):
        yield note("the machine and the recipe were not checked", "fix the installation first")
        return
    yield from machine.processor()
    yield from machine.load()
    yield from machine.accelerators()
    yield from machine.folders()
    yield from _recipe(arguments) if arguments else _no_recipe()


def _no_recipe() -> Iterator[Finding]:
    from lit_diffusion.checks import recipe
    from lit_diffusion.runs.dashboard import Dashboard

    yield from machine.disk(Path("runs"))
    yield from machine.shared_memory()
    yield from machine.open_files()
    yield from recipe.weights_and_biases(Dashboard())


def _recipe(arguments: Sequence[str]) -> Iterator[Finding]:
    from lit_diffusion.checks import recipe

    try:
        prepared, said = recipe.prepare(arguments)
    except UserError as error:
        yield problem(str(error))
        return
    except Exception as error:  # What Lightning or a class of the user's raises.
        yield problem(f"the recipe cannot be built ({first_line(error)})", "fit with the same arguments shows where")
        return
    yield from (note(line) for line in said)
    yield from recipe.findings(prepared)
