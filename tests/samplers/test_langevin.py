import math

import pytest
import torch
from torch import nn

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.denoisers import Denoiser, NetworkDenoiser, Prediction, WrappedDenoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, linear_betas
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers import SAMPLERS, AnnealedLangevin, Langevin, Run

CHAINS = 20_000
POINT = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.zeros(1, 2, 2))
"""With one level of noise s the smoothed density is the Gaussian of variance s^2."""


def noise_of(count=CHAINS, seed=0, shape=(2,), first=0):
    return SampleNoise(seed, first + torch.arange(count), shape)


def mixture(weights, means, std):
    means = torch.tensor(means)
    dimension = means.shape[1]
    return GaussianMixture(torch.tensor(weights), means, std**2 * torch.eye(dimension).repeat(len(means), 1, 1))


def ncsn_toy():
    """The mixture of NCSN's figure 3: modes too far apart for plain Langevin dynamics."""
    return mixture([0.2, 0.8], [[-5.0, -5.0], [5.0, 5.0]], 1.0)


# Plain Langevin dynamics


@pytest.mark.parametrize(("s", "eta"), [(1.0, 1.0), (0.3, 0.18), (2.0, 12.0)])
def test_the_variance_of_the_chain_is_that_of_the_discretisation(s, eta):
    denoiser = ExactDenoiser(POINT, VE(s, s, num_timesteps=1))
    x = Langevin(steps=25, eta=eta, uniform_range=(-s, s)).sample(denoiser, noise_of()).x
    variance = float(x.double().var())
    expected = s**2 / (1 - eta / (4 * s**2))
    error = expected * math.sqrt(2 / x.numel())
    assert abs(variance - expected) < 4 * error
    # The test would tell it from the density's own variance.
    assert abs(variance - s**2) > 20 * error
    assert abs(float(x.double().mean())) < 4 * math.sqrt(expected / x.numel())


@pytest.mark.parametrize(("s", "eta"), [(1.0, 1.0), (0.3, 0.18), (2.0, 8.0)])
def test_the_metropolis_correction_removes_the_bias(s, eta):
    denoiser = ExactDenoiser(POINT, VE(s, s, num_timesteps=1))
    sampler = Langevin(steps=60, eta=eta, uniform_range=(-s, s), metropolis=True)
    x = sampler.sample(denoiser, noise_of()).x.double()
    error = s**2 * math.sqrt(2 / x.numel())
    assert abs(float(x.var()) - s**2) < 4 * error
    assert abs(float((x**4).mean()) / (3 * s**4) - 1) < 0.06
    # Were every step accepted the variance would be the biased one.
    biased = Langevin(steps=60, eta=eta, uniform_range=(-s, s)).sample(denoiser, noise_of()).x.double()
    assert float(biased.var()) > 1.2 * s**2


def test_metropolis_accepts_as_often_as_it_should():
    """The ratio in closed form for a Gaussian: the quadratic terms cancel but for eta (|x|^2 - |x'|^2) / (8 s^4)."""
    s, eta = 1.0, 1.5
    denoiser = ExactDenoiser(POINT, VE(s, s, num_timesteps=1))
    x = noise_of(seed=5).normal()
    sampler = Langevin(steps=1, eta=eta, metropolis=True)
    noise = noise_of(seed=6)
    (move,) = sampler.plan(denoiser.process)
    moved = sampler.step(Run(denoiser, noise), x, move)
    fresh = noise_of(seed=6)
    proposal = (1 - eta / 2) * x + math.sqrt(eta) * fresh.normal()
    log_ratio = eta / 8 * (x.square().sum(1) - proposal.square().sum(1))
    accepted = fresh.uniform(()).log() < log_ratio
    torch.testing.assert_close(moved, torch.where(accepted[:, None], proposal, x))
    assert 0.5 < float(accepted.float().mean()) < 0.95


def test_langevin_finds_the_weights_of_overlapping_modes():
    separation = 1.5
    distribution = mixture([0.3, 0.7], [[-separation], [separation]], 0.9)
    denoiser = ExactDenoiser(distribution, VE(0.3, 0.3, num_timesteps=1))
    sampler = Langevin(steps=500, eta=0.2, uniform_range=(-3.0, 3.0))
    x = sampler.sample(denoiser, noise_of(10_000, shape=(1,))).x
    # The mean is separation (w_2 - w_1).
    assert (1 - float(x.mean()) / separation) / 2 == pytest.approx(0.3, abs=0.03)


def test_plain_langevin_loses_the_weights_of_separated_modes_and_annealed_keeps_them():
    distribution, count = ncsn_toy(), 4000
    process = VE(1.0, 20.0, num_timesteps=10)
    annealed = AnnealedLangevin(steps_per_level=50, eta=0.2, uniform_range=(-8.0, 8.0))
    plain = Langevin(steps=500, eta=0.2, uniform_range=(-8.0, 8.0))
    denoiser = ExactDenoiser(distribution, process)
    made = {
        name: sampler.sample(denoiser, noise_of(count)) for name, sampler in (("plain", plain), ("annealed", annealed))
    }
    first = {name: float((distribution.component_of(each.x) == 0).double().mean()) for name, each in made.items()}
    assert made["plain"].evaluations == made["annealed"].evaluations == 500
    assert first["annealed"] == pytest.approx(0.2, abs=0.03)
    # From a symmetric start each mode gets what falls to its side.
    assert first["plain"] == pytest.approx(0.5, abs=0.08)


def test_annealed_langevin_ends_in_the_smoothed_density():
    distribution, process = ncsn_toy(), VE(0.5, 20.0, num_timesteps=12)
    sampler = AnnealedLangevin(steps_per_level=40, eta=0.1, uniform_range=(-8.0, 8.0))
    x = sampler.sample(ExactDenoiser(distribution, process), noise_of(4000)).x.double()
    right = x[distribution.component_of(x) == 1]
    # Data 1 and noise 0.5^2, and what the last step's size adds.
    variance = 1.25 / (1 - 0.1 / (4 * 1.25))
    assert float(right.mean()) == pytest.approx(5.0, abs=0.06)
    assert float(right.var()) == pytest.approx(variance, rel=0.06)


# The algorithm box


@pytest.mark.parametrize(
    "process",
    [VE(0.01, 1.0, num_timesteps=10), VE(0.01, 50.0, num_timesteps=232), Betas(linear_betas(50))],
    ids=["10", "232", "b"],
)
def test_the_step_is_in_proportion_to_the_variance_of_the_level(process):
    eta, count = 4e-5, 3
    plan = AnnealedLangevin(steps_per_level=count, eta=eta).plan(process)
    grid = process.grid().flip(0)
    sigma = process.sigma(grid)
    assert [move.t for move in plan] == [t for t in grid.tolist() for _ in range(count)]
    for n, move in enumerate(plan):
        assert move.eta == pytest.approx(eta * float(sigma[n // count] / sigma[-1]) ** 2, rel=1e-12)
    assert plan[-1].eta == eta
    assert len(plan) == count * process.num_timesteps


def test_one_step_is_the_formula():
    process = VE(0.5, 2.0, num_timesteps=3)
    denoiser = ExactDenoiser(ncsn_toy(), process)
    x = noise_of(10).normal()
    for sampler in (Langevin(steps=1, eta=0.3, sigma=1.0), AnnealedLangevin(steps_per_level=1, eta=0.3)):
        move = sampler.plan(process)[1 if isinstance(sampler, AnnealedLangevin) else 0]
        eta = 1.2 if isinstance(sampler, AnnealedLangevin) else 0.3  # sigma 1.0 over 0.5, squared
        assert move.eta == pytest.approx(eta)
        assert float(process.sigma(torch.tensor([move.t]).double())) == pytest.approx(1.0)
        z = noise_of(10, seed=3).normal()
        _, score = ncsn_toy().log_prob_and_score(x, torch.ones(10), torch.ones(10))
        expected = x + eta / 2 * score.float() + math.sqrt(eta) * z
        torch.testing.assert_close(sampler.step(Run(denoiser, noise_of(10, seed=3)), x, move), expected)


def test_langevin_follows_the_smallest_noise_level_by_default():
    for process in (VE(0.1, 10.0, num_timesteps=5), VP()):
        assert {move.t for move in Langevin(steps=3).plan(process)} == {process.t_min}
    process = VE(0.1, 10.0)
    (move,) = set(Langevin(steps=3, eta=0.5, sigma=1.0).plan(process))
    assert (move.t, move.eta) == (pytest.approx(0.5), 0.5)
    with pytest.raises(UserError, match="noise level 11 "):
        Langevin(sigma=11.0).sample(ExactDenoiser(POINT, process), noise_of(2))


@pytest.mark.parametrize(
    "process", [VE(0.3, 3.0, num_timesteps=4), Betas(linear_betas(30, 0.01, 0.3))], ids=["VE", "Betas"]
)
def test_the_last_step_is_tweedies(process):
    distribution = GaussianMixture(
        torch.ones(1), torch.tensor([[1.0, -2.0]]), torch.diag(torch.tensor([0.5, 2.0]))[None]
    )
    denoiser = ExactDenoiser(distribution, process)
    options = {"steps_per_level": 5, "eta": 0.005, "uniform_range": (-2.0, 2.0)}
    noisy = AnnealedLangevin(**options).sample(denoiser, noise_of(50)).x
    clean = AnnealedLangevin(denoise=True, **options).sample(denoiser, noise_of(50)).x
    last = torch.tensor([process.t_min], dtype=torch.float64)
    alpha, sigma = process.alpha(last), process.sigma(last)
    _, score = distribution.log_prob_and_score(noisy, alpha.expand(50), sigma.expand(50))
    expected = (noisy.double() + sigma**2 * score) / alpha
    torch.testing.assert_close(clean.double(), expected, rtol=1e-5, atol=1e-5)
    assert float((clean - noisy).abs().max()) > 0.001


@pytest.mark.parametrize("levels", [None, 7])
def test_annealed_langevin_needs_levels(levels):
    process = VE(0.1, 10.0, t_min_sampling=1e-3)
    sampler = AnnealedLangevin(steps_per_level=2, eta=0.01, num_levels=levels)
    denoiser = ExactDenoiser(POINT, process)
    if levels is None:
        with pytest.raises(UserError, match="continuous time: give the number of timesteps"):
            sampler.sample(denoiser, noise_of(2))
        return
    sampler.sample(denoiser, noise_of(2))
    times = [move.t for move in sampler.plan(process)]
    assert (times[0], times[-1], len(times)) == (1.0, 1e-3, 14)
    ratio = float(process.sigma(torch.ones(1).double()) / process.sigma(torch.tensor([1e-3]).double()))
    assert sampler.plan(process)[0].eta == pytest.approx(0.01 * ratio**2)
    sigma = process.sigma(torch.tensor(times[::2], dtype=torch.float64)).log()
    torch.testing.assert_close(sigma.diff(), sigma.diff()[:1].expand(6))  # Geometric.


# What every sampler owes


class Counting(WrappedDenoiser):
    """A denoiser under observation."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.calls = 0

    def forward(self, x_t, t, cond=None, began=None):
        self.calls += 1
        self.cond = cond
        assert t.shape == (len(x_t),)
        assert not torch.is_grad_enabled()
        return self.denoiser(x_t, t, cond)


def samplers():
    return {
        "langevin": (Langevin(steps=6, eta=0.01), 6, 6),
        "metropolis": (Langevin(steps=6, eta=0.01, metropolis=True), 6, 12),
        "annealed": (AnnealedLangevin(steps_per_level=3, eta=0.01), 12, 12),
        "denoised": (AnnealedLangevin(steps_per_level=3, eta=0.01, denoise=True), 12, 13),
    }


@pytest.mark.parametrize("name", samplers())
def test_evaluations_and_steps_are_counted_exactly(name):
    sampler, total, evaluations = samplers()[name]
    process = VE(0.3, 3.0, num_timesteps=4)
    denoiser, seen, condition = Counting(ExactDenoiser(ncsn_toy(), process)), [], object()
    for _ in range(2):  # The second call counts anew.
        denoiser.calls = 0
        made = sampler.sample(denoiser, noise_of(5), condition, seen.append)
        x = made.x
        assert made.evaluations == denoiser.calls == evaluations
    assert denoiser.cond is condition
    assert len(seen) == 2 * total
    seen = seen[total:]
    assert [progress.step for progress in seen] == list(range(1, total + 1))
    assert {progress.total for progress in seen} == {total}
    assert [progress.t for progress in seen] == [move.t for move in sampler.plan(process)]
    assert {tuple(progress.x.shape) for progress in seen} == {(5, 2)}
    if name != "denoised":
        assert torch.equal(seen[-1].x, x)
    assert not torch.equal(seen[-2].x, seen[-1].x)


@pytest.mark.parametrize("name", samplers())
def test_a_sample_is_the_same_in_any_batch(name):
    sampler, _, _ = samplers()[name]
    denoiser = ExactDenoiser(ncsn_toy(), VE(0.3, 3.0, num_timesteps=4))
    together = sampler.sample(denoiser, noise_of(16)).x
    sevens = [sampler.sample(denoiser, noise_of(min(7, 16 - first), first=first)).x for first in range(0, 16, 7)]
    torch.testing.assert_close(torch.cat(sevens), together, rtol=1e-5, atol=1e-6)
    # Another seed, and neighbours, are other samples.
    assert bool((sampler.sample(denoiser, noise_of(16, seed=1)).x != together).any(1).all())
    assert len(together.unique(dim=0)) == 16


class Smooth(Backbone):
    """One layer, which autocast runs in bfloat16."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.3, 0.1], [-0.2, 0.4]]))
            self.layer.bias.zero_()

    def forward(self, x, c_noise, cond=None):
        raw = self.layer(x)
        self.types = (x.dtype, raw.dtype)
        return raw


@pytest.mark.parametrize("name", ["langevin", "annealed", "denoised"])
def test_the_state_is_float32_while_the_backbone_is_not(name):
    sampler, _, _ = samplers()[name]
    denoiser = NetworkDenoiser(Smooth(), VE(0.3, 3.0, num_timesteps=4), "score", "log_sigma")
    full = sampler.sample(denoiser, noise_of(20)).x
    denoiser.backbone.autocast_dtype = torch.bfloat16
    states = []
    x = sampler.sample(denoiser, noise_of(20), on_step=lambda progress: states.append(progress.x)).x
    assert denoiser.backbone.types == (torch.float32, torch.bfloat16)
    assert {state.dtype for state in (*states, x)} == {torch.float32}
    for state in states:
        assert float((state == state.to(torch.bfloat16)).float().mean()) < 0.2  # It has digits that bfloat16 has not.
    assert not torch.equal(x, full)
    torch.testing.assert_close(x, full, rtol=0.05, atol=0.05)
    assert not x.requires_grad


def test_where_chains_start():
    process, noise = VE(0.3, 3.0, num_timesteps=4), noise_of()
    uniform = AnnealedLangevin(uniform_range=(-2.0, 6.0)).start(process, noise)
    assert (uniform.shape, uniform.dtype) == ((CHAINS, 2), torch.float32)
    assert -2.0 <= float(uniform.min()) < -1.99
    assert 5.99 < float(uniform.max()) <= 6.0
    assert float(uniform.mean()) == pytest.approx(2.0, abs=0.05)
    assert float(uniform.var()) == pytest.approx(64 / 12, rel=0.03)
    for sampler in (Langevin(initial="gaussian"), AnnealedLangevin(initial="gaussian")):
        start = sampler.start(process, noise_of())
        torch.testing.assert_close(start, 3.0 * noise_of().normal())
    assert Langevin().start(process, noise_of(4)).tolist() == noise_of(4).uniform().tolist()


# What is refused


@pytest.mark.parametrize("sigma", [None, 0.5, 3.0])
@pytest.mark.parametrize("metropolis", [False, True])
def test_a_step_at_which_the_chain_diverges_is_refused(sigma, metropolis):
    denoiser = Counting(ExactDenoiser(POINT, VE(0.1, 5.0, num_timesteps=20)))
    bound = 4 * (sigma or 0.1) ** 2
    for eta in (bound * (1 + 1e-9), 2 * bound):
        with pytest.raises(UserError, match=r"Langevin step eta .* is not below 4 sigma\^2") as caught:
            Langevin(steps=2, eta=eta, sigma=sigma, metropolis=metropolis).sample(denoiser, noise_of(2))
        assert f"{eta:g}" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert denoiser.calls == 0
    Langevin(steps=2, eta=0.999 * bound, sigma=sigma, metropolis=metropolis).sample(denoiser, noise_of(2))


def test_the_bound_itself_is_refused():
    with pytest.raises(UserError, match="is not below"):
        Langevin(eta=4.0).check(ExactDenoiser(POINT, VE(1.0, 1.0, num_timesteps=1)))
    Langevin(eta=3.999).check(ExactDenoiser(POINT, VE(1.0, 1.0, num_timesteps=1)))


def test_the_refusal_is_right():
    """Just below the bound the chain stays, just above it would not."""
    denoiser = ExactDenoiser(POINT, VE(1.0, 1.0, num_timesteps=1))
    allowed = Langevin(steps=400, eta=3.9).sample(denoiser, noise_of(1000)).x
    assert float(allowed.double().var()) == pytest.approx(1 / (1 - 3.9 / 4), rel=0.1)
    beyond = Langevin(steps=400, eta=4.1)
    beyond.require_fit = lambda denoiser, plan: None
    assert float(beyond.sample(denoiser, noise_of(10)).x.abs().max()) > 1e4


@pytest.mark.parametrize(
    "process", [VE(0.1, 5.0, num_timesteps=20), Betas(linear_betas(20, 0.01, 0.3))], ids=["VE", "Betas"]
)
def test_annealed_langevin_refuses_it_at_the_smallest_level(process):
    denoiser = Counting(ExactDenoiser(POINT, process))
    bound = 0.04
    with pytest.raises(UserError, match=r"is not below 4 sigma\^2 = 0\.04 at sigma 0\.1"):
        AnnealedLangevin(steps_per_level=1, eta=bound * (1 + 1e-9)).sample(denoiser, noise_of(2))
    assert denoiser.calls == 0
    AnnealedLangevin(steps_per_level=1, eta=0.999 * bound).sample(denoiser, noise_of(2))


class OnlyScore(Denoiser):
    """A denoiser without an energy."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process

    def forward(self, x_t, t, cond=None, began=None):
        p = self.denoiser(x_t, t, cond)
        return Prediction(p.x_t, p.raw, p.coefficients, p.u, p.v)


def test_metropolis_needs_an_energy():
    denoiser = OnlyScore(ExactDenoiser(POINT, VE(1.0, 1.0, num_timesteps=1)))
    with pytest.raises(UserError, match=r"metropolis needs a model with an energy.*metropolis: false"):
        Langevin(steps=2, eta=0.1, metropolis=True).check(denoiser)  # Before any work.
    Langevin(steps=2, eta=0.1).sample(denoiser, noise_of(2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Langevin(steps=0), ["steps is 0"]),
        (lambda: AnnealedLangevin(steps_per_level=0), ["steps_per_level is 0"]),
        (lambda: AnnealedLangevin(num_levels=0), ["num_levels is 0"]),
        (lambda: AnnealedLangevin(num_levels=1), ["num_levels is 1"]),
        (lambda: Langevin(initial="normal"), ["initial is 'normal'", "gaussian"]),
        (lambda: AnnealedLangevin(initial="zeros"), ["initial is 'zeros'", "uniform"]),
        (lambda: Langevin(uniform_range=(1.0, 0.0)), ["uniform_range is [1, 0]"]),
        (lambda: AnnealedLangevin(uniform_range=(1.0, 1.0)), ["uniform_range is [1, 1]"]),
        (lambda: Langevin(eta=0.0).check(ExactDenoiser(POINT, VP())), ["eta is 0", "positive"]),
        (lambda: Langevin(eta=-0.1).check(ExactDenoiser(POINT, VP())), ["eta is -0.1"]),
        (lambda: Langevin(eta=float("nan")).check(ExactDenoiser(POINT, VP())), ["eta is nan"]),
        (lambda: Langevin(sigma=0.0).check(ExactDenoiser(POINT, VP())), ["noise level 0 "]),
    ],
)
def test_bad_settings_are_refused_in_one_line(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_short_names():
    assert SAMPLERS["langevin"] is Langevin
    assert SAMPLERS["annealed_langevin"] is AnnealedLangevin


def test_the_papers_steps_are_accepted():
    for low, high, levels, eta in ((0.01, 1.0, 10, 4e-5), (0.01, 50.0, 232, 1.24e-5)):
        AnnealedLangevin(eta=eta).check(ExactDenoiser(POINT, VE(low, high, levels)))


def test_a_network_of_known_levels_is_asked_at_one_of_them():
    class OnItsLevels(OnlyScore):
        on_grid_only = True

    process = VE(0.3, 3.0, num_timesteps=8)
    denoiser = OnItsLevels(ExactDenoiser(POINT, process))
    with pytest.raises(UserError, match=r"sigma 0.7 lies between the noise levels .* 0.3, 0.4168"):
        Langevin(steps=1, eta=0.1, sigma=0.7).check(denoiser)
    for sigma in (None, 0.3, 3.0, float(process.sigma(process.grid()[3]))):
        Langevin(steps=1, eta=0.1, sigma=sigma).check(denoiser)
    Langevin(steps=1, eta=0.1, sigma=0.7).check(ExactDenoiser(POINT, process))
