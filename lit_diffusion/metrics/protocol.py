"""What makes two figures comparable: that they were made alike.

A protocol is a dictionary of plain values, written beside every figure: the extractor and its sha256, the resize, the
real data by a hash, their split and number, the samples' number, the walk, the weights, the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FREE = frozenset(
    {
        *("seed", "seeds", "stage", "samples", "samples_fingerprint", "labels"),
        *("sampler", "network_evaluations", "weights", "backbone_precision", "caveat", "bootstrap", "bootstrap_of"),
    }
)
"""What says whose samples were judged, not how, or only how sure a figure is: figures of different models and walks are
there to be compared."""


def differing_keys(protocols: Sequence[Mapping[str, Any]], but: frozenset[str] = FREE) -> list[str]:
    """The keys in which protocols are not all the same, a missing one included; some keys may differ."""
    keys = dict.fromkeys(key for protocol in protocols for key in protocol if key not in but)
    return [key for key in keys if any(p.get(key, ...) != protocols[0].get(key, ...) for p in protocols)]
