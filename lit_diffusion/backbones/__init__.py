"""Networks ``F(x, c_noise, cond)``, independent of diffusion."""

from lit_diffusion.backbones.autoencoder import TiedAutoencoder
from lit_diffusion.backbones.base import Backbone
from lit_diffusion.backbones.mlp import MLP
from lit_diffusion.backbones.unet import UNet

__all__ = ["MLP", "Backbone", "TiedAutoencoder", "UNet"]
