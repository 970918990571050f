"""A random Inception that tells images apart: every figure of it is far from void."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy_images import smooth_images
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as theirs


class _Build(theirs.FeatureExtractorInceptionV3):
    def load_state_dict(self, *args, **keys):  # Its constructor insists on weights.
        return None


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Weights in the published layout.

    As initialised, an Inception makes the same features of every image. Each layer's statistics are taken from one pass
    over images like the tests', so the signal survives; a larger last layer makes classes of it.
    """
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **keys: {})
        torch.manual_seed(0)
        network = _Build("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
    images = np.concatenate((smooth_images(8, 101, 3), smooth_images(8, 102, 5)))
    with torch.no_grad():
        network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    network.fc.weight.data *= 5.0
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path
