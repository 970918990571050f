"""What an extractor is: a frozen map from data to the features in which samples and data are compared.

One forward a batch serves every metric. It runs in float32, outside autocast and without TF32, whatever precision the
model trains in; the networks belong to no module, so no checkpoint and no average of weights holds them.
"""

from __future__ import annotations

import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lit_diffusion.errors import UserError

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


class NetworkExtractor(Extractor):
    """An extractor of images with a network."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.float().eval().requires_grad_(False)

    def to(self, device: torch.device) -> Extractor:
        """Move the network; returns itself."""
        self.network.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.network.parameters()).device

    @classmethod
    def require_fit(cls, shape: tuple[int, ...]) -> None:
        """Refuse all but grey and RGB images."""
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
        """Features of uint8 images ``[B, H, W, C]``."""
        if data.dtype != np.uint8:
            raise ValueError(f"extractors see bytes (to_uint8), not {data.dtype}")
        device = self.device
        with full_precision(device):
            return self._features(torch.from_numpy(np.ascontiguousarray(data.transpose(0, 3, 1, 2))).to(device))

    @abstractmethod
    def _features(self, images: Tensor) -> Features:
        """Of uint8 ``[B, C, H, W]``."""

    def protocol(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Of a network that takes RGB: grey images are repeated."""
        return {**super().protocol(shape), "grey_repeated": shape[0] == 1}


class FidelityExtractor(NetworkExtractor):
    """A network of torch-fidelity, which resizes as TensorFlow 1 did: bilinear, not antialiased."""

    def _features(self, images: Tensor) -> Features:
        # Grey becomes RGB by repetition; the protocol says so.
        found = self.network(images.expand(-1, 3, -1, -1))
        return Features(found[0], found[1] if len(found) > 1 else None)


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
def readable(path: Path) -> Iterator[None]:
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
