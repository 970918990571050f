import pytest
import torch

from lit_diffusion.backbones import MLP
from lit_diffusion.conditions import NO_LABEL, Condition


def everything(rows=4):
    generator = torch.Generator().manual_seed(0)
    return Condition(
        label=torch.arange(rows),
        vector=torch.randn(rows, 3, generator=generator),
        tokens=torch.randn(rows, 5, 2, generator=generator),
        image=torch.randn(rows, 1, 4, 4, generator=generator),
        mask=torch.ones(rows, 1, 4, 4, dtype=torch.bool),
    )


def test_rows_and_devices_are_those_of_every_field():
    cond = everything()
    assert list(cond.given()) == ["label", "vector", "tokens", "image", "mask"]
    for rows in (slice(1, 3), torch.tensor([2, 0, 2])):
        for name, value in cond[rows].given().items():
            assert torch.equal(value, cond.given()[name][rows]), name
    moved = cond.to("meta")
    assert {value.device.type for value in moved.given().values()} == {"meta"}
    label = Condition(label=torch.arange(3))
    assert list(label[:2].given()) == ["label"]
    assert Condition().map(torch.neg) == Condition()


def test_map_reaches_what_is_given_and_keeps_the_names():
    doubled = everything().map(lambda value: 2 * value)
    for name, value in everything().given().items():
        assert torch.equal(doubled.given()[name], 2 * value), name


def test_dropped_rows_are_unconditional_and_the_others_are_left():
    rows = torch.tensor([True, False, False, True])
    cond, kept = everything(), everything().dropped(rows)
    assert kept.label.tolist() == [NO_LABEL, 1, 2, NO_LABEL]
    for name, value in kept.given().items():
        assert value.dtype == cond.given()[name].dtype
        assert torch.equal(value[~rows], cond.given()[name][~rows])
        assert name == "label" or not bool(value[rows].any())


def test_gradients_flow_through_the_vector_of_the_rows_that_are_kept():
    vector = torch.randn(3, 2, requires_grad=True)
    cond = Condition(vector=vector).dropped(torch.tensor([False, True, False]))[:2].map(lambda value: 3 * value)
    cond.vector.sum().backward()
    assert vector.grad.tolist() == [[3.0, 3.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("labels", [[NO_LABEL, NO_LABEL], [5, 5]])
def test_a_network_reads_a_dropped_label_as_none(labels):
    torch.manual_seed(0)
    network = MLP((2,), 16, num_classes=5)
    x, c_noise = torch.randn(2, 2), torch.rand(2)
    assert torch.equal(network(x, c_noise, Condition(label=torch.tensor(labels))), network(x, c_noise))
