"""CLIP from a file in the published layout: images by torch-fidelity's half, captions by open_clip's, one score."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_diffusion.__main__ import dispatch
from lit_diffusion.errors import UserError
from lit_diffusion.metrics.extractors import CLIP
from lit_diffusion.metrics.weights import sha256_of

CAPTIONS = ["a cat", "two dogs on a sofa", "noise", "the sea at night"]


class _Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _tree(state: dict[str, Tensor]) -> _Named:
    """Modules and parameters with these names, to be saved as TorchScript."""
    root = _Named()
    for name, value in state.items():
        *folders, leaf = name.split(".")
        module = root
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, _Named())
            module = getattr(module, folder)
        module.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=False))
    for name, number in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(number))
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random CLIP of two layers, and the file of its weights."""
    open_clip = pytest.importorskip("open_clip.model")
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        vision = open_clip.CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=32, image_size=224)
        text = open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=128, heads=2, layers=2)
        model = open_clip.CLIP(512, vision, text, quick_gelu=True).eval()
        with torch.no_grad():
            model.text_projection.neg_()  # this random one has images and captions on opposite sides: all scores 0
        state = {name: value for name, value in model.state_dict().items() if name != "attn_mask"}
        torch.jit.save(torch.jit.script(_tree(state)), str(path))
    return model, path


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 224, 224, 3), dtype=np.uint8)


def test_images_and_captions_are_embedded_as_open_clip_does(tiny, images):
    import open_clip

    model, path = tiny
    clip = CLIP(path)
    assert clip.sha256 == sha256_of(path)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(1, 3, 1, 1)
    deviation = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(1, 3, 1, 1)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0 - mean) / deviation
    with torch.no_grad():
        expected = model.encode_image(x), model.encode_text(open_clip.SimpleTokenizer()(CAPTIONS))
    found = clip(images).features, clip.captions(CAPTIONS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (4, 512)
        # The published weights are float16, so both readers round to it.
        assert torch.allclose(ours, theirs, atol=1e-2 * float(theirs.abs().max()))


def test_the_command_scores_captions(tiny, images, tmp_path, monkeypatch, capsys):
    _, path = tiny
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=images)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    arguments = ["--samples", "a.npz", "--reference", "a.npz", "--captions", "captions.txt", "--out", "r.json"]
    extractor = ["--extractor", "clip", "--weights_path", str(path), "--metrics", "clip_score,fid"]
    dispatch(["evaluate", *arguments, *extractor])
    result = json.loads((tmp_path / "r.json").read_text())
    clip = CLIP(path)
    cosine = torch.nn.functional.cosine_similarity(clip(images).features, clip.captions(CAPTIONS))
    assert result["values"]["clip_score-4"] > 1.0
    assert result["values"]["clip_score-4"] == pytest.approx(float(100.0 * cosine.clamp(min=0.0).mean()), abs=1e-4)
    assert result["values"]["fd/clip-4"] == pytest.approx(0.0, abs=1e-4)
    assert result["protocol"]["clip_sha256"] == clip.sha256
    with pytest.raises(UserError, match="give both, or neither"):
        dispatch(["evaluate", *arguments[:4], *extractor])
    (tmp_path / "captions.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match=r"captions.txt has 2 lines for 4 images"):
        dispatch(["evaluate", *arguments, *extractor])


def test_another_file_is_one_line(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not hold the weights of this network") as caught:
        CLIP(tmp_path / "other.pt")
    assert "\n" not in str(caught.value)
