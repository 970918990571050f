"""The interface of an extractor: a frozen map from data to the features in which samples and data are compared.

One forward pass a batch serves every metric. It runs in float32, outside autocast and without TF32, whatever precision
the model trains in; the networks belong to no module, so that no checkpoint and no average of weights contains them.
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
    """Compute in full float32, without autocast, TF32 and gradients."""
    matmul = torch.get_float32_matmul_precision()
    if matmul != "highest":  # Setting the same value again would make compiled networks compile again.
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
    """An extractor's output for a batch.

    Attributes:
        features: float32 ``[B, D]``.
        logits: a classifier's logits, float32 ``[B, K]``; None where the extractor is not a classifier.
    """

    features: Tensor
    logits: Tensor | None = None


class Extractor(ABC):
    """A frozen map from data to features.

    Attributes:
        name: name of the extractor, part of the metric values' names.
        model: name of the network, for the protocol.
        dimension: D, the dimension of the features.
        has_logits: true for a classifier, which allows an Inception Score.
        resize: the method of resizing images, for the protocol.
        sha256: checksum of its weights.
    """

    name: ExtractorName
    model: str
    dimension: int
    has_logits = False
    resize = "none"
    sha256 = ""

    def to(self, device: torch.device) -> Extractor:
        """Move the extractor to a device; return the extractor."""
        return self

    @property
    def device(self) -> torch.device:
        """The device of the computation."""
        return torch.device("cpu")

    @classmethod
    @abstractmethod
    def require_fit(cls, shape: tuple[int, ...]) -> None:
        """Refuse data that do not fit this extractor.

        Args:
            shape: shape of one datum, ``(C, H, W)`` or ``(D,)``.

        Raises:
            UserError: naming the data that fit.
        """

    @abstractmethod
    def __call__(self, data: np.ndarray) -> Features:
        """Features of uint8 images ``[B, H, W, C]``, or of points ``[B, D]``, on its device."""

    def protocol(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The protocol's entries about the extractor, for data of this shape."""
        return {"extractor": self.model, "extractor_sha256": self.sha256, "resize": self.resize}


class NetworkExtractor(Extractor):
    """An extractor of images by a network.

    Args:
        network: the network, which is frozen here.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.float().eval().requires_grad_(False)

    def to(self, device: torch.device) -> Extractor:
        """Move the network to a device; return the extractor."""
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
                f"extractor {cls.name} takes images, the data have shape {list(shape)}; for points choose "
                f"extractor points"
            )
        if shape[0] not in (1, 3):
            raise UserError(
                f"extractor {cls.name} takes grey or RGB images, the data have shape {list(shape)}, and no other "
                f"extractor takes {shape[0]} channels: for a run without metrics of samples set eval.metrics []"
            )

    def __call__(self, data: np.ndarray) -> Features:
        """Features of uint8 images ``[B, H, W, C]``."""
        if data.dtype != np.uint8:
            raise ValueError(f"extractors take bytes (to_uint8), not {data.dtype}")
        device = self.device
        with full_precision(device):
            return self._features(torch.from_numpy(np.ascontiguousarray(data.transpose(0, 3, 1, 2))).to(device))

    @abstractmethod
    def _features(self, images: Tensor) -> Features:
        """Features of uint8 images ``[B, C, H, W]``."""

    def protocol(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The protocol's entries, with ``grey_repeated`` where grey images are repeated to RGB."""
        return {**super().protocol(shape), "grey_repeated": shape[0] == 1}


class FidelityExtractor(NetworkExtractor):
    """A network of torch-fidelity, which resizes as TensorFlow 1 did: bilinear, not antialiased."""

    def _features(self, images: Tensor) -> Features:
        # Grey becomes RGB by repetition, which the protocol records.
        found = self.network(images.expand(-1, 3, -1, -1))
        return Features(found[0], found[1] if len(found) > 1 else None)


def require_plain_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, read without unpickling code.

    torch-fidelity would run code in a file, so it only receives files that passed here.

    Raises:
        UserError: if the file contains anything but tensors, or is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than weights and is not opened: fetch the published file") from error
    except Exception as error:  # A damaged file can make the reader raise anything.
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"cannot read the weights {path}: truncated, or none ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is no table of weights")
    return state


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an unreadable file, or one of another network, into a UserError of one line."""
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
