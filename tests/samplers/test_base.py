"""What every sampler owes: where it looks, what it counts and reports, and that a sample stands alone."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.laws import MIXTURE, PAPERS, noise_of, wide
from helpers.tiny import Convolutions
from torch import nn

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import Denoiser, InterpolatedVariance, NetworkDenoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.images import to_uint8
from lit_diffusion.processes import VE, VP, Betas, linear_betas
from lit_diffusion.samplers import (
    DDIM,
    DEIS,
    IPNDM,
    SAMPLERS,
    Ancestral,
    AnnealedLangevin,
    ChurnedHeun,
    DPMSolver1,
    DPMSolver2,
    DPMSolver3,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    Euler,
    EulerMaruyama,
    Heun,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    SDEDPMSolverPP2M,
    UniPC,
)
from lit_diffusion.samplers.base import EndsAtZero, describe, described
from lit_diffusion.samplers.times import timesteps_to_t_min, timesteps_to_zero

LEVELS = 8
GRID = Betas(linear_betas(LEVELS, 0.01, 0.4))

# A sampler, its steps and its evaluations on those levels.
EVERY = {
    "ancestral": (Ancestral(), 8, 8),
    "ancestral, beta_tilde": (Ancestral(4, "beta_tilde", "quadratic", (-1.0, 1.0)), 4, 4),
    "ancestral, learned": (Ancestral(variance="learned"), 8, 8),
    "annealed_langevin": (AnnealedLangevin(3, eta=1e-3), 24, 24),
    "annealed_langevin, denoised": (AnnealedLangevin(3, eta=1e-3, denoise=True, num_levels=4), 12, 13),
    "churned_heun": (ChurnedHeun(3, large_steps="allow"), 3, 7),
    "churned_heun, noisy": (ChurnedHeun(None, denoise=False, spacing="uniform", large_steps="allow"), 7, 14),
    "ddim": (DDIM(5), 5, 5),
    "ddim, noisy": (DDIM(None, eta=0.7), 8, 8),
    "deis": (DEIS(None, denoise=True), 7, 8),
    "dpm_solver_1": (DPMSolver1(5, denoise=True), 5, 6),
    "dpm_solver_2": (DPMSolver2(3, denoise=True), 3, 7),
    "dpm_solver_3": (DPMSolver3(None, denoise=True), 7, 22),
    "dpmpp_2m": (DPMSolverPP2M(5, denoise=True), 5, 6),
    "dpmpp_2s": (DPMSolverPP2S(None, "uniform", True), 7, 15),
    "dpmpp_3m": (DPMSolverPP3M(None, denoise=True), 7, 8),
    "dpmpp_sde_2m": (SDEDPMSolverPP2M(6), 6, 7),
    "euler": (Euler(), 7, 7),
    "euler, denoised": (Euler(3, denoise=True, large_steps="allow"), 3, 4),
    "euler_maruyama": (EulerMaruyama(), 7, 8),
    "euler_maruyama, noisy": (EulerMaruyama(4, denoise=False, large_steps="allow"), 4, 4),
    "heun": (Heun(), 7, 14),
    "heun, denoised": (Heun(2, denoise=True, large_steps="allow"), 2, 5),
    "ipndm": (IPNDM(6, denoise=True), 6, 7),
    "langevin": (Langevin(6, eta=1e-3), 6, 6),
    "langevin, metropolis": (Langevin(6, eta=1e-3, metropolis=True), 6, 12),
    "predictor_corrector": (PredictorCorrector(), 7, 15),
    "predictor_corrector, ancestral": (PredictorCorrector(Ancestral(4), corrector_steps=2), 4, 10),
    "predictor_corrector, heun": (PredictorCorrector(Heun(3, denoise=True, large_steps="allow")), 3, 10),
    "reverse_diffusion": (ReverseDiffusion(), 7, 8),
    "reverse_diffusion, noisy": (ReverseDiffusion(2, denoise=False, large_steps="allow"), 2, 2),
    "unipc": (UniPC(6, denoise=True), 6, 7),
    "unipc, noise": (UniPC(None, 2, "bh1", "noise", denoise=True, large_steps="allow"), 7, 8),
    "ode": (ProbabilityFlow(), None, None),
    "ode, denoised": (ProbabilityFlow(denoise=True), None, None),
}
each_sampler = pytest.mark.parametrize("name", EVERY)
BETWEEN_LEVELS = ("ode", "churned_heun", "dpm_solver_2", "dpm_solver_3", "dpmpp_2s")
WALKERS = [name for name in EVERY if not name.startswith(BETWEEN_LEVELS)]


def test_every_sampler_is_among_them():
    assert {type(sampler) for sampler, _, _ in EVERY.values()} == set(SAMPLERS.values())
    assert {name.split(",")[0] for name in EVERY} == set(SAMPLERS)


# The times


@pytest.mark.parametrize(
    ("levels", "steps", "spacing"),
    [*itertools.product([10, 1000], [1, 2, 3, 7, 10], ["uniform", "quadratic"])],
)
def test_a_subsequence_of_the_grid(levels, steps, spacing):
    power = {"uniform": 1, "quadratic": 2}[spacing]
    index = [time * levels for time in timesteps_to_zero(Betas(linear_betas(levels)), steps, spacing)[::-1]]
    assert index == pytest.approx([round(i) for i in index], abs=1e-9)
    assert len(index) == steps
    assert index[0] >= 1 - 1e-9
    assert index[-1] == levels
    assert min([1, *(after - before for before, after in itertools.pairwise(index))]) > 0.5
    if levels == 1000:  # No two coincide.
        wanted = [levels * (i / steps) ** power for i in range(1, steps + 1)]
        assert max(abs(i - w) for i, w in zip(index, wanted, strict=True)) <= 0.5 + 1e-9


def test_points_of_the_grid_that_would_coincide_move_up():
    index = [round(20 * t) for t in timesteps_to_zero(Betas(linear_betas(20)), 12, "quadratic")[::-1]]
    assert index == [1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 17, 20]  # From 0, 1, 1, 2, 3, 5, 7, 9, ...
    whole = timesteps_to_zero(Betas(linear_betas(20)), None, "quadratic")[::-1]
    assert whole == pytest.approx([i / 20 for i in range(1, 21)])


@pytest.mark.parametrize("process", [VP(), VE(0.01, 50.0), VP(t_min_sampling=0.3)], ids=["VP", "VE", "late"])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("steps", [1, 2, 10, 250, None, 3000])
def test_a_subsequence_of_continuous_time(process, spacing, steps):
    times = timesteps_to_zero(process, steps, spacing)[::-1]
    power = {"uniform": 1, "quadratic": 2}[spacing]
    count = steps or 1000
    assert len(times) == count
    assert times[-1] == 1.0
    assert times[0] >= process.t_min_sampling - 1e-12
    assert all(before < after for before, after in itertools.pairwise(times))
    if (1 / count) ** power >= process.t_min_sampling:
        assert times == pytest.approx([(i / count) ** power for i in range(1, count + 1)], rel=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 9, None])
def test_the_way_timesteps_to_t_min(steps):
    for levels in (10, 1000):
        index = [levels * t for t in timesteps_to_t_min(Betas(linear_betas(levels)), steps)]
        count = steps or levels - 1
        assert len(index) == count + 1
        assert (index[0], index[-1]) == (levels, pytest.approx(1))
        wanted = [levels - i * (levels - 1) / count for i in range(count + 1)]
        assert max(abs(i - w) for i, w in zip(index, wanted, strict=True)) <= 0.5 + 1e-9
        assert index == pytest.approx([round(i) for i in index], abs=1e-9)
        assert max(after - before for before, after in itertools.pairwise(index)) < -0.5
    times = timesteps_to_t_min(VP(t_min_sampling=0.01), steps)
    assert len(times) == (steps or 1000) + 1
    assert (times[0], times[-1]) == (1.0, 0.01)
    assert {round(before - after, 9) for before, after in itertools.pairwise(times)} == {
        round(0.99 / (steps or 1000), 9)
    }


@pytest.mark.parametrize("make", [Ancestral, DDIM, Euler, Heun, EulerMaruyama, ReverseDiffusion])
def test_more_steps_than_the_model_has_levels_are_refused(make):
    denoiser = ExactDenoiser(MIXTURE, GRID)
    most = LEVELS if make in (Ancestral, DDIM) else LEVELS - 1
    make(most).sample(denoiser, noise_of(2))
    for sampler in (make(most + 1), PredictorCorrector(make(most + 1))):
        with pytest.raises(UserError, match="visits 9 timesteps and the model has 8; ask for fewer steps"):
            sampler.sample(denoiser, noise_of(2))
    with pytest.raises(UserError, match=r"steps is 0; .* or null for every timestep"):
        make(0)


# Evaluations and progress


class Observed(Denoiser):
    """The exact denoiser under observation, with a share of the learned variance."""

    learned_variance = True
    has_energy = True

    def __init__(self, process, on_grid_only=False):
        super().__init__()
        self.process, self.exact = process, ExactDenoiser(MIXTURE, process)
        self.on_grid_only = on_grid_only
        self.calls, self.times, self.conditions = 0, [], set()

    def forward(self, x_t, t, cond=None, began=None):
        assert t.shape == (len(x_t),)
        assert t.dtype == torch.float64
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.times += t.tolist()
        self.conditions.add(cond)
        return replace(self.exact(x_t, t), reverse_log_variance=InterpolatedVariance(torch.full_like(x_t, 0.3)))


@each_sampler
def test_evaluations_and_steps_are_counted_exactly(name):
    sampler, total, evaluations = EVERY[name]
    denoiser, condition = Observed(GRID), Condition()
    for _ in range(2):  # The second call counts anew.
        denoiser.calls, seen = 0, []
        made = sampler.sample(denoiser, noise_of(5), condition, seen.append)
        x = made.x
        assert made.evaluations == denoiser.calls
        assert denoiser.calls == evaluations or (evaluations is None and denoiser.calls > 10)
    assert denoiser.conditions == {condition}
    steps = [progress.step for progress in seen]
    assert all(before < after for before, after in itertools.pairwise(steps))
    assert {progress.total for progress in seen} == {total or 100} == {sampler.length(GRID)}
    assert steps[-1] == sampler.length(GRID)
    times = [progress.t for progress in seen]
    assert all(before >= after for before, after in itertools.pairwise(times))
    assert {progress.x.shape for progress in seen} == {x.shape} == {torch.Size((5, 3))}
    if total is not None:
        assert steps == list(range(1, total + 1))
        assert times == [move.t for move in sampler.plan(GRID)]
    # The last state is the sample, unless the last evaluation is the one that takes off the last noise.
    denoises = getattr(getattr(sampler, "predictor", sampler), "denoise", False)
    assert torch.equal(seen[-1].x, x) is not denoises


@each_sampler
def test_where_a_sampler_starts(name):
    sampler = EVERY[name][0]
    for process in (GRID, VE(0.3, 7.0, num_timesteps=8)):
        first = sampler.start(process, noise_of(1000))
        if "langevin" in name:
            assert torch.equal(first, noise_of(1000).uniform())
        else:
            assert torch.equal(first, process.prior_std * noise_of(1000).normal())
        denoiser, noise = Observed(process), noise_of(4)
        x = sampler.sample(denoiser, noise_of(4)).x
        assert torch.equal(sampler.sample(denoiser, noise, start=sampler.start(process, noise)).x, x)


@each_sampler
def test_the_start_may_be_given(name):
    sampler, start = EVERY[name][0], torch.full((4, 3), 0.3)
    given = sampler.sample(Observed(GRID), noise_of(4), start=start).x
    assert torch.equal(start, torch.full((4, 3), 0.3))
    assert bool((given != sampler.sample(Observed(GRID), noise_of(4)).x).any(1).all())


# The range of the predicted data


def with_clip(sampler, clip):
    """The same sampler with another range."""
    keys = {key: getattr(sampler, key) for key in described(sampler)["init_args"]}
    if isinstance(sampler, PredictorCorrector):
        return PredictorCorrector(**{**keys, "predictor": with_clip(sampler.predictor, clip)})
    return type(sampler)(**{**keys, "clip_x0": clip})


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("langevin")])
def test_a_predicted_datum_is_kept_in_the_range_of_the_data(name):
    denoiser, clip, sampler = Observed(VE(0.3, 3.0, num_timesteps=8)), (-0.1, 0.1), EVERY[name][0]
    free, within = (with_clip(sampler, each).sample(denoiser, noise_of(20)).x for each in (None, clip))
    assert torch.equal(with_clip(sampler, "data").sample(denoiser, noise_of(20)).x, free)  # Which here have none.
    denoiser.data_range = clip
    assert torch.equal(with_clip(sampler, "data").sample(denoiser, noise_of(20)).x, within)
    assert torch.equal(with_clip(sampler, None).sample(denoiser, noise_of(20)).x, free)
    own = getattr(sampler, "predictor", sampler)
    if isinstance(own, EndsAtZero) or own.denoise:
        assert (float(within.min()), float(within.max())) == (pytest.approx(-0.1), pytest.approx(0.1))
    else:
        assert torch.equal(within, free)


@pytest.mark.parametrize("make", [each for each in SAMPLERS.values() if each not in (Langevin, PredictorCorrector)])
def test_the_range_of_the_data_is_every_samplers_default(make):
    assert make().clip_x0 == "data"


def test_a_protocol_says_the_range_that_was_used():
    denoiser = Observed(GRID)
    assert describe(DDIM(5), denoiser) == "DDIM(steps=5, eta=0.0, spacing=uniform, clip_x0=data)"
    denoiser.data_range = (-1.0, 1.0)
    assert describe(DDIM(5), denoiser).endswith("clip_x0=data [-1, 1])")
    assert describe(DDIM(clip_x0=None), denoiser).endswith("clip_x0=null)")
    assert describe(DDIM(clip_x0=(0.0, 0.5)), denoiser).endswith("clip_x0=[0, 0.5])")
    assert (
        "ReverseDiffusion(steps=null, denoise=True, clip_x0=data [-1, 1], large_steps=refuse, spacing=uniform)"
        in describe(PredictorCorrector(), denoiser)
    )


# A sample stands alone


@each_sampler
def test_a_sample_is_the_same_in_any_batch(name):
    sampler, _, _ = EVERY[name]
    for process in (GRID, VE(0.3, 3.0, num_timesteps=8)):
        denoiser = Observed(process)
        together = sampler.sample(denoiser, noise_of(16)).x
        parts = [sampler.sample(denoiser, noise_of(min(7, 16 - first), first=first)).x for first in range(0, 16, 7)]
        torch.testing.assert_close(torch.cat(parts), together, rtol=1e-5, atol=1e-6)
        assert bool((sampler.sample(denoiser, noise_of(16, seed=1)).x != together).any(1).all())
        assert len(together.unique(dim=0)) == 16


@pytest.mark.parametrize("tolerance", [1e-5, 1e-2])
@pytest.mark.parametrize("process", PAPERS.values(), ids=PAPERS)
def test_company_does_not_move_an_adaptive_sample(process, tolerance):
    denoiser, sampler = ExactDenoiser(MIXTURE, process), ProbabilityFlow(tolerance, tolerance)
    together = sampler.sample(denoiser, noise_of(40)).x
    alone = [sampler.sample(denoiser, noise_of(1, first=i)).x for i in range(10)]
    assert float((together[:10] - torch.cat(alone)).abs().max()) < 1e-6


def test_the_bytes_of_an_adaptive_sample_are_the_same_in_any_batch():
    """A network with random weights, in float32, and as it is given fixed batches when it is compiled."""
    torch.manual_seed(0)
    backbone = Convolutions(channels=16)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter *= 2.0
    denoiser, sampler = NetworkDenoiser(backbone, VP(), "edm", "quarter_log_sigma").eval(), ProbabilityFlow()

    def images(batch, count=100):
        starts = range(0, count, batch)
        parts = [sampler.sample(denoiser, noise_of(min(batch, count - i), shape=(1, 8, 8), first=i)).x for i in starts]
        return to_uint8(torch.cat(parts), (-1.0, 1.0))

    together = images(100)
    assert len(np.unique(together)) > 200
    for batch, count, rows in ((16, 100, None), (7, 21, None), (1, 4, None), (7, 7, 16)):
        denoiser.backbone.rows = rows
        assert np.array_equal(images(batch, count), together[:count])


# Precision


class Linear(Backbone):
    """One layer, which autocast runs in bfloat16."""

    def __init__(self):
        super().__init__()
        self.data_shape = (3,)
        self.layer = nn.Linear(3, 3)
        with torch.no_grad():
            self.layer.weight.copy_(0.1 * torch.arange(9).view(3, 3).sin() + 0.5 * torch.eye(3))
            self.layer.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))

    def forward(self, x, c_noise, cond=None):
        raw = self.layer(x)
        self.types = (x.dtype, raw.dtype)
        return raw


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("ancestral, learned", "langevin, metropolis")])
def test_the_state_is_float32_while_the_network_answers_in_bfloat16(name):
    sampler = EVERY[name][0]
    denoiser = NetworkDenoiser(Linear(), GRID, "eps", "index")
    full = sampler.sample(denoiser, noise_of(20)).x
    denoiser.backbone.autocast_dtype = torch.bfloat16
    states = []
    x = sampler.sample(denoiser, noise_of(20), on_step=lambda progress: states.append(progress.x)).x
    assert denoiser.backbone.types == (torch.float32, torch.bfloat16)
    assert x.dtype == torch.float32
    assert {state.dtype for state in states} <= {torch.float32, torch.float64 if "ode" in name else torch.float32}
    for state in (*states, x):
        clipped = (state.abs() == 1.0) | (state == 0.0)
        assert float(((state == state.to(torch.bfloat16)) & ~clipped).float().mean()) < 0.2
    assert not torch.equal(x, full)
    torch.testing.assert_close(x, full, rtol=0.05, atol=0.05)
    assert not x.requires_grad


@each_sampler
def test_a_state_in_float64_stays_so(name):
    sampler, states = EVERY[name][0], []
    x = sampler.sample(Observed(GRID), noise_of(3, dtype=torch.float64), on_step=lambda p: states.append(p.x)).x
    assert {state.dtype for state in (*states, x)} == {torch.float64}
    torch.testing.assert_close(x.float(), sampler.sample(Observed(GRID), noise_of(3)).x, rtol=1e-3, atol=1e-3)


# Processes that no sampler takes


@pytest.mark.parametrize("name", [name for name in EVERY if "langevin" not in name])
def test_a_model_of_one_level_is_refused(name):
    denoiser = Observed(VE(0.3, 0.3, num_timesteps=1))
    with pytest.raises(UserError, match=r"one noise level.*; choose langevin"):
        EVERY[name][0].sample(denoiser, noise_of(2))
    assert denoiser.calls == 0


@pytest.mark.parametrize("name", WALKERS)
@pytest.mark.parametrize("process", [GRID, VE(0.3, 3.0, num_timesteps=8)], ids=["Betas", "VE"])
def test_a_network_that_knows_only_levels_is_asked_at_levels(name, process):
    denoiser = Observed(process, on_grid_only=True)
    EVERY[name][0].sample(denoiser, noise_of(2))
    index = wide(*denoiser.times) * LEVELS
    # Heun's method asks at a level from its own side.
    assert float((index - index.round()).abs().max()) < 1e-6
    assert float(index.min()) > 0.5
    if name == "ddim":
        denoiser.times.clear()
        EVERY[name][0].encode(denoiser, torch.zeros(2, 3).requires_grad_())
        index = wide(*denoiser.times) * LEVELS
        assert float((index - index.round()).abs().max()) < 1e-9


def test_an_adaptive_solver_refuses_a_network_that_knows_only_levels():
    denoiser = Observed(GRID, on_grid_only=True)
    with pytest.raises(UserError, match=r"between its 8 timesteps.*conditional_instance.*e\.g\. ancestral or euler"):
        ProbabilityFlow().sample(denoiser, noise_of(2))
    assert denoiser.calls == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ancestral(variance="small"), ["variance is 'small'", "beta_tilde", "learned"]),
        (lambda: Ancestral(spacing="cubic"), ["spacing is 'cubic'", "quadratic"]),
        (lambda: DDIM(spacing="linear"), ["spacing is 'linear'", "uniform"]),
        (lambda: Ancestral(clip_x0=(1.0, -1.0)), ["clip_x0 is [1, -1]", "below"]),
        (lambda: DDIM(clip_x0=(0.0, 0.0)), ["clip_x0 is [0, 0]"]),
        (lambda: EulerMaruyama(clip_x0="range"), ["clip_x0 is 'range'", "data"]),
        (lambda: ProbabilityFlow(clip_x0=(1.0, 0.0)), ["clip_x0 is [1, 0]", "null"]),
        (lambda: AnnealedLangevin(clip_x0=(1.0, 0.0)), ["clip_x0 is [1, 0]", "null"]),
        (lambda: DDIM(eta=1.5), ["eta is 1.5", "between 0"]),
        (lambda: DDIM(eta=-0.1), ["eta is -0.1"]),
        (lambda: DDIM(eta=float("nan")), ["eta is nan"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
