import math

import torch
from helpers.tiny import Convolutions, digits_data

from lit_diffusion.conditions import Condition
from lit_diffusion.evaluation.interpolation import interpolate, slerp
from lit_diffusion.methods import DDIM
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers import DDIM as DDIMSampler


def test_slerp_keeps_the_norm_and_turns_evenly():
    a, b = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    for weight in (0.0, 0.25, 0.5, 1.0):
        point = slerp(a, b, weight)
        angle = weight * math.pi / 2
        torch.testing.assert_close(point, torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle), 0.0]]))


def test_slerp_of_gaussian_vectors_stays_gaussian_where_a_straight_line_shrinks():
    noise = SampleNoise(0, torch.arange(64), (1, 16, 16))
    a, b = noise.normal(), noise.normal()
    assert abs(float(slerp(a, b, 0.5).var()) - 1.0) < 0.05
    assert float((0.5 * (a + b)).var()) < 0.6
    assert slerp(a, b, 0.3).shape == a.shape


def test_parallel_vectors_are_joined_by_a_straight_line():
    a = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(slerp(a, 3.0 * a, 0.5), 2.0 * a)
    assert bool(torch.isfinite(slerp(a, -a, 0.5)).all())


def test_the_ends_are_the_samples_themselves():
    torch.manual_seed(0)
    method = DDIM(Convolutions(), num_timesteps=20, sampler=DDIMSampler(5))
    method.data_spec = digits_data().data_spec
    noise = SampleNoise(0, torch.arange(6), (1, 8, 8))
    both = noise.normal()
    made = interpolate(method, both[:3], both[3:], 4, method.sampler).x
    assert made.shape == (3, 4, 1, 8, 8)
    own = method.generate(torch.arange(6), seed=0).x
    torch.testing.assert_close(made[:, 0], own[:3])
    torch.testing.assert_close(made[:, -1], own[3:])


def test_between_classes_each_point_has_that_of_the_nearer_end():
    torch.manual_seed(0)
    method = DDIM(Convolutions(num_classes=10), num_timesteps=20, sampler=DDIMSampler(5))
    method.data_spec = digits_data().data_spec
    noise = SampleNoise(0, torch.arange(4), (1, 8, 8)).normal()
    told = []
    method.denoiser.backbone.register_forward_hook(lambda module, args, out: told.append(args[2].label.tolist()))
    first, second = Condition(label=torch.tensor([3, 4])), Condition(label=torch.tensor([5, 4]))
    made = interpolate(method, noise[:2], noise[2:], 5, method.sampler, first, second).x
    assert told[::5] == [[3, 4], [3, 4], [3, 4], [5, 4], [5, 4]]
    both = Condition(label=torch.tensor([3, 4, 5, 4]))
    ends = method.generate(torch.arange(4), seed=0, cond=both).x
    torch.testing.assert_close(torch.cat((made[:, 0], made[:, -1])), ends)
