"""The tied autoencoder is Vincent's formula."""

from __future__ import annotations

import pytest
import torch

from lit_diffusion.backbones import TiedAutoencoder
from lit_diffusion.errors import UserError


def network(shape, hidden=7):
    torch.manual_seed(0)
    made = TiedAutoencoder(shape, hidden)
    for p in made.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return made


def test_it_is_the_formula_with_one_matrix():
    made, x = network((5,)), torch.randn(3, 5)
    assert [name for name, _ in made.named_parameters()] == ["weight", "hidden_bias", "bias"]
    for row, out in zip(x, made(x, torch.zeros(3)), strict=True):
        hidden = 1 / (1 + torch.exp(-(made.weight @ row + made.hidden_bias)))
        assert torch.allclose(out, made.weight.T @ hidden + made.bias, atol=1e-6)


def test_images_keep_their_shape():
    made, x = network((3, 4, 2)), torch.randn(5, 3, 4, 2)
    assert made(x, torch.zeros(5)).shape == x.shape
    flat = network((24,))
    flat.load_state_dict(made.state_dict())
    assert torch.equal(made(x, torch.zeros(5)).flatten(1), flat(x.flatten(1), torch.zeros(5)))


def test_neither_level_nor_condition_is_looked_at():
    from lit_diffusion.conditions import Condition

    made, x = network((5,)), torch.randn(3, 5)
    first = made(x, torch.zeros(3))
    assert torch.equal(first, made(x, torch.ones(3), Condition(label=torch.arange(3))))


def test_its_jacobian_is_symmetric():
    """So that its score is a gradient: W^T diag(s') W."""
    made, x = network((5,)), torch.randn(5)
    jacobian = torch.autograd.functional.jacobian(lambda y: made(y[None], torch.zeros(1))[0], x)
    assert torch.allclose(jacobian, jacobian.T, atol=1e-6)
    assert float(torch.linalg.eigvalsh(jacobian).min()) > -1e-6


def test_the_shape_must_be_known():
    with pytest.raises(UserError, match="TiedAutoencoder: data_shape is 'auto'"):
        TiedAutoencoder()
