"""The shared U-Net: DDPM's, DDPM++'s and NCSN++'s by configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_diffusion.backbones.base import Backbone, resolved_shape
from lit_diffusion.backbones.embeddings import NoiseEmbedding, TimeEmbedding
from lit_diffusion.backbones.layers import (
    Attention,
    ConditionalInstanceNorm,
    GroupNorm,
    Pointwise,
    add_residual,
    conv3x3,
    dense,
)
from lit_diffusion.backbones.resampling import Resampling, downsampling, strided_conv, upsampling
from lit_diffusion.conditions import Condition
from lit_diffusion.errors import UserError, require_choice

Normalization = Literal["group", "conditional_instance"]
DecoderAttention = Literal["every", "last"]


class ResidualBlock(nn.Module):
    r"""Two convolutions beside a skip connection, conditioned on the noise embedding e in between::

        h = conv_1(R silu(norm_1(x)))
        h = norm_2(h + W e)                         or, with scale_shift,  norm_2(h) (1 + W_s e) + W_b e
        y = skip(R x) + conv_2(dropout(silu(h)))    divided by sqrt(2) with rescale

    R is the identity, or halves or doubles height and width (Brock et al. 2019, https://arxiv.org/abs/1809.11096);
    ``skip`` is a linear map of the channels where their number or the size changes, else the identity.

    Args:
        inputs: channels of x.
        outputs: channels of y.
        norm: makes a normalization for a number of channels; its ``forward`` takes the features and the noise level's
            index.
        embedding: the length of e, or None without embedding.
        dropout: the dropout probability.
        rescale: if true, divide the sum by sqrt(2).
        scale_shift: if true, e scales and shifts the normalized features (Nichol and Dhariwal 2021,
            https://arxiv.org/abs/2102.09672) instead of being added.
        zero_init: if true, start with ``conv_2 = 0``.
        resample: R, or None for the identity.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        norm: Callable[[int], nn.Module],
        embedding: int | None,
        dropout: float = 0.0,
        rescale: bool = False,
        scale_shift: bool = False,
        zero_init: bool = True,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.rescale = rescale
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = norm(inputs)
        self.conv1 = conv3x3(inputs, outputs)
        self.project = None if embedding is None else dense(embedding, 2 * outputs if scale_shift else outputs)
        self.norm2 = norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(outputs, outputs, zero=zero_init)
        self.skip = Pointwise(inputs, outputs) if inputs != outputs or resample is not None else None

    def forward(self, x: Tensor, embedding: Tensor | None = None, level: Tensor | None = None) -> Tensor:
        """Map ``x`` ``[B, C, H, W]``, ``embedding`` ``[B, E]`` and ``level`` int64 ``[B]`` to ``[B, C', H', W']``."""
        h = F.silu(self.norm1(x, level))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        modulation = None if self.project is None else self.project(embedding)[:, :, None, None]
        if modulation is None:
            h = self.norm2(h, level)
        elif self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h, level), 1.0 + scale)
        else:
            h = self.norm2(h + modulation, level)
        h = self.conv2(self.dropout(F.silu(h)))
        return add_residual(x if self.skip is None else self.skip(x), h, self.rescale)


class Stage(nn.Module):
    """A residual block with optional attention after it."""

    def __init__(self, block: ResidualBlock, attention: Attention | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor | None, level: Tensor | None) -> Tensor:
        """Apply the block and the attention; arguments as for :meth:`ResidualBlock.forward`."""
        x = self.block(x, embedding, level)
        return x if self.attention is None else self.attention(x, level)


class Resample(nn.Module):
    """Downsampling or upsampling between the residual blocks, without the noise embedding."""

    def __init__(self, resample: nn.Module) -> None:
        super().__init__()
        self.resample = resample

    def forward(self, x: Tensor, embedding: Tensor | None, level: Tensor | None) -> Tensor:
        """Resample ``x``; the other arguments of :meth:`ResidualBlock.forward` are ignored."""
        return self.resample(x)


class UNet(Backbone):
    r"""A U-Net ``F(x, c_noise, cond)`` of residual blocks: ``[B, C, H, W]`` to ``[B, out_channels, H, W]``.

    (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597; Ho et al. 2020, https://arxiv.org/abs/2006.11239; Song
    et al. 2021, https://arxiv.org/abs/2011.13456.) The encoder has ``blocks`` residual blocks at each resolution and
    halves height and width in between; the decoder has ``blocks + 1`` and doubles them, each block with one of the
    encoder's features concatenated to its input.

    ============================  ==============  ================  ==================
    the papers' networks          DDPM            DDPM++            NCSN++
    ============================  ==============  ================  ==================
    ``blocks`` (deep)             2               4 (8)             4 (8)
    ``time_embedding``            positional      positional        fourier
    ``resampling``                conv            nearest           fir
    ``resample_in_block``         false           true              true
    ``rescale_residual``          false           true              true
    ``decoder_attention``         every           last              last
    ``progressive_input``         none            none              residual
    ============================  ==============  ================  ==================

    All with 128 channels, ``mult`` [1, 2, 2, 2] and attention at 16 on CIFAR-10 (Ho et al. 2020, appendix B; Song et
    al. 2021, appendix H). The convolutions that close a residual branch, and the last one, start at zero
    (``zero_init``): the untrained network's output is 0.

    Args:
        data_shape: (C, H, W), H and W divisible by two to the power ``len(mult) - 1``; ``auto``: the data source's.
        channels: base number of channels; the noise embedding is four times as wide.
        mult: the channels of each resolution, in multiples of ``channels``.
        blocks: residual blocks at each resolution of the encoder.
        attention: the heights of the resolutions with attention.
        middle_attention: if true, attention in the middle, at the lowest resolution.
        decoder_attention: attention after ``every`` block of the decoder, or after the ``last`` of a resolution.
        heads: number of heads of each attention.
        normalization: ``group``; or ``conditional_instance``, for which ``c_noise`` is the noise level's index, an
            integer from 0 to ``num_levels - 1``, see
            :class:`~lit_diffusion.backbones.layers.ConditionalInstanceNorm`.
        num_levels: number of noise levels, for ``conditional_instance``.
        dropout: dropout probability inside the residual blocks.
        time_embedding: features of ``c_noise``:
            ``positional`` (:class:`~lit_diffusion.backbones.embeddings.PositionalFeatures`), ``fourier``
            (:class:`~lit_diffusion.backbones.embeddings.FourierFeatures`), or ``none`` for a network without noise
            level (NCSNv2: Song and Ermon 2020, https://arxiv.org/abs/2006.09011) or with ``conditional_instance``.
        fourier_scale: the Fourier frequencies' standard deviation.
        resampling: kind of downsampling and upsampling, see :mod:`lit_diffusion.backbones.resampling`.
        resample_in_block: if true, resample in residual blocks (Brock et al. 2019, https://arxiv.org/abs/1809.11096)
            instead of between them.
        rescale_residual: if true, divide every sum with a skip connection by sqrt(2).
        progressive_input: ``residual`` adds the downsampled input to the features of each resolution (Karras et al.
            2020, https://arxiv.org/abs/1912.04958).
        scale_shift: if true, the embedding scales and shifts the normalized features (Nichol and Dhariwal 2021,
            https://arxiv.org/abs/2102.09672, "adaptive group normalization") instead of being added.
        num_classes: K; labels are ``0 .. K - 1`` and K means none; null: labels are ignored.
        out_channels: channels of the output; null: C.
        zero_init: if true, start with the output 0.

    Raises:
        UserError: if the shape cannot be halved that often, ``attention`` names a height that does not occur, ``heads``
            does not divide the channels, or a key needs another one that is missing.
    """

    def __init__(
        self,
        data_shape: tuple[int, int, int] | Literal["auto"] = "auto",
        channels: int = 128,
        mult: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        middle_attention: bool = True,
        decoder_attention: DecoderAttention = "every",
        heads: int = 1,
        normalization: Normalization = "group",
        num_levels: int | None = None,
        dropout: float = 0.0,
        time_embedding: TimeEmbedding = "positional",
        fourier_scale: float = 16.0,
        resampling: Resampling = "conv",
        resample_in_block: bool = False,
        rescale_residual: bool = False,
        progressive_input: Literal["none", "residual"] = "none",
        scale_shift: bool = False,
        num_classes: int | None = None,
        out_channels: int | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.data_shape = resolved_shape(data_shape, "UNet")
        require_choice("UNet", "decoder_attention", decoder_attention, get_args(DecoderAttention))
        require_choice("UNet", "normalization", normalization, get_args(Normalization))
        require_choice("UNet", "time_embedding", time_embedding, get_args(TimeEmbedding))
        require_choice("UNet", "resampling", resampling, get_args(Resampling))
        require_choice("UNet", "progressive_input", progressive_input, ("none", "residual"))
        heights = _heights(self.data_shape, len(mult))
        widths = [channels * factor for factor in mult]
        attending = [n for n, height in enumerate(heights) if height in attention]
        for height in attention:
            if height not in heights:
                raise UserError(f"UNet: attention at {height}, but the heights are {heights}; choose among them or []")
        for width in [widths[n] for n in attending] + ([widths[-1]] if middle_attention else []):
            if width % heads:
                raise UserError(f"UNet: heads {heads} does not divide the {width} channels that attend; change either")
        conditional = time_embedding != "none" or num_classes is not None
        if scale_shift and not conditional:
            raise UserError("UNet: scale_shift has nothing to modulate by; set time_embedding or num_classes")
        if resample_in_block and resampling == "conv":
            raise UserError("UNet: resample_in_block with resampling conv; choose resampling nearest or fir")

        norm: Callable[[int], nn.Module] = GroupNorm
        if normalization == "conditional_instance":
            if num_levels is None:
                raise UserError("UNet: normalization conditional_instance needs num_levels, the number of noise levels")
            norm = partial(ConditionalInstanceNorm, num_levels=num_levels)
        block = partial(
            ResidualBlock,
            norm=norm,
            embedding=4 * channels if conditional else None,
            dropout=dropout,
            rescale=rescale_residual,
            scale_shift=scale_shift,
            zero_init=zero_init,
        )

        def stage(inputs: int, outputs: int, attend: bool) -> Stage:
            if not attend:
                return Stage(block(inputs, outputs))
            attention = Attention(outputs, norm(outputs), heads, rescale=rescale_residual, zero_init=zero_init)
            return Stage(block(inputs, outputs), attention)

        def between(width: int, make: Callable[[Resampling, int], nn.Module]) -> nn.Module:
            resample = make(resampling, width)
            return block(width, width, resample=resample) if resample_in_block else Resample(resample)

        self.num_classes = num_classes
        self.out_channels = self.data_shape[0] if out_channels is None else out_channels
        self.rescale = rescale_residual
        self.level_indexed = normalization == "conditional_instance"
        self.embedding: NoiseEmbedding | None = None
        if conditional:
            self.embedding = NoiseEmbedding(channels, 4 * channels, time_embedding, fourier_scale, num_classes)

        width = channels
        self.stem = conv3x3(self.data_shape[0], width)
        skips = [width]
        self.encoder, self.down, self.pyramid = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for n, outputs in enumerate(widths):
            if n > 0:
                self.down.append(between(width, downsampling))
                if progressive_input == "residual":
                    inputs = self.data_shape[0] if n == 1 else widths[n - 2]
                    self.pyramid.append(strided_conv(inputs, width, blur=resampling == "fir"))
                skips.append(width)
            stages = nn.ModuleList()
            for _ in range(blocks):
                stages.append(stage(width, outputs, n in attending))
                width = outputs
                skips.append(width)
            self.encoder.append(stages)

        self.middle = nn.ModuleList([stage(width, width, middle_attention), stage(width, width, False)])

        self.decoder, self.up = nn.ModuleList(), nn.ModuleList()
        for n, outputs in reversed(list(enumerate(widths))):
            if n < len(widths) - 1:
                self.up.append(between(width, upsampling))
            stages = nn.ModuleList()
            for k in range(blocks + 1):
                attend = n in attending and (decoder_attention == "every" or k == blocks)
                stages.append(stage(width + skips.pop(), outputs, attend))
                width = outputs
            self.decoder.append(stages)

        self.head_norm = norm(width)
        self.head = conv3x3(width, self.out_channels, zero=zero_init)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: ``[B, C, H, W]``.
            c_noise: ``[B]`` float32; the noise level's index for ``conditional_instance``.
            cond: the condition; labels are int64 ``[B]`` in ``0 .. K``, where K means none.

        Returns:
            ``[B, out_channels, H, W]``.
        """
        embedding = None if self.embedding is None else self.embedding(c_noise, cond)
        level = c_noise.round().to(torch.int64) if self.level_indexed else None

        h = self.stem(x)
        skips = [h]
        pyramid = x
        for n, stages in enumerate(self.encoder):
            if n > 0:
                h = self.down[n - 1](h, embedding, level)
                if len(self.pyramid) > 0:
                    pyramid = h = add_residual(self.pyramid[n - 1](pyramid), h, self.rescale)
                skips.append(h)
            for stage in cast(nn.ModuleList, stages):
                h = stage(h, embedding, level)
                skips.append(h)

        for stage in self.middle:
            h = stage(h, embedding, level)

        for n, stages in enumerate(self.decoder):
            if n > 0:
                h = self.up[n - 1](h, embedding, level)
            for stage in cast(nn.ModuleList, stages):
                h = stage(torch.cat((h, skips.pop()), dim=1), embedding, level)

        return self.head(F.silu(self.head_norm(h, level)))


def _heights(shape: tuple[int, ...], resolutions: int) -> list[int]:
    """The heights of the resolutions, from full to lowest.

    Raises:
        UserError: if the shape is not an image's or cannot be halved that often.
    """
    if len(shape) != 3 or resolutions < 1:
        raise UserError(
            f"UNet: data_shape {shape} with {resolutions} entries in mult; it needs (C, H, W) and at least 1"
        )
    halvings = resolutions - 1
    if any(side % 2**halvings for side in shape[1:]):
        possible = min((side & -side).bit_length() for side in shape[1:])
        side = next(side for side in shape[1:] if side % 2**halvings)
        raise UserError(
            f"UNet: the side {side} of data_shape {shape} cannot be halved {halvings} times; give mult at most "
            f"{possible} entries, or the images sides that are each a multiple of {2**halvings}"
        )
    return [shape[1] >> n for n in range(resolutions)]
