"""The README's table: every method on the digits at the same budget, judged, with a picture of each.

    python benchmarks/digits_table.py --runs runs/table

trains what is not yet in that folder (about 4 minutes a method on 2 idle cores), draws 1,000 samples of each, judges
and evaluates them, measures bits per dimension, and writes the tables between the README's markers and the pictures to
docs/digits/.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from judge import judge

from lit_diffusion.__main__ import dispatch
from lit_diffusion.images import image_grid, save_png

ROOT = Path(__file__).parent.parent

METHODS = {
    "ncsn": "NCSN",
    "ncsnv2": "NCSNv2",
    "ddpm": "DDPM",
    "ddpm_cosine": "DDPM, cosine betas",
    "ddim": "DDIM, 50 steps",
    "score_sde_ve": "Score-SDE, VE",
    "score_sde_vp": "Score-SDE, VP",
    "score_sde_subvp": "Score-SDE, sub-VP",
    "edm": "EDM, 35 evaluations",
    "flow_matching": "Flow matching, 50 evaluations",
}
"""Runs by their name, which is their experiment's file unless :data:`CHANGED` says otherwise, and what the table calls
them."""

CHANGED = {"ddpm_cosine": ("ddpm", ["--model.schedule", "cosine"])}
"""Runs that are a shipped experiment with other values: its file and the values."""

DDIM_50 = ["--sampler", "ddim", "--sampler.steps", "50"]

OTHER_SAMPLERS: dict[str, tuple[str, list[str]]] = {
    "ancestral, 10 steps": ("ddpm", ["--sampler", "ancestral", "--sampler.steps", "10"]),
    "DDIM, 10 steps": ("ddpm", ["--sampler", "ddim", "--sampler.steps", "10"]),
    "DDIM, 50 steps": ("ddpm", DDIM_50),
    "DDIM, 50 steps, cosine betas": ("ddpm_cosine", DDIM_50),
    "DDIM, 10 quadratic steps": ("ddpm", [*DDIM_50[:3], "10", "--sampler.spacing", "quadratic"]),
    "Heun, 25 steps": ("ddpm", ["--sampler", "heun", "--sampler.steps", "25"]),
    "probability-flow ODE": ("ddpm", ["--sampler", "ode"]),
    "probability-flow ODE, cosine betas": ("ddpm_cosine", ["--sampler", "ode"]),
    "annealed Langevin": (
        "ddpm",
        [
            *("--sampler", "annealed_langevin", "--sampler.initial", "gaussian", "--sampler.levels", "100"),
            *("--sampler.steps_per_level", "5", "--sampler.eta", "8e-5", "--sampler.denoise", "true"),
        ],
    ),
}
"""Other samplers on the DDPM checkpoints."""


def train(name: str, run: Path) -> float:
    """Fit an experiment into a new run directory; returns the seconds it took."""
    begin = time.monotonic()
    file, changed = CHANGED.get(name, (name, []))
    config = ROOT / "experiments" / f"{file}.yaml"
    # Pictures change nothing of the training, and cost a minute.
    without = ["--samples.count", "0", "--wandb.mode", "disabled"]
    dispatch(["fit", "--config", str(config), "--run_dir", str(run), *changed, *without])
    return time.monotonic() - begin


def sample(run: Path, out: Path, arguments: list[str] | None = None) -> np.ndarray:
    """A thousand samples of a run, uint8 ``[1000, 8, 8, 1]``."""
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    dispatch(["sample", "--ckpt_path", checkpoint, "--num_samples", "1000", "--out", str(out), *(arguments or [])])
    images: np.ndarray = np.load(out)["arr_0"]
    return images


def judged(images: np.ndarray) -> dict[str, float]:
    """What the judge says of uint8 ``[N, 8, 8, 1]``."""
    return judge(images.reshape(len(images), 64) / 255.0)


def bits(run: Path, out: Path) -> dict[str, float]:
    """Bits per dimension of a run by the ODE and by the bound, as `test` reports them."""
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    alone = ["--eval.metrics", "[]", "--wandb.mode", "disabled"]
    dispatch(["test", "--ckpt_path", checkpoint, "--run_dir", str(out), *alone])
    found: dict[str, float] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        found |= {key: event[key] for key in ("bpd_ode", "bpd_bound") if event["event"] == "test" and key in event}
    return found


def evaluated(archive: Path, out: Path) -> dict[str, float]:
    """What `evaluate` says of the samples in an archive against all digits."""
    dispatch(["evaluate", "--samples", str(archive), "--reference", "Digits", "--out", str(out)])
    values: dict[str, float] = json.loads(out.read_text())["values"]
    return values


def remembered(path: Path, make: Any) -> dict[str, Any]:
    """What a file holds, or, the first time, what ``make`` returns."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def row(cells: list[str]) -> str:
    """Of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


EVALUATED = ["fd/digits-1k", "precision/digits-1k", "recall/digits-1k"]
JUDGED = ["fd/digits-1k", "precision", "recall", "fd/pixels", "fd/hidden", "confident", "classes", "near copies"]


def figures(verdict: dict[str, float], values: dict[str, float]) -> list[str]:
    """Our own figures and the judge's as cells."""
    return [
        *(f"{values[key]:.2f}" for key in EVALUATED),
        f"{verdict['frechet_pixels']:.3f}",
        f"{verdict['frechet_hidden']:.3f}",
        f"{verdict['confident']:.0%}",
        f"{verdict['classes']:.2f}",
        f"{verdict['copies']:.1%}",
    ]


def methods_table(runs: Path) -> list[str]:
    """Every method; trains those that have no checkpoint yet."""
    lines = [row(["method", "samples", *JUDGED, "bits/dim, ODE", "bits/dim, bound"]), row(["---"] * (len(JUDGED) + 4))]
    for name, title in METHODS.items():
        run = runs / name
        if not (run / "checkpoints" / "last.ckpt").exists():
            train(name, run)
        archive = runs / f"{name}.npz"
        images = np.load(archive)["arr_0"] if archive.exists() else sample(run, archive)
        save_png(image_grid(images[:32], columns=8, min_side=256), ROOT / "docs" / "digits" / f"{name}.png")
        verdict = remembered(runs / f"{name}.json", lambda images=images: judged(images))
        values = evaluated(archive, runs / f"{name}-evaluated.json")
        likelihood = remembered(runs / f"{name}-bits.json", lambda run=run, name=name: bits(run, runs / f"{name}-test"))
        picture = f"![](docs/digits/{name}.png)"
        cells = [f"{likelihood[key]:.3f}" if key in likelihood else "" for key in ("bpd_ode", "bpd_bound")]
        lines.append(row([title, picture, *figures(verdict, values), *cells]))
    return lines


def samplers_table(runs: Path) -> list[str]:
    """Other samplers on the DDPM runs."""
    lines = [row(["sampler on the DDPM run", *JUDGED]), row(["---"] * (len(JUDGED) + 1))]
    for number, (title, (run, arguments)) in enumerate(OTHER_SAMPLERS.items()):
        out = runs / f"sampler-{number}.npz"
        verdict = remembered(
            runs / f"sampler-{number}.json",
            lambda out=out, run=run, arguments=arguments: judged(sample(runs / run, out, arguments)),
        )
        values = evaluated(out, runs / f"sampler-{number}-evaluated.json")
        lines.append(row([title, *figures(verdict, values)]))
    return lines


def put_into_readme(marker: str, lines: list[str]) -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- end -->``."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(f"<!-- {marker} -->\n")
    after = rest.split("<!-- end -->", 1)[1]
    readme.write_text(f"{before}<!-- {marker} -->\n" + "\n".join(lines) + f"\n<!-- end -->{after}")


def main() -> None:
    """Make what is missing, then both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="Folder of the runs; what is there is not made again.")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    put_into_readme("digits-table", methods_table(options.runs))
    put_into_readme("samplers-table", samplers_table(options.runs))


if __name__ == "__main__":
    main()
