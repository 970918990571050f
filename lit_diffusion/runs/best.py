"""The best checkpoints of a run, in a list beside them, best first.

The list is the truth: a checkpoint is written before it is listed, and removed only once it is off the list.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_diffusion.files import atomic_write
from lit_diffusion.metrics.catalogue import CATALOGUE, is_better
from lit_diffusion.runs.console import print_note

BEST = "best.json"
"""File name of the list of the best checkpoints, best first: file, metric, value, images."""

Entry = dict[str, Any]


def read_best(folder: Path) -> list[Entry]:
    """Read the list of a folder's best checkpoints; empty where there is no list."""
    path = folder / BEST
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text())
        found = [{key: entry[key] for key in ("file", "metric", "value", "images")} for entry in entries]
        return [entry for entry in found if (folder / entry["file"]).is_file()]
    except (OSError, ValueError, KeyError, TypeError):
        print_note(f"{path} is damaged and is written again")
        return []


def best_name(key: str, value: float, images: int) -> str:
    """File name of a checkpoint that is among the best."""
    return f"best-{images:010d}-{key.replace('/', '-')}-{value:.4g}.ckpt"


def is_among_best(listed: list[Entry], metric: str, key: str, value: float, images: int, keep: int) -> bool:
    """True where a checkpoint belongs on the list.

    Args:
        listed: the list, from :func:`read_best`.
        metric: name of the metric in the catalogue.
        key: the value's name; only values of one name are compared.
        value: the checkpoint's value.
        images: images seen at the checkpoint; an earlier entry with the same number does not count.
        keep: number of checkpoints kept.
    """
    others = [entry for entry in listed if entry["metric"] == key and entry["images"] != images]
    return is_better(metric, value, others[keep - 1]["value"] if len(others) >= keep else None)


def list_best(folder: Path, listed: list[Entry], metric: str, key: str, value: float, images: int, keep: int) -> None:
    """Put a checkpoint that was written as :func:`best_name` on the list; remove the files that fall off it.

    Values of other names stay, with their checkpoints. The arguments are those of :func:`is_among_best`.
    """
    others = [entry for entry in listed if entry["metric"] != key]
    before = [entry for entry in listed if entry["metric"] == key]
    kept = [entry for entry in before if entry["images"] != images]
    kept.append({"file": best_name(key, value, images), "metric": key, "value": value, "images": images})
    kept.sort(key=lambda entry: entry["value"], reverse=CATALOGUE[metric].better == "max")
    with atomic_write(folder / BEST) as file:
        file.write((json.dumps([*kept[:keep], *others], indent=1) + "\n").encode())
    for name in {entry["file"] for entry in before} - {entry["file"] for entry in kept[:keep]}:
        (folder / name).unlink(missing_ok=True)
