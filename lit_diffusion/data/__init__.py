"""Sources of images and points, one file per source."""

from lit_diffusion.data.cache import data_root
from lit_diffusion.data.digits import Digits
from lit_diffusion.data.download import fetch
from lit_diffusion.data.folder import ImageFolder
from lit_diffusion.data.huggingface import HuggingFace
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.data.npz import Npz
from lit_diffusion.data.openmoji import OpenMoji
from lit_diffusion.data.points import Checkerboard, GaussianMixturePoints, Rings, Spiral, SwissRoll
from lit_diffusion.data.source import Source
from lit_diffusion.data.torchvision_sets import CIFAR10, CIFAR100, MNIST, SVHN, CelebA, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "SVHN",
    "CelebA",
    "Checkerboard",
    "Digits",
    "FashionMNIST",
    "GaussianMixturePoints",
    "HuggingFace",
    "ImageFolder",
    "InMemory",
    "Npz",
    "OpenMoji",
    "Rings",
    "Source",
    "Spiral",
    "SwissRoll",
    "data_root",
    "fetch",
]
