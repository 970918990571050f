"""Spacings: where samplers evaluate the network."""

import itertools

import numpy as np
import pytest
import torch
from helpers.laws import wide

from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, cosine_betas, linear_betas
from lit_diffusion.samplers import DDIM, EulerMaruyama, Heun
from lit_diffusion.samplers.times import SPACINGS, timesteps_to_t_min, timesteps_to_zero

FAMILIES = {"to zero": timesteps_to_zero, "to t_min": timesteps_to_t_min}
each_family = pytest.mark.parametrize("times_of", FAMILIES.values(), ids=FAMILIES)
EDM = VE(0.002, 80.0, t_min=1e-9, t_min_sampling=1e-9)
"""All of its noise levels, from 80 to 0.002, are visited."""


def ratios(process, times):
    return (process.sigma(wide(*times)) / process.alpha(wide(*times))).numpy()


@pytest.mark.parametrize(("spacing", "rho"), [("karras", 7.0), ("karras:3", 3.0), ("karras:1", 1.0)])
def test_karras_times_are_equation_5_of_karras_et_al(spacing, rho):
    i = np.arange(18) / 17
    expected = (80.0 ** (1 / rho) + i * (0.002 ** (1 / rho) - 80.0 ** (1 / rho))) ** rho
    assert ratios(EDM, timesteps_to_zero(EDM, 18, spacing)) == pytest.approx(expected, rel=1e-6)
    assert timesteps_to_t_min(EDM, 17, spacing) == timesteps_to_zero(EDM, 18, spacing)


@pytest.mark.parametrize("process", [VE(0.01, 50.0), VP(), VP(t_min_sampling=0.1)], ids=["VE", "VP", "late"])
@each_family
def test_steps_are_equal_in_the_log_snr(process, times_of):
    steps = -np.diff(process.log_snr(wide(*times_of(process, 9, "log_snr"))))
    assert steps == pytest.approx(steps[0], rel=1e-6)
    assert steps[0] < 0


def test_quadratic_times_are_equal_steps_in_the_root():
    process = VP(t_min_sampling=0.04)
    root = np.sqrt((np.array(timesteps_to_t_min(process, 5, "quadratic")) - 0.04) / 0.96)
    assert root == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-9)


@pytest.mark.parametrize("spacing", [*SPACINGS, "karras:2"])
@pytest.mark.parametrize("process", [VP(), VE(0.01, 50.0), Betas(cosine_betas(12)), Betas(linear_betas(1000))])
@each_family
def test_times_fall_from_the_end_of_time_by_as_many_as_are_asked_for(process, times_of, spacing):
    for steps in (2, 5, 10, 11, None):
        times = times_of(process, steps, spacing)
        most = 1000 + (times_of is timesteps_to_t_min)
        assert len(times) == (
            most
            if steps is None and process.num_timesteps is None
            else process.num_timesteps
            if steps is None
            else steps + (times_of is timesteps_to_t_min)
        )
        assert times[0] == process.t_max
        assert all(s < t for t, s in itertools.pairwise(times))
        assert times[-1] >= process.t_min_sampling * (1 - 1e-9)
        if times_of is timesteps_to_t_min or spacing not in ("uniform", "quadratic"):
            assert times[-1] == pytest.approx(process.t_min_sampling)
        if process.num_timesteps is not None:
            assert np.array(times) * process.num_timesteps == pytest.approx(
                np.round(np.array(times) * process.num_timesteps)
            )


@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_one_step_goes_the_whole_way(spacing):
    assert timesteps_to_zero(VP(), 1, spacing) == [1.0]
    assert timesteps_to_t_min(VP(), 1, spacing) == [1.0, VP().t_min_sampling]


def test_times_may_be_given():
    grid = Betas(linear_betas(8))
    for process, times in ((VP(), [1.0, 0.7, 0.01]), (grid, [1.0, 0.625, 0.125])):
        assert timesteps_to_zero(process, None, times) == times == timesteps_to_t_min(process, None, times)
    assert [(move.t, move.s) for move in DDIM(2, spacing=[1.0, 0.3]).plan(VP())] == [(1.0, 0.3), (0.3, 0.0)]
    assert [(move.t, move.s) for move in Heun(spacing=[1.0, 0.3, 0.1]).plan(VP())] == [(1.0, 0.3), (0.3, 0.1)]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: DDIM(spacing="karas"), ["spacing is 'karas'", "did you mean 'karras'"]),
        (lambda: DDIM(spacing="karras:0"), ["spacing is 'karras:0'", "rho", "positive"]),
        (lambda: DDIM(spacing="karras:seven"), ["spacing is 'karras:seven'", "karras:7"]),
        (lambda: DDIM(spacing="uniform:2"), ["only karras has a number"]),
        (lambda: DDIM(None, spacing=[1.0, 0.2, 0.2]), ["spacing is [1.0, 0.2, 0.2]", "falls"]),
        (lambda: DDIM(3, spacing=[1.0, 0.2]), ["the times of 2 steps and steps is 3"]),
        (lambda: EulerMaruyama(2, spacing=[1.0, 0.2]), ["the times of 1 steps and steps is 2"]),
        (lambda: EulerMaruyama(spacing=[1.0]), ["spacing is [1.0]"]),
        (lambda: timesteps_to_zero(VP(), None, [0.9, 0.2]), ["begins at time 0.9", "start at t_max, 1"]),
        (lambda: timesteps_to_zero(VP(), None, [1.0, 1e-7]), ["spacing is 1e-07", "is trained on times from"]),
        (lambda: timesteps_to_zero(Betas(linear_betas(8)), None, [1.0, 0.3]), ["the time 0.3", "i / 8"]),
        (lambda: timesteps_to_zero(VE(1.0, 1.0, num_timesteps=1), None), ["one noise level", "choose langevin"]),
    ],
)
def test_what_is_no_spacing_is_refused_in_one_line(ask, words):
    with pytest.raises(UserError) as caught:
        ask()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_spacing_can_be_configured(tmp_path):
    from lit_diffusion.commands.options import choose_sampler

    for given, spacing in (("karras:5", "karras:5"), ("[1.0, 0.5, 0.1]", [1.0, 0.5, 0.1]), ("log_snr", "log_snr")):
        sampler = choose_sampler(DDIM(), "heun", {"spacing": given})
        assert sampler.spacing == spacing
    assert torch.tensor(timesteps_to_t_min(VP(), None, [1.0, 0.5, 0.1])).tolist() == pytest.approx([1.0, 0.5, 0.1])
