"""Flow matching is the papers' regression, its pairs are optimal, and its ODE has the law of the data."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.laws import GAUSSIAN, Network, as_azulas, noise_of, order
from helpers.tiny import WALKS, Convolutions, digits_data, fit, flow_matching, pairs_noted, same, trainer, weights

from lit_diffusion.backbones import MLP
from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import NetworkDenoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.likelihood import flow_log_prob
from lit_diffusion.methods import FlowMatching
from lit_diffusion.methods.base import Encoded
from lit_diffusion.objectives import DenoisingScoreMatching, LogitNormal, OptimalTransport, Uniform
from lit_diffusion.objectives.coupling import nearest_assignment
from lit_diffusion.processes import Flow
from lit_diffusion.randomness import SampleNoise, keyed_normal
from lit_diffusion.samplers import DDIM, Ancestral, ChurnedHeun, Euler, EulerMaruyama, Heun, ProbabilityFlow
from lit_diffusion.training.datamodule import Batch


def centred(**keys):
    return digits_data(value_range=(-1.0, 1.0), **keys)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the papers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["none", "optimal_transport"])
@pytest.mark.parametrize("time_law", ["uniform", "logit_normal"])
def test_the_loss_is_the_papers(time_law, coupling):
    """The mean of ``(v - (eps - x_0))^2`` at ``(1 - t) x_0 + t eps``, by the network itself."""
    torch.manual_seed(0)
    method = FlowMatching(MLP((3,), width=8, depth=1), time_law=time_law, coupling=coupling).double()
    x, eps = normal(400, 3), keyed_normal(4, "noise", torch.arange(400), (3,), dtype=torch.float64)
    with torch.no_grad():
        loss = method.loss(Batch(x, torch.arange(400)), seed=4)
        t = loss.t[:, None]
        v = method.denoiser.backbone((1 - t) * x + t * eps, (999 * loss.t).float())
    torch.testing.assert_close(loss.per_sample, (v - (eps - x)).square().mean(1), rtol=1e-5, atol=0)
    middle = float(((loss.t > 0.25) & (loss.t < 0.75)).double().mean())
    assert middle == pytest.approx(0.5 if time_law == "uniform" else 0.728, abs=0.08)
    given = method.loss(Batch(x, torch.arange(400), eps=eps.flip(0)), seed=4)
    assert torch.equal(
        given.per_sample, method.loss_given_t(Batch(x, torch.arange(400)), loss.t, eps.flip(0)).per_sample
    )


def test_the_defaults():
    method = FlowMatching(Convolutions())
    objective, denoiser = method.objective, method.denoiser
    assert type(objective) is DenoisingScoreMatching
    assert (type(objective.time_law), objective.weight, objective.reduction) == (Uniform, "raw", "mean")
    assert (denoiser.parametrization, denoiser.c_noise, type(denoiser.process)) == ("velocity", "time_999", Flow)
    assert isinstance(method.sampler, Heun)
    assert len(method.sampler.plan(denoiser.process)) == 25
    method.sampler.check(denoiser)
    assert isinstance(FlowMatching(Convolutions(), time_law=LogitNormal(0.5)).objective.time_law, LogitNormal)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"coupling is 'optimal'; choose one of none, optimal_transport"):
        FlowMatching(Convolutions(), coupling="optimal")
    with pytest.raises(UserError, match=r"infinite where alpha is 0.*choose time or time_999"):
        FlowMatching(Convolutions(), c_noise="log_sigma")
    cond = Condition(label=torch.zeros(4), vector=torch.zeros(4, 2))
    with pytest.raises(UserError, match=r"optimal_transport pairs noise with data inside a class.*vector: choose none"):
        OptimalTransport("uniform").couple(normal(4, 2), normal(4, 2), cond)


# ---- pairs of noise and data -------------------------------------------------------------------------------------


def cost(x0, eps):
    return float((x0 - eps).square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_pairs_are_the_best_of_all_permutations(seed):
    x0, eps = normal(6, 1, 2, 2, seed=seed), normal(6, 1, 2, 2, seed=seed + 10)
    best = min(cost(x0, eps[list(p)]) for p in itertools.permutations(range(6)))
    paired = eps[nearest_assignment(x0, eps)]
    assert cost(x0, paired) == pytest.approx(best, rel=1e-12)
    assert cost(x0, eps) > 1.05 * best


def test_on_a_line_the_pairs_are_in_order():
    x0, eps = normal(500, 1), normal(500, 1, seed=1)
    paired = OptimalTransport("uniform").couple(x0, eps)
    assert torch.equal(paired[x0[:, 0].argsort(), 0], eps[:, 0].sort().values)


def test_the_pairs_do_not_depend_on_the_order_of_the_batch():
    x0, eps, mixed = normal(40, 3), normal(40, 3, seed=1), torch.randperm(40)
    objective = OptimalTransport("uniform")
    again = objective.couple(x0[mixed], eps[mixed.flip(0)])
    assert torch.equal(again, objective.couple(x0, eps)[mixed])


def test_noise_is_permuted_inside_each_class():
    x0, eps, label = normal(60, 2), normal(60, 2, seed=1), torch.arange(60) % 3
    x0 += 5 * label[:, None]
    objective = OptimalTransport("uniform")
    paired = objective.couple(x0, eps, Condition(label=label))
    for k in range(3):
        rows = label == k
        assert torch.equal(paired[rows], objective.couple(x0[rows], eps[rows]))
        assert torch.equal(paired[rows].sort(0).values, eps[rows].sort(0).values)
    # Over the whole batch the class with the largest values would have the largest noise.
    assert float(objective.couple(x0, eps)[label == 2].mean()) > float(paired[label == 2].mean()) + 0.3


class Latents(FlowMatching):
    """What is diffused is minus the data, with noise."""

    def encode(self, x, noise):
        return Encoded(-x + 0.01 * noise.normal(), x.new_zeros(len(x)))


@pytest.mark.parametrize("told", [False, True])
def test_a_step_pairs_where_the_backbone_is_told_no_classes_over_the_whole_batch(told):
    """And in the space that is diffused."""
    method = Latents(Convolutions(num_classes=10 if told else None), coupling="optimal_transport")
    x, index, label = normal(30, 1, 8, 8).float(), torch.arange(7, 37), torch.arange(30) % 2
    batch = Batch(x, index, Condition(label=label))
    made = method.before_step(batch, 3)
    z, eps = method.encoded(batch, 3).x, keyed_normal(3, "noise", index, (1, 8, 8))
    expected = OptimalTransport("uniform").couple(z, eps, batch.cond if told else None)
    assert torch.equal(made.eps, expected)
    assert torch.equal(made.x, x)
    assert not torch.equal(expected, OptimalTransport("uniform").couple(z, eps, None if told else batch.cond))


def test_without_coupling_a_step_leaves_the_batch_alone():
    batch = Batch(normal(4, 1, 8, 8), torch.arange(4))
    assert flow_matching().before_step(batch, 0) is batch


# ---- it trains ---------------------------------------------------------------------------------------------------


def test_accumulation_changes_neither_the_pairs_nor_the_weights(tmp_path):
    ends = []
    for size in (None, 5):
        method = pairs_noted(flow_matching(coupling="optimal_transport"))
        fit(method, centred(micro_batch_size=size), tmp_path, 64)
        ends.append(method)
    assert ends[0].pairs.keys() == ends[1].pairs.keys() == set(range(64))
    assert all(torch.equal(eps, ends[1].pairs[n]) for n, eps in ends[0].pairs.items())
    own = {n: keyed_normal(0, "noise", torch.tensor([n]), (1, 8, 8))[0] for n in range(64)}
    for step in (range(32), range(32, 64)):  # Every noise of a step is used once, and mostly by another datum.
        used = [next(m for m in step if torch.equal(own[m], ends[0].pairs[n])) for n in step]
        assert sorted(used) == list(step)
        assert sum(m == n for m, n in zip(used, step, strict=True)) < 16
    for name, value in weights(ends[0]).items():
        torch.testing.assert_close(value, weights(ends[1])[name], rtol=0, atol=1e-5)


def test_held_out_images_have_their_own_noise(tmp_path):
    losses = []
    for coupling in ("none", "optimal_transport"):
        made = trainer(tmp_path, limit_val_batches=1.0)
        losses += made.validate(flow_matching(coupling=coupling), datamodule=centred(), verbose=False)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("coupling", ["none", "optimal_transport"])
def test_the_loss_falls(tmp_path, coupling):
    method = flow_matching({"channels": 8}, coupling=coupling)
    batch = Batch(torch.stack([centred().held_out_values(torch.arange(32))[k] for k in range(32)]), torch.arange(32))
    t = torch.linspace(0.02, 1.0, 32, dtype=torch.float64)
    eps = keyed_normal(7, "fixed", batch.index, (1, 8, 8))

    def loss():
        with torch.no_grad():
            return float(method.loss_given_t(batch, t, eps).per_sample.mean())

    before = loss()
    fit(method, centred(), tmp_path, 32 * 40)
    assert method.skipped_steps == 0
    assert loss() < 0.8 * before


def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    def method(seed=0):
        return flow_matching({"dropout": 0.3}, seed, coupling="optimal_transport", gradient_clip=1.0)

    straight = method()
    fit(straight, centred(micro_batch_size=20), tmp_path, 96)
    begun = method()
    fit(begun, centred(micro_batch_size=20), tmp_path, 32).save_checkpoint(tmp_path / "1.ckpt")
    again = method(seed=1)
    fit(again, centred(micro_batch_size=20), tmp_path, 96, ckpt_path=tmp_path / "1.ckpt")
    assert same(weights(straight), weights(again))


@pytest.mark.parametrize("name", ["euler", "heun", "ode", "ddim", "dpm_solver_1", "dpmpp_2m", "unipc", "deis", "ipndm"])
def test_it_is_sampled_by_its_ode(name):
    method = flow_matching()
    method.data_spec = centred().data_spec
    made = method.generate(torch.arange(3), seed=0, sampler=WALKS[name])
    assert made.x.shape == (3, 1, 8, 8)
    assert bool(made.x.isfinite().all())
    alone = method.generate(torch.tensor([2]), seed=0, sampler=WALKS[name]).x
    torch.testing.assert_close(made.x[2:], alone, rtol=0, atol=1e-4)


# ---- closed forms ------------------------------------------------------------------------------------------------

FLOW = Flow()
X = noise_of(50, dtype=torch.float64).normal()


def error(sampler):
    """The largest of the map that takes pure noise to Gaussian data, over 50 points."""
    moved = sampler.sample(ExactDenoiser(GAUSSIAN, FLOW), None, start=X).x
    return float((moved - GAUSSIAN.flow(FLOW, X, 1.0, FLOW.t_min_sampling)).norm(dim=1).max())


@pytest.mark.parametrize(("make", "expected"), [(Euler, 1), (Heun, 2)])
def test_the_samplers_converge_at_their_order_from_pure_noise(make, expected):
    errors = [error(make(steps)) for steps in (50, 100, 200)]
    assert order(*errors[:2]) == pytest.approx(expected, abs=0.15)
    assert order(*errors[1:]) == pytest.approx(expected, abs=0.1)


def test_heun_at_fifty_evaluations_is_precise():
    assert error(Heun(25)) < 0.05 * error(Euler(50))


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_the_likelihood_of_gaussian_data_is_its_density(trace):
    """The prior is exact at t = 1: nothing stands in for it."""
    count = 200 if trace == "exact" else 4000
    z = noise_of(count, dtype=torch.float64)
    x = FLOW.perturb(GAUSSIAN.sample(z.normal(), z.uniform(())), torch.full((count,), FLOW.t_min), z.normal())
    found = flow_log_prob(ExactDenoiser(GAUSSIAN, FLOW), x, noise_of(count, 1, dtype=torch.float64), trace=trace)
    mean, covariance = GAUSSIAN.marginal(FLOW, FLOW.t_min)
    truth = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    nats = (found.log_prob - truth) / 3
    if trace == "exact":
        assert float(nats.abs().max()) < 1e-3
    else:
        assert abs(float(nats.mean())) < 4 * float(nats.std()) / count**0.5


# ---- independent implementations ---------------------------------------------------------------------------------


def network_and_start():
    return NetworkDenoiser(Network(), FLOW, "velocity", "time_999"), normal(5, 1, 4, 4)


def by_diffusers(name, denoiser, x, sigmas):
    """Every state of a scheduler's trajectory with a network that predicts the velocity, in float32."""
    module = pytest.importorskip(f"diffusers.schedulers.scheduling_flow_match_{name}_discrete")
    scheduler = getattr(module, f"FlowMatch{name.title()}DiscreteScheduler")()
    if name == "euler":
        scheduler.set_timesteps(sigmas=sigmas)
    else:
        scheduler.set_timesteps(len(sigmas))
    states = [x.float()]
    for t in scheduler.timesteps:
        with torch.no_grad():
            v = denoiser(states[-1].double(), (t.double() / 1000).expand(len(x))).velocity
        states.append(scheduler.step(v.float(), t, states[-1]).prev_sample)
    return states


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_diffusers_agrees_step_by_step(name):
    denoiser, x = network_and_start()
    times = torch.linspace(1.0, 0.001, 20).tolist()
    theirs = by_diffusers(name, denoiser, x, times)
    sampler, states = {"euler": Euler, "heun": Heun}[name](spacing=times), [x]
    made = sampler.sample(denoiser, None, start=x, on_step=lambda progress: states.append(progress.x))
    assert torch.equal(made.x, states[-1])
    # Heun's second evaluations are steps of their own there; both take the last noise off by a step of Euler's.
    compared = theirs[:-1] if name == "euler" else [theirs[0], *theirs[2:-1:2]]
    assert len(compared) == len(states) == 20
    for ours, other in zip(states, compared, strict=True):
        torch.testing.assert_close(ours.float(), other, rtol=1e-5, atol=1e-5)
    last = {"euler": Euler, "heun": Heun}[name](spacing=times, denoise=True, clip_x0=None)
    torch.testing.assert_close(last.sample(denoiser, None, start=x).x.float(), theirs[-1], rtol=1e-5, atol=1e-5)


def test_azula_agrees():
    """Its Euler step is in sigma / alpha with the line between, the same on straight lines; its Heun's is not."""
    sample = pytest.importorskip("azula.sample")
    network, x = network_and_start()[0].backbone, normal(5, 1, 4, 4)
    denoiser = NetworkDenoiser(network, Flow(1e-3, 1e-3, t_max=0.99), "velocity", "time_999")
    keys = {"start": 0.99, "stop": 1e-3, "steps": 25, "silent": True, "dtype": torch.float64}
    theirs = sample.EulerSampler(as_azulas(denoiser), **keys)(x)
    torch.testing.assert_close(
        Euler(25, large_steps="allow").sample(denoiser, None, start=x).x, theirs, rtol=1e-9, atol=1e-9
    )


def test_torchcfm_agrees():
    """Its time runs the other way, from noise at 0 to data at 1."""
    torchcfm = pytest.importorskip("torchcfm")
    x0, eps, t = normal(30, 4), normal(30, 4, seed=1), normal(30, seed=2).sigmoid()
    theirs = torchcfm.ConditionalFlowMatcher(sigma=0.0)
    _, x_t, velocity = theirs.sample_location_and_conditional_flow(eps, x0, 1 - t)
    torch.testing.assert_close(FLOW.perturb(x0, t, eps), x_t)
    denoiser = NetworkDenoiser(MLP((4,), width=8, depth=1), FLOW, "velocity", "time_999").double()
    loss = DenoisingScoreMatching("uniform", "raw", "mean").at(denoiser, x0, t, eps)
    with torch.no_grad():
        expected = (denoiser.backbone(x_t, (999 * t).float()) + velocity).square().mean(1)
    torch.testing.assert_close(loss.per_sample.detach(), expected, rtol=1e-5, atol=1e-6)
    plan = torchcfm.OTPlanSampler("exact").get_map(eps, x0)
    ours = nearest_assignment(x0, eps)
    assert plan[ours, torch.arange(30)].tolist() == pytest.approx([1 / 30] * 30)


@pytest.mark.parametrize("sampler", [Heun(5), Euler(5), DDIM(5), ProbabilityFlow(), ChurnedHeun(5, s_churn=0.0)])
def test_a_model_of_coupled_noise_is_sampled_by_its_ode(sampler):
    denoiser = flow_matching(coupling="optimal_transport").denoiser
    sampler.check(denoiser)
    made = sampler.sample(denoiser, SampleNoise(0, torch.arange(2), (1, 8, 8)))
    assert made.evaluations >= 5
    assert bool(made.x.isfinite().all())


NOISY = [DDIM(5, eta=0.5), Ancestral(5), EulerMaruyama(5, large_steps="allow"), ChurnedHeun(5)]


@pytest.mark.parametrize("sampler", NOISY)
def test_a_model_of_coupled_noise_has_no_score_for_samplers_that_add_noise(sampler):
    with pytest.raises(UserError, match=r"needs the score of the noised data.*choose heun, euler, ode, or ddim with"):
        sampler.check(flow_matching(coupling="optimal_transport").denoiser)
