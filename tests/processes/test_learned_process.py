"""A process may have parameters, and its prior a deviation for each dimension."""

import numpy as np
import torch
from helpers.laws import GAUSSIAN, noise_of, wide
from scipy.stats import norm
from torch import nn

from lit_diffusion.denoisers import Prediction
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.likelihood import variational_bound
from lit_diffusion.processes import Process
from lit_diffusion.reverse import ReverseChain


class Learned(Process):
    """``alpha = (1 - t)^a``, ``sigma = b t``."""

    def __init__(self, a=1.3, b=0.8):
        super().__init__()
        self.a, self.b = nn.Parameter(wide(a)[0]), nn.Parameter(wide(b)[0])

    @property
    def prior_std(self):
        return self.b

    def alpha(self, t):
        return (1.0 - t.double()) ** self.a

    def dalpha(self, t):
        return -self.a * (1.0 - t.double()) ** (self.a - 1.0)

    def sigma(self, t):
        return self.b * t.double()

    def dsigma(self, t):
        return self.b * torch.ones_like(t, dtype=torch.float64)

    def t_at_log_snr(self, log_snr):
        raise NotImplementedError


def everything(process):
    """What depends on the parameters, as one number: coefficients, a step, the prior, views, also at t = 1."""
    x, z = noise_of(4, dtype=torch.float64).normal(), noise_of(4, 1, dtype=torch.float64).normal()
    t, s = wide(1e-3, 0.4, 0.9, 1.0), wide(0.0, 0.2, 0.3, 0.5)
    level, step = process.coefficients(t), process.transition(s, t)
    x_t = process.perturb(x, t, z)
    prediction = Prediction.from_x0_and_eps(x_t, level, torch.sin(x), torch.cos(z))
    views = [prediction.x0, prediction.eps, process.sigma(t)[:, None] * prediction.score, prediction.velocity]
    total = sum(view.square().sum() for view in views) + sum(value.sum() for value in vars(step).values())
    total = total + process.prior_log_prob(x_t).sum() + process.first_order_step(x_t, x, t, s).sum()
    denoiser, chain = ExactDenoiser(GAUSSIAN, process), ReverseChain("beta_tilde", None)
    return total + 0.1 * chain.log_variance(denoiser(x_t, t), denoiser, step, s).sum()


def test_gradients_reach_the_parameters_and_are_the_differences():
    process, h = Learned(), 1e-6
    everything(process).backward()
    for name in ("a", "b"):
        values = []
        for sign in (1, -1):
            moved = Learned()
            getattr(moved, name).data += sign * h
            values.append(float(everything(moved).detach()))
        difference = (values[0] - values[1]) / (2 * h)
        np.testing.assert_allclose(getattr(process, name).grad, difference, rtol=1e-6)
    assert set(process.state_dict()) == {"a", "b"}


def test_the_bound_takes_a_prior_that_is_a_tensor():
    bound = variational_bound(
        ExactDenoiser(GAUSSIAN, Learned(b=1.0)),
        noise_of(4, dtype=torch.float64).normal(),
        noise_of(4),
        ReverseChain(),
        steps=3,
    )
    assert bound.prior.tolist() == [0.0] * 4  # alpha is 0 at t = 1.
    assert bool(bound.total.isfinite().all())


def test_the_prior_may_have_a_deviation_of_each_dimension():
    std = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)

    class Wide(Learned):
        prior_std = std

    x = noise_of(5, shape=(2, 3)).normal()
    expected = norm(scale=std.numpy()).logpdf(x.double().numpy()).sum((1, 2))
    np.testing.assert_allclose(Wide().prior_log_prob(x), expected, rtol=1e-12)
