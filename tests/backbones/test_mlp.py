from __future__ import annotations

import pytest
import torch

from lit_diffusion.backbones import MLP
from lit_diffusion.conditions import Condition
from lit_diffusion.errors import UserError


def a_batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 2), torch.linspace(0.0, 4.0, 5)


@pytest.mark.parametrize("time_embedding", ["positional", "fourier", "none"])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_shapes_gradients_and_samples_alone(time_embedding, num_classes):
    torch.manual_seed(0)
    network = MLP((2,), width=16, time_embedding=time_embedding, num_classes=num_classes)
    x, c_noise = a_batch()
    label = torch.tensor([0, 1, 2, 3, 0])
    out = network(x, c_noise, Condition(label=label))
    assert out.shape == (5, 2)
    torch.testing.assert_close(network(x[3:], c_noise[3:], Condition(label=label[3:])), out[3:])
    out.square().mean().backward()
    for name, p in network.named_parameters():
        assert p.grad.abs().max() > 0.0, name
    assert torch.equal(network(x, c_noise), network(x, c_noise + 1.0)) == (time_embedding == "none")


def test_labels_and_the_null_class():
    torch.manual_seed(0)
    network = MLP((2,), width=16, num_classes=3)
    x, c_noise = a_batch()
    nothing = network(x, c_noise)
    assert torch.equal(nothing, network(x, c_noise, Condition(label=torch.full((5,), 3))))
    assert (nothing - network(x, c_noise, Condition(label=torch.zeros(5, dtype=torch.int64)))).abs().min() > 1e-4


@pytest.mark.parametrize("activation", ["silu", "softplus", "tanh"])
def test_second_derivatives(activation):
    torch.manual_seed(0)
    network = MLP((2,), width=8, depth=2, activation=activation, out_channels=1).double()
    x, c_noise = a_batch()
    x, c_noise = x.double().requires_grad_(), c_noise.double()
    assert network(x, c_noise).shape == (5, 1)
    assert torch.autograd.gradgradcheck(lambda x: network(x, c_noise), x)
    (gradient,) = torch.autograd.grad(network(x, c_noise).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    # The derivative of an energy's gradient does not see the energy's constant.
    missing = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0.0]
    assert missing == ["head.bias"]


def test_compiles_without_a_graph_break():
    torch.manual_seed(0)
    network = MLP((2,), width=16, time_embedding="fourier", num_classes=3)
    x, c_noise = a_batch()
    expected = network(x, c_noise)
    network.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(network(x, c_noise), expected)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data_shape": "auto"}, ["MLP", "auto"]),
        ({"data_shape": (1, 8, 8)}, ["(1, 8, 8)", "UNet"]),
        ({"activation": "relu"}, ["activation", "relu", "softplus"]),
        ({"time_embedding": "learned"}, ["time_embedding", "learned", "fourier"]),
        ({"width": 15}, ["15", "even"]),
    ],
)
def test_mistakes_get_one_line(keys, words):
    with pytest.raises(UserError) as error:
        MLP(**{"data_shape": (2,), **keys})
    assert all(word in str(error.value) for word in words), str(error.value)
