"""From bytes to features: the networks in whose eyes samples and data are compared.

One forward a batch serves every metric. It runs in float32, outside autocast and without TF32, whatever precision the
model trains in; the networks belong to no module, so no checkpoint and no average of weights holds them.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.metrics.digits import WEIGHTS_FILE, DigitsClassifier
from lit_diffusion.metrics.dinov2 import DINOv2Transformer
from lit_diffusion.metrics.weights import WEIGHTS, find_weights, sha256_of

ExtractorName = Literal["inception", "dinov2", "clip", "vgg16", "digits", "points"]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 as it is: no autocast, no TF32, no gradients."""
    matmul = torch.get_float32_matmul_precision()
    if matmul != "highest":  # Setting what is set already makes compiled networks compile again.
        torch.set_float32_matmul_precision("highest")
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cuda":
                cudnn = torch.backends.cudnn
                as_set = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
                stack.enter_context(cudnn.flags(**as_set, allow_tf32=False))
            yield
    finally:
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)


@dataclass(frozen=True)
class Features:
    """What an extractor says of a batch.

    Attributes:
        features: float32 ``[B, D]``.
        logits: of a classifier, float32 ``[B, K]``; None where there is none.
    """

    features: Tensor
    logits: Tensor | None = None


class Extractor(ABC):
    """A frozen map from data to features.

    Attributes:
        name: in figures' names.
        model: which network, for the protocol.
        dimension: D of the features.
        has_logits: whether it is a classifier, so that an Inception Score can be had.
        resize: how it brings images to its size.
        sha256: of its weights.
    """

    name: ExtractorName
    model: str
    dimension: int
    has_logits = False
    resize = "none"
    sha256 = ""

    def to(self, device: torch.device) -> Extractor:
        """Onto a device; itself."""
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device("cpu")

    @classmethod
    @abstractmethod
    def require_fit(cls, shape: tuple[int, ...]) -> None:
        """Refuse data that it cannot see.

        Args:
            shape: of one datum, ``(C, H, W)`` or ``(D,)``.

        Raises:
            UserError: naming what it can.
        """

    @abstractmethod
    def __call__(self, data: np.ndarray) -> Features:
        """Features of uint8 images ``[B, H, W, C]``, or of points ``[B, D]``, on its device."""

    def protocol(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """What a figure says of it, for data of this shape."""
        return {"extractor": self.model, "extractor_sha256": self.sha256, "resize": self.resize}


class _NetworkExtractor(Extractor):
    """One with a network, of images."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.float().eval().requires_grad_(False)

    def to(self, device: torch.device) -> Extractor:
        self.network.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @classmethod
    def require_fit(cls, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise UserError(
                f"extractor {cls.name} sees images, the data have shape {list(shape)}; points have their own: "
                f"extractor points"
            )
        if shape[0] not in (1, 3):
            raise UserError(
                f"extractor {cls.name} sees grey or RGB images, the data have shape {list(shape)}, and no other "
                f"extractor sees {shape[0]} channels: a run goes without metrics of samples by eval.metrics []"
            )

    def __call__(self, data: np.ndarray) -> Features:
        if data.dtype != np.uint8:
            raise ValueError(f"extractors see bytes (to_uint8), not {data.dtype}")
        device = self.device
        with full_precision(device):
            return self._features(torch.from_numpy(np.ascontiguousarray(data.transpose(0, 3, 1, 2))).to(device))

    @abstractmethod
    def _features(self, images: Tensor) -> Features:
        """Of uint8 ``[B, C, H, W]``."""

    def protocol(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {**super().protocol(shape), "grey_repeated": shape[0] == 1}


class _Fidelity(_NetworkExtractor):
    """A network of torch-fidelity, which resizes as TensorFlow 1 did: bilinear, not antialiased."""

    def _features(self, images: Tensor) -> Features:
        # Grey becomes RGB by repetition; the protocol says so.
        found = self.network(images.expand(-1, 3, -1, -1))
        return Features(found[0], found[1] if len(found) > 1 else None)


class Inception(_Fidelity):
    """Inception v3 with the weights of the first FID (Heusel et al. 2017): 2048 features and 1008 unbiased logits.

    Args:
        weights_path: of the weights; None for the fetched ones.
    """

    name = "inception"
    model = "inception-v3-compat"
    dimension = 2048
    has_logits = True
    resize = "tensorflow-bilinear-299"

    def __init__(self, weights_path: str | Path | None = None) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path, self.sha256 = find_weights("inception", weights_path)
        require_plain_weights(path)
        with _readable(path):
            network = FeatureExtractorInceptionV3(
                self.model, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        super().__init__(network)


class VGG16(_Fidelity):
    """VGG-16's second hidden layer, in which Kynkaanniemi et al. (2019) measure precision and recall.

    Args:
        weights_path: of the weights; None for the fetched ones.
    """

    name = "vgg16"
    model = "vgg16"
    dimension = 4096
    resize = "tensorflow-bilinear-224"

    def __init__(self, weights_path: str | Path | None = None) -> None:
        from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

        path, self.sha256 = find_weights("vgg16", weights_path)
        require_plain_weights(path)
        with _readable(path):
            network = FeatureExtractorVGG16(self.model, ["fc2_relu"], feature_extractor_weights_path=str(path))
        super().__init__(network)


class CLIP(_Fidelity):
    """CLIP's image embedding (Radford et al. 2021), ViT-B/32.

    Args:
        weights_path: of the weights as published, a TorchScript archive; None for the fetched ones.
    """

    name = "clip"
    model = "clip-vit-b-32"
    dimension = 512
    resize = "tensorflow-bilinear-224"

    def __init__(self, weights_path: str | Path | None = None) -> None:
        from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

        path, self.sha256 = find_weights("clip", weights_path)
        self.path = path
        with _readable(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.*")  # the published file is TorchScript
            network = FeatureExtractorCLIP(self.model, ["clip"], feature_extractor_weights_path=str(path))
        super().__init__(network)

    def captions(self, texts: list[str]) -> Tensor:
        """Embeddings of captions ``[B, 512]``, by the text half of the same file.

        Raises:
            UserError: without the extra that reads it.
        """
        try:
            import open_clip
        except ImportError as error:
            raise UserError("captions need open_clip: pip install 'lit-diffusion[clip]'") from error
        if not hasattr(self, "_text"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.jit.*")
                self._text = open_clip.load_openai_model(str(self.path), precision="fp32", device="cpu").eval()
        tokens = open_clip.SimpleTokenizer()(texts)
        with full_precision(torch.device("cpu")):
            return self._text.encode_text(tokens).float()


class DINOv2(_NetworkExtractor):
    """DINOv2's class token, ViT-L/14: the features of FD-DINOv2 (Stein et al. 2023).

    Args:
        weights_path: of the weights; None for the fetched ones.
    """

    name = "dinov2"
    model = "dinov2-vit-l-14"
    dimension = 1024
    resize = "tensorflow-bilinear-224"
    side = 224

    def __init__(self, weights_path: str | Path | None = None) -> None:
        path, self.sha256 = find_weights("dinov2", weights_path)
        state = require_plain_weights(path)
        network = DINOv2Transformer()
        with _readable(path):
            network.load_state_dict(state)
        super().__init__(network)

    def _features(self, images: Tensor) -> Features:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        x = interpolate_bilinear_2d_like_tensorflow1x(
            images.expand(-1, 3, -1, -1).float(), size=(self.side, self.side), align_corners=False
        )
        # ImageNet's mean and deviation of each colour.
        mean = x.new_tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
        deviation = x.new_tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
        return Features(self.network((x / 255.0 - mean) / deviation))


class DigitsFeatures(_NetworkExtractor):
    """The embedded classifier of 8 x 8 grey digits; see :mod:`lit_diffusion.metrics.digits`.

    Args:
        weights_path: of other weights of the same classifier, safetensors; None for the ones in the package.
    """

    name = "digits"
    model = "digits-classifier"
    dimension = 64
    has_logits = True

    def __init__(self, weights_path: str | Path | None = None) -> None:
        from safetensors.torch import load_file

        path = WEIGHTS_FILE if weights_path is None else Path(weights_path).expanduser()
        self.sha256 = sha256_of(path)
        network = DigitsClassifier()
        with _readable(path):
            network.load_state_dict(load_file(path))
        super().__init__(network)

    @classmethod
    def require_fit(cls, shape: tuple[int, ...]) -> None:
        """Refuse all but 8 x 8 grey images."""
        if tuple(shape) != (1, 8, 8):
            raise UserError(
                f"extractor digits sees 8 x 8 grey images, the data have shape {list(shape)}; choose another: "
                f"inception, dinov2, clip or vgg16"
            )

    def _features(self, images: Tensor) -> Features:
        return Features(*self.network(images.float() / 127.5 - 1.0))

    def protocol(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Of a network that takes grey images as they are."""
        return {**super().protocol(shape), "grey_repeated": False}


class Points(Extractor):
    """Points of the plane and the like are their own features.

    Args:
        dimension: of a point.
    """

    name = "points"
    model = "points"

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    @classmethod
    def require_fit(cls, shape: tuple[int, ...]) -> None:
        """Refuse images."""
        if len(shape) != 1:
            raise UserError(f"extractor points takes points, the data have shape {list(shape)}")

    def __call__(self, data: np.ndarray) -> Features:
        """The points ``[B, D]`` themselves."""
        return Features(torch.from_numpy(np.ascontiguousarray(data)).float())


def default_extractor(shape: tuple[int, ...]) -> ExtractorName:
    """For data of this shape: the digits' own for theirs, points for points, else Inception."""
    if len(shape) == 1:
        return "points"
    return "digits" if tuple(shape) == (1, 8, 8) else "inception"


def load_extractor(name: ExtractorName, shape: tuple[int, ...], weights_path: str | Path | None = None) -> Extractor:
    """An extractor by its name, fit for data of a shape.

    Raises:
        UserError: if its weights are missing or damaged, or the data do not fit.
    """
    require_choice("", "extractor", name, get_args(ExtractorName))
    classes: dict[str, type[Inception | DINOv2 | CLIP | VGG16 | DigitsFeatures]] = {
        "inception": Inception,
        "dinov2": DINOv2,
        "clip": CLIP,
        "vgg16": VGG16,
        "digits": DigitsFeatures,
    }
    # Before the weights are looked for: no file would help.
    (Points if name == "points" else classes[name]).require_fit(shape)
    return Points(shape[0]) if name == "points" else classes[name](weights_path)


def require_weights(name: ExtractorName, weights_path: str | Path | None = None) -> None:
    """Find out in a moment whether :func:`load_extractor` would find its weights.

    Raises:
        UserError: with the command that brings them.
    """
    if name in WEIGHTS:
        find_weights(name, weights_path)


def require_plain_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a file that holds nothing else: no code is unpickled.

    torch-fidelity would run what a file holds; so it is only given files that passed here.

    Raises:
        UserError: if the file holds anything else, or is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than weights and is not opened: fetch the published file") from error
    except Exception as error:  # A damaged file makes the reader raise whatever it may.
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"cannot read the weights {path}: truncated, or none ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is no table of weights")
    return state


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say in one line that a file is another network's, or none."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} does not hold the weights of this network: {str(error).splitlines()[0][:120]}"
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"cannot read the weights {path}: truncated, or no safetensors file") from error
