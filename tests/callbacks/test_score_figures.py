"""The two toy figures: right where the model is exact, drawn and recorded at the end of a run, refused early."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny import digits_data, events, fit, ncsn, points_data, run_logger, toy_dsm, trainer
from PIL import Image

from lit_diffusion.backbones import MLP
from lit_diffusion.callbacks import EMA, ModeWeights, ScoreField
from lit_diffusion.callbacks.score_figures import mixture_of, score_error
from lit_diffusion.data import GaussianMixturePoints, Rings
from lit_diffusion.denoisers import Prediction
from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.errors import UserError
from lit_diffusion.methods import NCSN
from lit_diffusion.processes import VE
from lit_diffusion.runs.logger import RunLogger
from lit_diffusion.samplers import AnnealedLangevin, Langevin
from lit_diffusion.training.datamodule import DataModule


def toy_ncsn(**keys):
    torch.manual_seed(0)
    keys = {"sampler": AnnealedLangevin(2, eta=0.02, uniform_range=(-8.0, 8.0)), **keys}
    return NCSN(MLP((2,), width=16, depth=1), 20.0, 0.3, 4, "score", "log_sigma", **keys)


def exact_model(folder, process, sampler=None):
    """A trainer and a method whose score is the true one."""
    data = points_data()
    made = SimpleNamespace(datamodule=data, loggers=[RunLogger("toy", run_dir=folder / "run")])
    denoiser = ExactDenoiser(mixture_of(made), process)
    return made, SimpleNamespace(denoiser=denoiser, sampler=sampler, device=torch.device("cpu"))


def picture(run_dir, name):
    (path,) = (run_dir / "samples").glob(f"{name}-*.png")
    image = np.asarray(Image.open(path))
    assert image.ndim == 3
    assert image.std() > 10  # not blank
    return image


# ---- exact -------------------------------------------------------------------------------------------------------


def test_the_law_of_the_data_is_the_sources():
    mixture = mixture_of(SimpleNamespace(datamodule=points_data()))
    assert mixture.weights.tolist() == pytest.approx([0.2, 0.8])
    assert mixture.means.tolist() == [[-5.0, -5.0], [5.0, 5.0]]
    assert torch.equal(mixture.covariances, torch.eye(2, dtype=torch.float64).expand(2, 2, 2))
    source = GaussianMixturePoints(means=[[0.0, 1.0]], weights=[1.0], std=0.5, size=9)
    mixture = mixture_of(SimpleNamespace(datamodule=DataModule(source)))
    assert torch.equal(mixture.covariances[0], 0.25 * torch.eye(2, dtype=torch.float64))


def test_the_exact_score_has_no_error(tmp_path):
    made, method = exact_model(tmp_path, VE(0.5, 0.5, num_timesteps=1))
    ScoreField().draw(made, method, "raw")
    (event,) = events(tmp_path / "run", "score_error")
    assert event["score_error"] == event["score_error_everywhere"] == 0.0
    assert event["sigma"] == pytest.approx(0.5)
    assert event["weights"] == "raw"
    picture(tmp_path / "run", "score-field")


class Off(ExactDenoiser):
    """Scores that are too long by a tenth."""

    def forward(self, x_t, t, cond=None, began=None):
        prediction = super().forward(x_t, t, cond)
        return Prediction.from_score(x_t, prediction.coefficients, 1.1 * prediction.score)


def test_the_error_is_relative_to_the_true_scores_square(tmp_path):
    made, method = exact_model(tmp_path, VE(0.1, 3.0, num_timesteps=4))
    method.denoiser = Off(method.denoiser.distribution, method.denoiser.process)
    ScoreField(sigma=3.0).draw(made, method, "raw")
    (event,) = events(tmp_path / "run", "score_error")
    assert event["score_error"] == pytest.approx(0.01, rel=1e-4)
    assert event["score_error_everywhere"] == pytest.approx(0.01, rel=1e-4)
    assert event["sigma"] == pytest.approx(3.0)
    x, t = torch.randn(5, 2), torch.full((5,), 0.25, dtype=torch.float64)
    exact = ExactDenoiser(method.denoiser.distribution, method.denoiser.process)
    error, norm = score_error(method.denoiser, exact, x, t)
    assert torch.allclose(error, 0.01 * norm, rtol=1e-4)


def test_the_expectation_is_over_the_smoothed_data(tmp_path):
    """A score off by a constant c has the error |c|^2 / E|s|^2, and E|s|^2 = 2/(1 + sigma^2) for modes far apart."""
    made, method = exact_model(tmp_path, VE(1.0, 1.0, num_timesteps=1))

    class Shifted(ExactDenoiser):
        def forward(self, x_t, t, cond=None, began=None):
            prediction = super().forward(x_t, t, cond)
            return Prediction.from_eps(x_t, prediction.coefficients, prediction.eps - 0.3)

    method.denoiser = Shifted(method.denoiser.distribution, method.denoiser.process)
    ScoreField().draw(made, method, "raw")
    (event,) = events(tmp_path / "run", "score_error")
    assert event["score_error"] == pytest.approx(2 * 0.3**2, rel=0.05)


def test_the_error_is_taken_where_the_smoothed_data_are(tmp_path):
    """A score that is right near the modes and wrong elsewhere is right under the density, wrong over the square."""
    made, method = exact_model(tmp_path, VE(0.5, 0.5, num_timesteps=1))

    class Local(ExactDenoiser):
        def forward(self, x_t, t, cond=None, began=None):
            prediction = super().forward(x_t, t, cond)
            nearest = torch.cdist(x_t.double(), self.distribution.means).amin(1)
            eps = torch.where(nearest[:, None] < 5.5, prediction.eps, 0.0)  # five deviations
            return Prediction.from_eps(x_t, prediction.coefficients, eps)

    method.denoiser = Local(method.denoiser.distribution, method.denoiser.process)
    ScoreField().draw(made, method, "raw")
    (event,) = events(tmp_path / "run", "score_error")
    assert event["score_error"] < 1e-4
    assert event["score_error_everywhere"] > 0.2


def test_annealed_chains_find_the_weights_and_plain_ones_do_not(tmp_path):
    sampler = AnnealedLangevin(30, eta=0.02, uniform_range=(-8.0, 8.0))
    made, method = exact_model(tmp_path, VE(0.3, 20.0, num_timesteps=12), sampler)
    ModeWeights(count=1500).draw(made, method, "ema")
    (event,) = events(tmp_path / "run", "mode_weights")
    noise = 4 * (0.2 * 0.8 / 1500) ** 0.5
    assert event["data"] == pytest.approx(0.2, abs=noise)
    assert event["true_annealed"] == pytest.approx(0.2, abs=noise)
    assert event["true_langevin"] == pytest.approx(0.5, abs=0.1)  # half of the starts are nearer to each mode
    assert event["learned_annealed"] == event["true_annealed"]
    assert event["learned_langevin"] == event["true_langevin"]
    assert event["steps"] == 360  # of each sampler
    assert event["weights"] == "ema"
    picture(tmp_path / "run", "mode-weights")


# ---- through a training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("half_lives", "weights"), [([64], "ema"), ([], "raw")])
def test_a_score_field_at_the_end_of_a_run(tmp_path, half_lives, weights):
    method, ema = toy_dsm(), EMA(half_lives)
    figure = ScoreField()
    fit(method, points_data(), tmp_path, 64, callbacks=[figure, ema], logger=run_logger(tmp_path, method))
    (event,) = events(tmp_path / "run", "score_error")
    assert event["images"] == 64
    assert event["weights"] == weights
    assert event["sigma"] == pytest.approx(0.5)
    assert 0.05 < event["score_error"] < 100.0
    picture(tmp_path / "run", "score-field")
    (shown,) = events(tmp_path / "run", "picture")
    assert (shown["name"], shown["score_error"]) == ("score-field", event["score_error"])
    # The number is of the weights that it names.
    other = RunLogger("toy", run_dir=tmp_path / "other")
    made = SimpleNamespace(datamodule=points_data(), loggers=[other])
    method.eval()
    with ema.applied(method, weights):
        figure.draw(made, method, weights)
    (again,) = events(tmp_path / "other", "score_error")
    assert again["score_error"] == event["score_error"]


def test_mode_weights_at_the_end_of_a_run(tmp_path):
    method = toy_ncsn()
    fit(
        method,
        points_data(),
        tmp_path,
        64,
        callbacks=[EMA([64]), ModeWeights(count=200, eta=0.01)],
        logger=run_logger(tmp_path, method),
    )
    (event,) = events(tmp_path / "run", "mode_weights")
    named = ["data", "learned_langevin", "learned_annealed", "true_langevin", "true_annealed"]
    assert all(0.0 <= event[name] <= 1.0 for name in named)
    assert (event["steps"], event["weights"], event["images"]) == (8, "ema", 64)
    assert event["learned_langevin"] != event["true_langevin"]
    picture(tmp_path / "run", "mode-weights")


def test_the_plain_chain_takes_its_own_step(tmp_path):
    _, method = exact_model(tmp_path, VE(0.3, 20.0, num_timesteps=4), AnnealedLangevin(2, eta=0.02))
    assert ModeWeights()._samplers(method)[0].eta == 0.02
    plain, annealed = ModeWeights(eta=0.05, half_side=3.0)._samplers(method)
    assert (plain.eta, plain.steps, plain.uniform_range) == (0.05, 8, (-3.0, 3.0))
    assert annealed is method.sampler


def test_nothing_without_a_runs_logger(tmp_path):
    fit(toy_dsm(), points_data(), tmp_path, 32, callbacks=[ScoreField()])
    assert list(tmp_path.rglob("*.png")) == []


# ---- what is refused, before any training ------------------------------------------------------------------------


def not_in_the_plane():
    return DataModule(GaussianMixturePoints(means=[[0.0] * 3] * 2, weights=[0.5, 0.5], size=50), 10)


@pytest.mark.parametrize(
    ("method", "data", "figure", "said"),
    [
        (ncsn, digits_data, ScoreField, "GaussianMixturePoints in 2-D"),
        (ncsn, digits_data, ModeWeights, "GaussianMixturePoints in 2-D"),
        (toy_dsm, lambda: DataModule(Rings(size=50), 10), ScoreField, "GaussianMixturePoints in 2-D"),
        (toy_dsm, not_in_the_plane, ScoreField, "GaussianMixturePoints in 2-D"),
        (toy_dsm, points_data, lambda: ScoreField(sigma=0.7), "noise level 0.7 is outside"),
        (toy_dsm, points_data, ModeWeights, "must be that"),
        (toy_ncsn, points_data, lambda: ModeWeights(eta=0.36), r"4 sigma\^2"),
        (toy_ncsn, points_data, lambda: ModeWeights(eta=0.0), "eta is 0"),
    ],
)
def test_what_could_not_be_drawn_is_refused_before_the_training(tmp_path, method, data, figure, said):
    model = method()
    made = trainer(tmp_path, 32, callbacks=[figure()], logger=run_logger(tmp_path, model))
    with pytest.raises(UserError, match=said) as caught:
        made.fit(model, datamodule=data())
    assert "\n" not in str(caught.value)
    assert model.clock.images == 0


@pytest.mark.parametrize(
    "make", [lambda: ScoreField(half_side=0.0), lambda: ModeWeights(count=0), lambda: ModeWeights(half_side=-1.0)]
)
def test_a_wrong_configuration(make):
    with pytest.raises(UserError, match="must be positive"):
        make()


def test_a_langevin_step_of_the_wrong_method_is_not_taken_for_annealed():
    method = SimpleNamespace(sampler=Langevin(3, eta=0.1), denoiser=None)
    with pytest.raises(UserError, match="annealed"):
        ModeWeights()._samplers(method)


def test_component_shares_are_by_the_likelier_component():
    mixture = GaussianMixture(
        torch.tensor([0.2, 0.8]), torch.tensor([[-5.0, -5.0], [5.0, 5.0]]), torch.eye(2).expand(2, 2, 2)
    )
    x = torch.tensor([[-5.0, -5.0], [5.0, 5.0], [0.0, 0.0], [-8.0, 2.0]])
    assert ModeWeights._first_mode(mixture, x) == 0.5  # (0, 0) is the heavier mode's
