"""Protocols of metric values: two values are comparable where their protocols agree.

A protocol is a dictionary of plain values, written beside every metric value: the extractor and its sha256, the resize,
the real data by a hash, their split and number, the samples' number, the sampler, the weights, the seed.
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
"""Keys in which comparable values may differ: they describe the samples (model, sampler, seed) or the uncertainty, not
the way of measuring."""


def differing_keys(protocols: Sequence[Mapping[str, Any]], but: frozenset[str] = FREE) -> list[str]:
    """The keys, other than ``but``, in which protocols differ; a missing key differs."""
    keys = dict.fromkeys(key for protocol in protocols for key in protocol if key not in but)
    return [key for key in keys if any(p.get(key, ...) != protocols[0].get(key, ...) for p in protocols)]
