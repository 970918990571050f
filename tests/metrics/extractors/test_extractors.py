"""What extractors see and say."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
import torch
from helpers.toy_images import smooth_images

from lit_diffusion.errors import UserError
from lit_diffusion.metrics import Features, Gaussian, Reference, ScoreOptions, Scores, load_extractor
from lit_diffusion.metrics.catalogue import default_metrics
from lit_diffusion.metrics.extractors import CLIP, VGG16, DINOv2, Points, default_extractor, dinov2, full_precision


@pytest.fixture(scope="module")
def inception(inception_file):
    return load_extractor("inception", (3, 32, 32), inception_file)


def test_inception_has_2048_features_and_1008_logits(inception):
    found = inception(smooth_images(2, 0, 3))
    assert (tuple(found.features.shape), tuple(found.logits.shape)) == ((2, 2048), (2, 1008))
    assert (found.features.dtype, found.logits.dtype) == (torch.float32, torch.float32)
    # Unbiased: the last layer without its bias.
    expected = found.features @ inception.network.fc.weight.T
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    assert float(found.features.std(0).max()) > 0.01


def test_an_outer_autocast_changes_no_bit(inception):
    images = smooth_images(2, 0, 3)
    expected = inception(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = inception(images)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.logits, expected.logits)


def test_grey_is_repeated_and_said_so(inception):
    grey = smooth_images(2, 0, 3)[..., :1]
    assert torch.equal(inception(grey).features, inception(grey.repeat(3, axis=3)).features)
    assert inception.protocol((1, 32, 32))["grey_repeated"] is True
    assert inception.protocol((3, 32, 32))["grey_repeated"] is False
    assert load_extractor("digits", (1, 8, 8)).protocol((1, 8, 8))["grey_repeated"] is False


def test_the_protocol_names_the_weights(inception, inception_file):
    said = inception.protocol((3, 32, 32))
    assert said["extractor_sha256"] == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert (said["extractor"], said["resize"]) == ("inception-v3-compat", "tensorflow-bilinear-299")


def real_features(dimension):
    real = torch.randn(40, dimension, generator=torch.Generator().manual_seed(0))
    wide = real.double()
    return Reference(Gaussian(wide.mean(0), wide.T.cov(), 40), real, torch.arange(40))


def test_one_forward_a_batch_serves_every_metric(inception, monkeypatch):
    calls, logits = [], []
    network = inception.network

    def counted(images):
        calls.append(len(images))
        return torch.randn(len(images), 2048), torch.randn(len(images), 1008)

    monkeypatch.setattr(network, "forward", counted)
    metrics = (*default_metrics(), "fid_infinity")
    scores = Scores(metrics, inception, real_features(2048), (3, 32, 32), ScoreOptions(bootstrap=2), pairs=2)
    monkeypatch.setattr(scores.metric("is"), "update", lambda rows, index: logits.append(rows.shape))
    images = smooth_images(5, 0, 3)
    for part in (torch.arange(3), torch.arange(3, 5)):
        scores.update(images[part.numpy()], part)
    assert calls == [3, 3]  # The second filled up: one batch shape.
    assert logits == [(3, 1008), (2, 1008)]
    for name in ("fid", "fid_infinity"):
        assert scores.metric(name).dimension == 2048
        assert int(scores.metric(name).sums[:, 0].sum()) == 5


def test_no_module_holds_the_network(inception):
    scores = Scores(default_metrics(), inception, real_features(2048), (3, 32, 32))
    assert not isinstance(inception, torch.nn.Module)
    assert not isinstance(scores, torch.nn.Module)
    for part in (scores.metric(name) for name in default_metrics()):
        if isinstance(part, torch.nn.Module):
            assert not list(part.parameters())
            assert not part.state_dict()
            assert not any(module is inception.network for module in part.modules())
    assert not any(p.requires_grad for p in inception.network.parameters())
    assert not inception.network.training


def test_full_precision_is_for_as_long_as_it_is_asked_for():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.is_grad_enabled()
    finally:
        torch.set_float32_matmul_precision(before)


def test_only_bytes_are_seen(inception):
    with pytest.raises(ValueError, match="take bytes"):
        inception(smooth_images(2, 0, 3).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("inception", (2, 8, 8), "grey or RGB images, the data have shape"),
        ("inception", (2,), "extractor points"),
        ("digits", (3, 8, 8), "8 x 8 grey images.*choose another"),
        ("digits", (1, 16, 16), "8 x 8 grey images"),
        ("points", (1, 8, 8), "takes points"),
        ("resnet", (1, 8, 8), "choose one of inception"),
    ],
)
def test_data_that_an_extractor_cannot_see_are_refused(name, shape, words, inception_file):
    with pytest.raises(UserError, match=words):
        load_extractor(name, shape, inception_file if name == "inception" else None)


def test_each_kind_of_data_has_an_extractor():
    assert [default_extractor(shape) for shape in ((2,), (1, 8, 8), (3, 8, 8), (1, 28, 28))] == [
        "points",
        "digits",
        "inception",
        "inception",
    ]


def test_points_are_their_own_features():
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = Points(2)(x)
    assert isinstance(found, Features)
    assert (found.features.tolist(), found.logits) == (x.tolist(), None)


# ---- the other networks, small ------------------------------------------------------------------------------------


def test_dinov2_sees_normalised_images_of_224(tmp_path, monkeypatch):
    made = dinov2.DINOv2Transformer
    monkeypatch.setattr(dinov2, "DINOv2Transformer", lambda: made(32, 1, 2))
    torch.save(made(32, 1, 2).state_dict(), tmp_path / "w.pth")
    extractor, seen = DINOv2(tmp_path / "w.pth"), []
    extractor.network.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    white = np.full((2, 8, 8, 1), 255, np.uint8)
    assert tuple(extractor(white).features.shape) == (2, 32)
    assert tuple(seen[0].shape) == (2, 3, 224, 224)
    # ImageNet's white.
    for channel, value in enumerate((2.2489, 2.4286, 2.6400)):
        torch.testing.assert_close(seen[0][:, channel], torch.full((2, 224, 224), value), atol=1e-4, rtol=0.0)


@pytest.fixture
def clip_file(tmp_path):
    """OpenAI's layout: an archive whose sizes are inferred from its weights."""
    from torch_fidelity.feature_extractor_clip import VisionTransformer

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = VisionTransformer(64, 32, 64, 1, 1, 512)
            self.text_projection = torch.nn.Parameter(torch.zeros(4, 512))

        def forward(self, x):
            return self.visual(x) + self.text_projection.sum()

    torch.manual_seed(0)
    torch.jit.trace(Both().eval(), torch.zeros(1, 3, 64, 64)).save(str(tmp_path / "clip.pt"))
    return tmp_path / "clip.pt"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clip_embeds_images_and_says_what_captions_need(clip_file, monkeypatch):
    extractor = CLIP(clip_file)
    found = extractor(smooth_images(2, 0, 3))
    assert (tuple(found.features.shape), found.logits) == ((2, 512), None)
    assert float((found.features[0] - found.features[1]).abs().max()) > 1e-3
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"captions need open_clip: pip install 'lit-diffusion\[clip\]'"):
        extractor.captions(["a digit"])


@pytest.mark.slow
def test_vgg16_is_torchvisions_second_hidden_layer(tmp_path):
    """528 MB are written and read."""
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.vgg16().eval()
    torch.save(network.state_dict(), tmp_path / "vgg16.pth")
    x = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    found = VGG16(tmp_path / "vgg16.pth")(x)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    seen = ((torch.from_numpy(x) / 255.0 - mean) / deviation).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network.classifier[:5](network.avgpool(network.features(seen)).flatten(1))
    torch.testing.assert_close(found.features, expected, rtol=1e-3, atol=1e-5)
    assert float(expected.std()) > 0.0
