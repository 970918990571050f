"""Samples are drawn and measured without a Trainer."""

from __future__ import annotations

import pytest
import torch
from helpers.exact_model import GAUSSIAN, ExactModel

from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.denoisers import Guidance, Prediction, WrappedDenoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.errors import UserError
from lit_diffusion.evaluation import Evaluation, RealSets
from lit_diffusion.metrics import RealData, Scores, load_extractor
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers import DDIM

COUNT = 400
NOISE = SampleNoise(9, torch.arange(COUNT), (2,), dtype=torch.float64)
REAL = GAUSSIAN.sample(NOISE.normal(), NOISE.uniform(())).float().numpy()


def real(rows=REAL):
    return RealData.of(InMemory(rows, num_grey_levels=None), torch.arange(len(rows)), "all")


def evaluation(metrics=("fid", "precision"), **keys):
    return Evaluation(RealSets.of(real()), load_extractor("points", (2,)), metrics, **keys)


def test_the_values_are_those_of_the_samples_that_the_model_draws():
    model, said = ExactModel(), []
    made = evaluation(say=said.append)
    found = made.of_model(model, model.sampler, COUNT, seed=3, batch_size=150, keep=5)
    x = model.generate(torch.arange(COUNT), 3).x
    by_hand = Scores(("fid", "precision"), made.extractor, made.scores(made.choose(COUNT)).subject.reference, (2,))
    by_hand.update(x.numpy(), torch.arange(COUNT))
    expected = by_hand.compute(COUNT)
    assert found.result.values == pytest.approx(expected.values, rel=1e-4)
    assert found.result.values["fd/points-400"] < 0.05
    assert {**found.result.protocol, **expected.protocol, "seed": 3, "network_evaluations": 20} == found.result.protocol
    assert found.result.protocol["sampler"].startswith("Ancestral")
    assert sorted(found.kept) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(torch.from_numpy(found.kept[4]), x[4], atol=1e-5, rtol=0)
    assert (found.strays.count, found.strays.of, said) == (0, COUNT, [])


def test_one_evaluation_serves_several_samplers_and_numbers():
    model, made = ExactModel(), evaluation()
    ancestral = made.of_model(model, model.sampler, COUNT, seed=0).result
    reference = made.scores(made.choose(COUNT)).subject.reference
    ddim = made.of_model(model, DDIM(steps=5), 100, seed=0).result
    assert made.scores(made.choose(100)).subject.reference is reference
    assert [*ddim.values] == ["fd/points-100", "precision/points-100"]
    assert (ancestral.protocol["network_evaluations"], ddim.protocol["network_evaluations"]) == (20, 5)
    again = made.of_model(model, model.sampler, COUNT, seed=0).result
    assert (again.values, again.protocol) == (ancestral.values, ancestral.protocol)


class Towards(Guidance):
    """Autoguidance (Karras et al. 2024): x0 + (scale - 1) (x0 - that of a worse model)."""

    def __init__(self, worse, scale):
        self.worse, self.scale = worse, scale

    def __call__(self, denoiser):
        return Away(denoiser, self.worse, self.scale)


class Away(WrappedDenoiser):
    def __init__(self, denoiser, worse, scale):
        super().__init__(denoiser)
        self.worse, self.scale = worse, scale

    def forward(self, x_t, t, cond=None, began=None):
        good, bad = self.denoiser(x_t, t, cond, began), self.worse(x_t, t, cond, began)
        return Prediction.from_x0(x_t, good.coefficients, bad.x0 + self.scale * (good.x0 - bad.x0))


def test_guidance_is_measured_and_said():
    """Away from a Gaussian of twice the covariance: the product of densities that it amounts to is narrower."""
    model, made = ExactModel(), evaluation()
    (covariance,), (mean,) = GAUSSIAN.covariances, GAUSSIAN.means
    worse = ExactDenoiser(GaussianMixture(torch.ones(1), mean[None], 2.0 * covariance[None]), model.denoiser.process)
    plain = made.of_model(model, model.sampler, COUNT, seed=0).result
    guided = made.of_model(model, model.sampler, COUNT, seed=0, guidance=Towards(worse, 2.0)).result
    none = made.of_model(model, model.sampler, COUNT, seed=0, guidance=Towards(worse, 1.0)).result
    assert none.values == pytest.approx(plain.values, rel=1e-3)
    assert guided.values["fd/points-400"] > 2.0 * plain.values["fd/points-400"]
    assert "guidance" not in plain.protocol
    assert guided.protocol["guidance"].startswith("Towards(worse=")


def test_copies_are_looked_for_among_the_training_data():
    model = ExactModel()
    trained_on = model.generate(torch.arange(COUNT), 1).x.numpy()
    sets = RealSets.of(real(), training=real(trained_on))
    found = Evaluation(sets, load_extractor("points", (2,)), ("memorisation",)).of_model(
        model, model.sampler, COUNT, seed=1
    )
    assert found.result.flagged
    assert found.result.protocol["memorisation_n_real"] == COUNT


def test_what_cannot_be_had_is_known_before_any_work():
    with pytest.raises(UserError, match="is cannot be measured: it needs a classifier"):
        evaluation(("is",)).choose(COUNT)
    assert evaluation(None).choose(COUNT).left_out.keys() == {"is"}
    assert evaluation(("fid",)).choose(2).caveats == ()
    one = evaluation(("memorisation",)).choose(1)
    assert (one.metrics, one.left_out) == (("memorisation",), {})
