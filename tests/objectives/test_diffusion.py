"""The simple loss, the bound and their hybrid, and the law of the levels that learns from the losses."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lit_diffusion.data_spec import GreyLevels
from lit_diffusion.denoisers import PARAMETRIZATIONS, Denoiser, InterpolatedVariance, Prediction
from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.errors import UserError
from lit_diffusion.objectives import DiffusionObjective, SecondMoments
from lit_diffusion.processes import Betas, cosine_betas, expand_like
from lit_diffusion.randomness import keyed_normal, keyed_uniform
from lit_diffusion.reverse import ReverseChain, bound_term

T = 5
BETAS = np.linspace(0.05, 0.6, T)
GREY = GreyLevels(-1.0, 1.0, 2.0 / 16)


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


class Told(Denoiser):
    """What is made of a raw output ``raw(x_t, t)`` and a share ``share(x_t, t)`` of the variance."""

    def __init__(self, raw, share=None, parametrization="eps", betas=BETAS):
        super().__init__()
        self.process = Betas(torch.as_tensor(betas))
        self.raw, self.share, self.parametrization = raw, share, parametrization
        self.learned_variance = share is not None

    def forward(self, x_t, t, cond=None, began=None):
        level = self.process.coefficients(t)
        u, v = PARAMETRIZATIONS[self.parametrization](level, self.process, 0.5)
        variance = None if self.share is None else InterpolatedVariance(self.share(x_t, t))
        return Prediction(x_t, self.raw(x_t, t), level, u, v, reverse_log_variance=variance)


def images(count, pixels=4):
    """Grey levels in [-1, 1] and noise, float64."""
    index = torch.arange(count)
    grey = (keyed_uniform(1, "grey", index, (1, 2, pixels // 2), dtype=torch.float64) * 17).floor()
    return grey / 8 - 1.0, keyed_normal(1, "eps", index, (1, 2, pixels // 2), dtype=torch.float64)


def levels_of(count, level=None):
    return torch.arange(count) % T if level is None else torch.full((count,), level)


def times_of(count, level=None):
    return (levels_of(count, level) + 1).double() / T


def wavy(x, t):
    return torch.sin(3 * x) + 2 * expand_like(t, x) * x.flip(-1)


def narrow(x, t):
    return 0.4 + 0.3 * torch.cos(x + expand_like(t, x))


# ---- the losses --------------------------------------------------------------------------------------------------


def target(parametrization, x0, eps, level):
    """What the network should say at level 0 .. T - 1, from DDPM's tables."""
    abar = np.cumprod(1 - BETAS)
    before = np.concatenate(([1.0], abar[:-1]))[level]
    beta, abar = BETAS[level], abar[level]
    x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
    if parametrization == "mean":
        return (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - abar)
    return {"eps": eps, "score": -eps, "x0": x0, "v": math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0}[parametrization]


@pytest.mark.parametrize("parametrization", ["eps", "score", "x0", "v", "mean"])
def test_the_simple_loss_is_the_mean_square_of_the_networks_own_error(parametrization):
    x0, eps = images(3)
    denoiser, objective = Told(wavy, parametrization=parametrization), DiffusionObjective(T, "simple", "beta")
    for level in range(T):
        loss = objective.at(denoiser, x0, times_of(3, level), eps, None, GREY)
        t = torch.full((3,), (level + 1) / T, dtype=torch.float64)
        raw = wavy(denoiser.process.perturb(x0, t, eps), t)
        expected = (raw - target(parametrization, x0, eps, level)).flatten(1).square().mean(1)
        torch.testing.assert_close(loss.per_sample, expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(loss.t, t)
        assert torch.equal(loss.shown, loss.per_sample)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "learned"])
def test_the_bound_is_the_sum_over_all_levels_in_bits_per_dimension(variance):
    x0, eps = images(3)
    denoiser, objective = Told(wavy, narrow), DiffusionObjective(T, "bound", variance)
    total, mean = torch.zeros(3).double(), torch.zeros(3).double()
    for level in range(T):
        t = torch.full((3,), (level + 1) / T, dtype=torch.float64)
        prediction = denoiser(denoiser.process.perturb(x0, t, eps), t)
        s = torch.full((3,), level / T, dtype=torch.float64)
        total += bound_term(prediction, denoiser, x0, s, ReverseChain(variance), GREY)
        mean += objective.at(denoiser, x0, times_of(3, level), eps, None, GREY).per_sample / T
    torch.testing.assert_close(mean, total / (4 * math.log(2)), rtol=1e-12, atol=0)
    assert bool((total > 0).all())


@pytest.mark.parametrize("loss", ["simple", "bound", "hybrid"])
@pytest.mark.parametrize("time_law", ["levels", "second_moment"])
def test_a_drawn_level_gives_all_of_them_on_average(loss, time_law):
    """One image at many numbers of the run: the mean of its losses is the one over all levels and noises."""
    count = 20_000
    x0 = images(1)[0].expand(count, -1, -1, -1)
    denoiser, objective = (
        Told(wavy, narrow),
        DiffusionObjective(T, loss, "learned" if loss != "simple" else "beta", time_law),
    )
    if time_law == "second_moment":
        objective.time_law.update(levels_of(10 * T), wide(1.0, 3.0, 2.0, 0.5, 7.0).repeat(10))
    drawn = objective(denoiser, x0, 3, torch.arange(count), None, GREY)
    eps = keyed_normal(9, "others", torch.arange(count), (1, 2, 2), dtype=torch.float64)
    everything = sum(objective.at(denoiser, x0, times_of(count, k), eps, None, GREY).per_sample for k in range(T)) / T
    error = math.sqrt((drawn.per_sample.var() + everything.var()) / count)
    assert abs(float(drawn.per_sample.mean() - everything.mean())) < 4 * error
    assert error < 0.05 * float(everything.mean())
    # Without the factor that makes up for it, an uneven law shows.
    uneven = abs(float(drawn.shown.mean() - everything.mean())) > 4 * error
    assert uneven == (time_law == "second_moment")


def gradients(loss, x0, eps, share):
    """Of the mean loss over all levels, by the network's guess and by its share of the variance."""
    guess, told = wavy(x0, torch.ones(len(x0))).requires_grad_(), share.clone().requires_grad_()
    objective = DiffusionObjective(T, loss, "learned" if loss != "simple" else "beta")
    value = objective.at(Told(lambda x, t: guess, lambda x, t: told), x0, times_of(len(x0)), eps, None, GREY).per_sample
    found = torch.autograd.grad(value.sum(), (guess, told), allow_unused=True)
    return value.detach(), *found


def test_the_hybrids_bound_moves_the_variance_and_not_the_mean():
    x0, eps = images(2 * T)
    share = narrow(x0, torch.ones(len(x0)))
    simple, by_guess, none = gradients("simple", x0, eps, share)
    bound, bound_by_guess, bound_by_share = gradients("bound", x0, eps, share)
    hybrid, hybrid_by_guess, hybrid_by_share = gradients("hybrid", x0, eps, share)
    assert none is None
    torch.testing.assert_close(hybrid, simple + 0.001 * bound, rtol=1e-12, atol=0)
    assert torch.equal(hybrid_by_guess, by_guess)
    torch.testing.assert_close(hybrid_by_share, 0.001 * bound_by_share, rtol=1e-9, atol=1e-15)
    assert bool((bound_by_guess != 0).all())
    assert bool((bound_by_share != 0).all())


def test_a_learned_variance_finds_the_one_that_the_errors_have():
    """Along the share, the bound is least where ``v = beta~ + (mean - mean_theta)^2``; here all errors are equal."""
    x0, _ = images(400)
    eps = torch.ones_like(x0)  # the network guesses 0: its error in the mean is the same everywhere
    level = 2
    told = torch.zeros((), dtype=torch.float64, requires_grad=True)
    denoiser = Told(lambda x, t: torch.zeros_like(x), lambda x, t: told.expand_as(x))
    objective = DiffusionObjective(T, "bound", "learned")

    def slope(w):
        with torch.no_grad():
            told.fill_(w)
        value = objective.at(denoiser, x0, times_of(400, level), eps, None, GREY).per_sample.mean()
        return float(torch.autograd.grad(value, told)[0])

    abar = np.cumprod(1 - BETAS)
    beta = BETAS[level]
    beta_tilde = beta * (1 - abar[level - 1]) / (1 - abar[level])
    error = beta / math.sqrt(1 - abar[level]) / math.sqrt(1 - beta)
    best = math.log((beta_tilde + error**2) / beta_tilde) / math.log(beta / beta_tilde)
    assert abs(slope(best)) < 1e-9 < -slope(best - 0.1)
    assert slope(best + 0.1) > 1e-9


def test_a_variance_that_nothing_trains_is_refused():
    with pytest.raises(UserError, match="choose hybrid or bound") as caught:
        DiffusionObjective(T, "simple", "learned")
    assert "\n" not in str(caught.value)
    for loss in ("hybrid", "bound"):
        x0, eps = images(2)
        with pytest.raises(UserError, match="has not learned a reverse variance"):
            DiffusionObjective(T, loss, "learned").at(Told(wavy), x0, times_of(2), eps, None, GREY)


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [("loss", "vlb", "bound"), ("variance", "fixed", "beta_tilde"), ("time_law", "uniform", "second_moment")],
)
def test_an_unknown_name_is_refused_with_the_known_ones(key, value, known):
    with pytest.raises(UserError) as caught:
        DiffusionObjective(**{"num_timesteps": T, "loss": "bound", "variance": "beta", key: value})
    assert str(caught.value).startswith(f"{key} is {value!r}")
    assert known in str(caught.value)


# ---- the minimizer -----------------------------------------------------------------------------------------------

DIRECTIONS = {
    "constant": lambda x, t: torch.ones_like(x),
    "shrink": lambda x, t: x,
    "wave": lambda x, t: torch.sin(3 * x),
    "in time": lambda x, t: torch.cos(9 * t)[:, None] * x.flip(1),
}


class Perturbed(Denoiser):
    """The exact denoiser's prediction in another parametrization, and a step away from it in its own output."""

    def __init__(self, distribution, process, parametrization, away, step):
        super().__init__()
        self.exact, self.process = ExactDenoiser(distribution, process), process
        self.parametrization, self.away, self.step = parametrization, away, step

    def forward(self, x_t, t, cond=None, began=None):
        best = self.exact(x_t, t)
        u, v = PARAMETRIZATIONS[self.parametrization](best.coefficients, self.process, 0.5)
        raw = u[:, None] * best.x0 + v[:, None] * best.eps
        by_noise = (v - best.coefficients.sigma / best.coefficients.alpha * u)[
            :, None
        ]  # what a step in eps is in this output
        return replace(best, raw=raw + self.step * by_noise * self.away(x_t, t), u=u, v=v)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("parametrization", ["eps", "x0", "v", "mean"])
@pytest.mark.parametrize(("loss", "variance"), [("simple", "beta"), ("bound", "beta"), ("bound", "beta_tilde")])
def test_no_denoiser_is_better_than_the_exact_one(loss, variance, parametrization, direction):
    """At every level by itself, so none makes up for another; both ways, with the same images and noise."""
    means = torch.tensor([[-1.5, 0.5], [1.0, -1.0], [0.5, 2.0]])
    distribution = GaussianMixture(torch.tensor([0.2, 0.5, 0.3]), means, 0.2 * torch.eye(2).repeat(3, 1, 1))
    process, count = Betas(cosine_betas(T, beta_max=0.9)), 4000
    index = torch.arange(count)
    x0 = distribution.sample(keyed_normal(0, "x", index, (2,)), keyed_uniform(0, "c", index))
    eps = keyed_normal(0, "e", index, (2,), dtype=torch.float64)
    objective = DiffusionObjective(T, loss, variance)

    def losses(step):
        denoiser = Perturbed(distribution, process, parametrization, DIRECTIONS[direction], step)
        at = [objective.at(denoiser, x0, times_of(count, k), eps).per_sample.mean() for k in range(T)]
        return torch.stack(at)

    best, forth, back = losses(0.0), losses(0.4), losses(-0.4)
    assert bool((forth > best).all())
    assert bool((back > best).all())
    # Half the difference is the slope at the minimum: nothing but the chance of the draw.
    curvature = (forth + back) / 2 - best
    assert bool(((forth - back).abs() / 2 < 0.5 * curvature).all())


# ---- the law of the levels ---------------------------------------------------------------------------------------


def filled(levels=4, remembered=10, seed=0):
    """Losses of all levels, each of another size: ``[levels, remembered]``, and what remembers them."""
    sizes = torch.tensor([0.1, 5.0, 1.0, 0.02], dtype=torch.float64)[:levels]
    losses = sizes[:, None] * (0.5 + torch.rand(levels, remembered, generator=torch.Generator().manual_seed(seed)))
    moments = SecondMoments(levels)
    moments.update(torch.arange(levels).repeat(remembered), losses.T.flatten())
    return losses, moments


def drawn_levels(moments, u):
    """The levels that it draws, and the factors that make up for it."""
    process = Betas(torch.full((len(moments.counts),), 0.1))
    t, density = moments.draw(u, process)
    return process.level_index(t), 1.0 / density


def test_it_is_uniform_until_every_level_has_ten_losses():
    moments = SecondMoments(3)
    for _ in range(10):
        assert moments.probabilities().tolist() == pytest.approx([1 / 3] * 3)
        moments.update(torch.tensor([0, 1]), torch.tensor([4.0, 1.0]))
    moments.update(torch.tensor([0] * 7 + [2] * 9), torch.full((16,), 2.0))
    assert moments.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    index, weight = drawn_levels(moments, torch.tensor([0.1, 0.5, 0.9]))
    assert (index.tolist(), weight.tolist()) == ([0, 1, 2], pytest.approx([1.0] * 3))
    moments.update(torch.tensor([2]), torch.tensor([2.0]))
    assert moments.probabilities().tolist() != pytest.approx([1 / 3] * 3, rel=0.1)


def test_it_is_the_root_of_the_second_moment_with_a_little_of_the_uniform():
    losses, moments = filled()
    root = losses.square().mean(1).sqrt()
    torch.testing.assert_close(moments.probabilities(), 0.999 * root / root.sum() + 0.001 / 4, rtol=1e-12, atol=0)
    assert float(moments.probabilities().sum()) == pytest.approx(1.0, abs=1e-12)


def test_it_forgets_all_but_the_last_ten():
    losses, moments = filled()
    later = wide(3.0, 2.5, 9.0)
    moments.update(torch.tensor([1, 1, 3, 1, 3]), wide(3.0, 2.5, 0.7, 9.0, 0.1))
    kept = {
        0: losses[0],
        1: torch.cat((losses[1, 3:], later)),
        2: losses[2],
        3: torch.cat((losses[3, 2:], wide(0.7, 0.1))),
    }
    root = torch.stack([kept[k].square().mean().sqrt() for k in range(4)])
    torch.testing.assert_close(moments.probabilities(), 0.999 * root / root.sum() + 0.001 / 4, rtol=1e-12, atol=0)
    # A hundred at once: the last ten in their order.
    moments.update(torch.zeros(100, dtype=torch.int64), torch.arange(100.0))
    assert sorted(moments.history[0].tolist()) == list(range(90, 100))


def test_levels_are_drawn_as_often_as_it_says():
    _, moments = filled()
    count = 100_000
    index, weight = drawn_levels(moments, keyed_uniform(0, "u", torch.arange(count)))
    p = moments.probabilities()
    counts = torch.bincount(index, minlength=4).numpy()
    assert stats.chisquare(counts, (p * count).numpy()).pvalue > 0.01
    assert counts.min() > 0
    torch.testing.assert_close(weight, (1.0 / (4 * p))[index])


def test_its_weights_make_up_for_it_exactly():
    """Whatever is averaged: over a fine comb of u the weighted draws are the plain mean over the levels."""
    _, moments = filled()
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    index, weight = drawn_levels(moments, u)
    values = wide(1.0, -7.0, 100.0, 3.0)
    assert float((weight * values[index]).mean()) == pytest.approx(float(values.mean()), rel=1e-3)


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 1.0 - 2.0**-24])
def test_the_ends_of_the_draw_are_levels(u):
    for moments in (SecondMoments(1000), filled()[1]):
        (index,), (weight,) = drawn_levels(moments, torch.tensor([u]))
        assert int(index) == (0 if u < 0.5 else len(moments.counts) - 1)
        assert math.isfinite(weight)


def test_levels_whose_losses_are_all_0_are_drawn_still():
    moments = SecondMoments(3)
    moments.update(torch.arange(3).repeat(10), wide(1.0, 0.0, 2.0).repeat(10))
    p = moments.probabilities()
    assert float(p[1]) == pytest.approx(0.001 / 3)
    assert float(p.sum()) == pytest.approx(1.0)


def test_what_it_remembers_is_in_the_state():
    _, moments = filled()
    moments.update(torch.tensor([2, 2]), torch.tensor([8.0, 9.0]))
    copy = SecondMoments(4)
    copy.load_state_dict(moments.state_dict())
    assert torch.equal(copy.probabilities(), moments.probabilities())
    for each in (moments, copy):
        each.update(torch.tensor([2, 0]), torch.tensor([1.0, 50.0]))  # the oldest goes first in both
    assert torch.equal(copy.history, moments.history)
    objective = DiffusionObjective(4, "bound", "beta", "second_moment")
    assert set(objective.state_dict()) == {"time_law.history", "time_law.counts"}
    assert not DiffusionObjective(4, "bound", "beta").state_dict()


def test_it_receives_the_losses_by_their_times():
    """Every level finds its own, also where ``i / levels * levels`` falls a rounding short of i, as 1/49 does."""
    for count in (7, 49, 1000):
        objective = DiffusionObjective(count, "bound", "beta", "second_moment")
        process = Betas(torch.full((count,), 0.1))
        objective.time_law.learn(process.grid(), torch.arange(count).double())
        assert objective.time_law.history[:, 0].tolist() == list(range(count))
        assert objective.time_law.counts.tolist() == [1] * count
    DiffusionObjective(7, "bound", "beta").time_law.learn(process.grid(), torch.zeros(count))  # which learns nothing


def test_it_receives_the_loss_of_the_timestep_without_its_weight():
    x0, _ = images(64)
    objective = DiffusionObjective(T, "simple", "beta", "second_moment")
    objective.time_law.update(levels_of(10 * T), wide(1.0, 3.0, 2.0, 0.5, 7.0).repeat(10))
    loss = objective(Told(wavy), x0, 0, torch.arange(64), None, GREY)
    level = (loss.t * T).round().long() - 1
    weight = (1.0 / (T * objective.time_law.probabilities()))[level]
    torch.testing.assert_close(loss.per_sample, loss.shown * weight, rtol=1e-12, atol=0)
    assert len(set(level.tolist())) == T


# ---- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_law", ["levels", "second_moment"])
def test_the_loss_of_an_image_is_the_same_in_any_batch(time_law):
    x0, _ = images(16)
    objective = DiffusionObjective(T, "hybrid", "learned", time_law)
    denoiser, index = Told(wavy, narrow), torch.arange(100, 116)
    together = objective(denoiser, x0, 5, index, None, GREY)
    order = torch.tensor([3, 15, 0, 7, 8, 1, 2])
    some = objective(denoiser, x0[order], 5, index[order], None, GREY)
    assert torch.equal(some.t, together.t[order])
    torch.testing.assert_close(some.per_sample, together.per_sample[order], rtol=1e-9, atol=0)
    for other in (objective(denoiser, x0, 5, index + 16, None, GREY), objective(denoiser, x0, 6, index, None, GREY)):
        assert bool((other.per_sample != together.per_sample).all())


def test_all_levels_are_drawn_alike():
    objective = DiffusionObjective(37, "simple", "beta")
    denoiser = Told(lambda x, t: x, betas=np.full(37, 0.1))
    t = objective(denoiser, torch.zeros(50_000, 1), 3, torch.arange(50_000), None).t
    index = denoiser.process.level_index(t)
    assert torch.equal(t, denoiser.process.grid()[index])
    assert stats.chisquare(torch.bincount(index, minlength=37).numpy()).pvalue > 0.01


def test_the_loss_has_the_images_type_and_reaches_the_network():
    x0, _ = images(8)
    scale = nn.Parameter(torch.ones(()))
    objective = DiffusionObjective(T, "hybrid", "learned", "second_moment")
    loss = objective(Told(lambda x, t: scale * x, lambda x, t: scale * x), x0.float(), 0, torch.arange(8), None, GREY)
    assert (loss.per_sample.shape, loss.per_sample.dtype, loss.t.dtype) == ((8,), torch.float32, torch.float64)
    assert loss.per_sample.requires_grad
    assert not loss.shown.requires_grad
