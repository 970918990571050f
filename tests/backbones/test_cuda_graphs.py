"""The recorded backbone gives what the backbone gives; without a CUDA device it is refused before any work."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import digits_data, ncsn, trainer

from lit_diffusion.backbones import UNet
from lit_diffusion.backbones.cuda_graphs import RecordedBackbone
from lit_diffusion.conditions import Condition
from lit_diffusion.errors import UserError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_model_on_the_cpu_is_refused():
    recorded = RecordedBackbone(UNet((1, 8, 8), channels=8, mult=(1,), attention=()))
    with pytest.raises(UserError, match="cuda_graphs needs a CUDA device, and the model is on cpu"):
        recorded(torch.zeros(2, 1, 8, 8), torch.zeros(2), None)


def test_a_training_on_the_cpu_is_refused_before_it_starts(tmp_path):
    method = ncsn()
    with pytest.raises(UserError, match=r"trainer\.cuda_graphs needs a CUDA device"):
        trainer(tmp_path, cuda_graphs=True).fit(method, datamodule=digits_data())
    assert method.clock.images == 0


@needs_cuda
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [None, 10])
def test_a_replay_gives_what_the_backbone_gives_also_after_its_weights_changed(dtype, num_classes):
    torch.manual_seed(0)
    backbone = UNet((1, 8, 8), channels=32, mult=(1, 2), attention=(4,), num_classes=num_classes, zero_init=False)
    backbone = backbone.cuda().eval()
    recorded = RecordedBackbone(backbone)
    with torch.no_grad(), torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        for rows in (4, 4, 7):
            x, c_noise = torch.randn(rows, 1, 8, 8, device="cuda"), torch.rand(rows, device="cuda")
            cond = None if num_classes is None else Condition(label=torch.arange(rows, device="cuda"))
            torch._foreach_mul_(list(backbone.parameters()), 0.9)
            torch.clear_autocast_cache()
            given, expected = recorded(x, c_noise, cond), backbone(x, c_noise, cond)
            assert torch.allclose(given, expected, atol=1e-2 if dtype else 1e-5)
            assert given.abs().max() > 0.0
