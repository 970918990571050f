"""``dataset.json``, the labels of a folder or a zip file of images in the format of StyleGAN's and EDM's tools.

``{"labels": [["00000/img00000000.png", 3], ...]}``, with names relative to that file, or ``{"labels": null}``; a label
is an integer from 0, or a one-hot list. Further keys are allowed; ``class_names`` lists the names of the classes in
the order of their numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lit_diffusion.errors import UserError

DATASET_JSON = "dataset.json"


def read_labels(text: bytes, where: str) -> tuple[dict[str, int], list[str]] | None:
    """The class of each file by its name, and the names of the classes, empty where they have none.

    Args:
        text: contents of the file.
        where: location of the file, for messages.

    Returns:
        Classes and names; None where there are no labels.

    Raises:
        UserError: for another format, or a label that is not a class.
    """
    try:
        content = json.loads(text)
        labels = content["labels"]
        pairs = None if labels is None else [(str(name).replace("\\", "/"), label) for name, label in labels]
        names = [str(name) for name in content.get("class_names") or ()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{where} is not {{"labels": [["NAME.png", 3], ...]}} or {{"labels": null}}: write it so, or remove it'
        ) from error
    if pairs is None:
        return None
    found: dict[str, int] = {}
    width: int | None = None
    for name, given in pairs:
        one_hot = isinstance(given, list)
        if one_hot and width not in (None, len(given)):
            raise UserError(f"{where}: the label of {name} has {len(given)} numbers, others {width}")
        if one_hot:
            width = len(given)
        number = _class_of(given)
        if number is None:
            raise UserError(
                f"{where}: the label of {name} is {str(given)[:60]}: a class is an integer from 0, or a list with a "
                f"single 1"
            )
        if found.setdefault(name, number) != number:
            raise UserError(f"{where}: {name} has the labels {found[name]} and {number}: leave one of them out")
    return found, names


def _class_of(label: Any) -> int | None:
    """The class of a label, None for an invalid one."""
    if isinstance(label, list):
        values = sorted(value for value in label if isinstance(value, int | float))
        is_one_hot = len(values) == len(label) and values == [0] * (len(label) - 1) + [1]
        return label.index(1) if is_one_hot else None
    return label if isinstance(label, int) and not isinstance(label, bool) and label >= 0 else None


def labels_text(names: Sequence[str], labels: Sequence[int], class_names: Sequence[str] | None = None) -> bytes:
    """The contents of ``dataset.json`` for the labels of files."""
    content: dict[str, Any] = {"labels": [[name, int(label)] for name, label in zip(names, labels, strict=True)]}
    if class_names:
        content["class_names"] = list(class_names)
    return (json.dumps(content) + "\n").encode()
