"""Which figures may be compared."""

from __future__ import annotations

import pytest

from lit_diffusion.metrics.catalogue import CATALOGUE, better, metric_key
from lit_diffusion.metrics.protocol import differing_keys

ALIKE = {"extractor": "inception-v3-compat", "reference": "0123", "n_fake": 2000, "seed": 0, "weights": "ema"}


def test_what_was_measured_may_differ_how_may_not():
    others = {"seed": 1, "weights": "raw", "sampler": "DDIM(steps=50)"}
    others["labels"] = "as in the training data"  # One of them is class-conditional.
    assert differing_keys([ALIKE, {**ALIKE, **others}]) == []
    for key, value in (("reference", "4567"), ("n_fake", 50_000), ("resize", "none")):
        assert differing_keys([ALIKE, {**ALIKE, **others, key: value}]) == [key]


def test_a_missing_key_differs():
    without = {key: value for key, value in ALIKE.items() if key != "reference"}
    assert differing_keys([ALIKE, ALIKE, without]) == ["reference"]
    assert differing_keys([without, ALIKE]) == ["reference"]
    assert differing_keys([ALIKE]) == differing_keys([]) == []
    assert differing_keys([ALIKE, {**ALIKE, "seed": 1}], but=frozenset()) == ["seed"]


@pytest.mark.parametrize("extractor", ["inception", "digits", "dinov2"])
@pytest.mark.parametrize("metric", sorted({*CATALOGUE} - {"memorisation"}))  # Which is several.
def test_what_is_better_is_one_opinion(metric, extractor):
    assert better(metric_key(metric, extractor, 2000)) == CATALOGUE[metric].better
