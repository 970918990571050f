from __future__ import annotations

import torch
from helpers.tiny import digits
from safetensors import safe_open

from lit_diffusion.metrics import RealData, load_extractor
from lit_diffusion.metrics.extractors.digits import WEIGHTS_FILE, DigitsClassifier
from lit_diffusion.training.datamodule import DataModule


def test_the_weights_are_small_and_only_tensors():
    assert WEIGHTS_FILE.stat().st_size < 300_000
    with safe_open(WEIGHTS_FILE, "pt") as file:
        names = set(file.keys())
    assert names == set(DigitsClassifier().state_dict())
    assert 40_000 < sum(p.numel() for p in DigitsClassifier().parameters()) < 50_000


def test_it_knows_the_digits_that_its_training_left_out():
    data = DataModule(digits(), value_range=(-1.0, 1.0))
    real = RealData.of(digits(), data.held_out_indices, "held out")
    found = load_extractor("digits", (1, 8, 8))(real.values(torch.arange(real.count)))
    labels = torch.tensor([digits().label(int(k)) for k in data.held_out_indices])
    assert real.count > 100
    assert tuple(found.features.shape) == (real.count, 64)
    assert float((found.logits.argmax(1) == labels).double().mean()) >= 0.98
