r"""The DINOv2 vision transformer as a feature extractor (Oquab et al. 2023, https://arxiv.org/abs/2304.07193).

Images of 224 x 224 in patches of 14; the features are the class token after the last norm. The names of the parameters
are those of the published files. The position embedding was trained on 37 x 37 patches; it is resized as in the
published model: bicubic, not antialiased, by a factor of (16 + 0.1) / 37.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffusion.metrics.extractors.base import Features, NetworkExtractor, readable, require_plain_weights
from lit_diffusion.metrics.weights import find_weights

PATCH = 14
_TRAINED_SIDE = 37


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.ls1 = _Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _MLP(width)
        self.ls2 = _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DINOv2Transformer(nn.Module):
    """A DINOv2 transformer of size S, B or L.

    Args:
        width: width of a token: 384, 768 or 1024.
        depth: number of blocks: 12, 12 or 24.
        heads: number of attention heads; None: width / 64.
    """

    def __init__(self, width: int = 1024, depth: int = 24, heads: int | None = None) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + _TRAINED_SIDE**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # Unused: from pre-training, in the published file.
        self.patch_embed = _PatchEmbedding(width)
        self.blocks = nn.ModuleList(_Block(width, heads or width // 64) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, side: int) -> Tensor:
        """Embeddings of the class token and of ``side x side`` patches: ``[1, 1 + side^2, width]``."""
        if side == _TRAINED_SIDE:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].view(1, _TRAINED_SIDE, _TRAINED_SIDE, -1).permute(0, 3, 1, 2)
        factor = (side + 0.1) / _TRAINED_SIDE
        resized = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", antialias=False)
        return torch.cat((self.pos_embed[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, width]`` of normalized images ``[B, 3, S, S]``, S a multiple of 14."""
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)), dim=1)
        tokens = tokens + self.positions(x.shape[-1] // PATCH)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]


class DINOv2(NetworkExtractor):
    """DINOv2's class token, ViT-L/14: the features of FD-DINOv2.

    Oquab et al. 2023, https://arxiv.org/abs/2304.07193; Stein et al. 2023, https://arxiv.org/abs/2306.04675.

    Args:
        weights_path: path of the weights; None for the fetched ones.

    Raises:
        UserError: for missing or damaged weights.
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
        with readable(path):
            network.load_state_dict(state)
        super().__init__(network)

    def _features(self, images: Tensor) -> Features:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        x = interpolate_bilinear_2d_like_tensorflow1x(
            images.expand(-1, 3, -1, -1).float(), size=(self.side, self.side), align_corners=False
        )
        # ImageNet's mean and standard deviation of each color.
        mean = x.new_tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
        deviation = x.new_tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
        return Features(self.network((x / 255.0 - mean) / deviation))
