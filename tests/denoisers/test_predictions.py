import pytest
import torch
from helpers.laws import GAUSSIAN, noise_of, wide

from lit_diffusion.denoisers import Denoiser, EndPoint, Prediction, WrappedDenoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Flow

VIEWS = ("x0", "eps", "score", "velocity")
PROCESSES = {"VE": VE(0.01, 50.0), "VP": VP(), "Flow": Flow()}
T = torch.cat((wide(1e-5, 1e-3), torch.linspace(0.05, 0.95, 10).double()))


def situation(process, t):
    """Known data and noise, what is seen of them, and the truth of each view."""
    x0, eps = noise_of(len(t), dtype=torch.float64).normal(), noise_of(len(t), 1, dtype=torch.float64).normal()
    level = process.coefficients(t)
    score = -eps / level.sigma[:, None]
    velocity = level.dalpha[:, None] * x0 + level.dsigma[:, None] * eps
    return process.perturb(x0, t, eps), level, {"x0": x0, "eps": eps, "score": score, "velocity": velocity}


def error(prediction, truth, view):
    value = truth[view]
    return float(((getattr(prediction, view).double() - value).abs().amax(1) / value.abs().amax(1)).max())


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_whatever_is_known_gives_every_view(process):
    x_t, level, truth = situation(process, T)
    made = [
        Prediction.from_eps(x_t, level, truth["eps"]),
        Prediction.from_x0(x_t, level, truth["x0"]),
        Prediction.from_score(x_t, level, truth["score"]),
        Prediction.from_x0_and_eps(x_t, level, truth["x0"], truth["eps"]),
    ]
    for prediction in made:
        for view in VIEWS:
            assert error(prediction, truth, view) < 1e-8, view


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_of_both_no_digit_is_lost_in_float32(process):
    t = torch.cat((T, wide(0.999999, 1.0)))
    x_t, level, truth = situation(process, t)
    both = Prediction.from_x0_and_eps(x_t.float(), level, truth["x0"].float(), truth["eps"].float())
    for view in VIEWS:
        assert getattr(both, view).dtype == torch.float32
        assert error(both, truth, view) < 2e-6, view
    # Of one of them alone the other is lost.
    assert error(Prediction.from_x0(x_t.float(), level, truth["x0"].float()), truth, "eps") > 5e-6
    if not isinstance(process, VE):
        x0 = Prediction.from_eps(x_t.float(), level, truth["eps"].float()).x0
        assert not bool(((x0.double() - truth["x0"]).abs() < 1e-5).all())


def test_an_energy_is_handed_on():
    x_t, level, truth = situation(PROCESSES["VP"], T)
    energy = torch.arange(len(T))
    for prediction in (
        Prediction.from_eps(x_t, level, truth["eps"], energy),
        Prediction.from_x0(x_t, level, truth["x0"], energy),
        Prediction.from_score(x_t, level, truth["score"], energy),
        Prediction.from_x0_and_eps(x_t, level, truth["x0"], truth["eps"], energy),
    ):
        assert prediction.energy is energy
        assert prediction.reverse_log_variance is None


def test_an_end_point_has_x0_and_refuses_what_only_a_mean_has():
    x_t, level, truth = situation(PROCESSES["VP"], T)
    end = EndPoint.from_x0(x_t, level, truth["x0"])
    assert isinstance(end, EndPoint)
    torch.testing.assert_close(end.x0, truth["x0"])
    for view in ("eps", "score", "velocity"):
        with pytest.raises(UserError, match=f"not a posterior mean, and has no {view}") as caught:
            getattr(end, view)
        assert "\n" not in str(caught.value)


class Halved(WrappedDenoiser):
    """Half of a prediction of x0, without its energy."""

    has_energy = False

    def forward(self, x_t, t, cond=None, began=None):
        inside = self.denoiser(x_t, t, cond, began)
        return Prediction.from_x0(x_t, inside.coefficients, 0.5 * inside.x0)


def test_a_wrapped_denoiser_has_the_properties_of_the_one_inside():
    inside = ExactDenoiser(GAUSSIAN, PROCESSES["VP"])
    wrapped = Halved(Halved(inside))
    assert (inside.has_energy, wrapped.has_energy) == (True, False)
    assert wrapped.process is inside.process
    names = [name for name in Denoiser.__annotations__ if name != "has_energy"]
    assert names == ["process", "predicts", "learned_variance", "on_grid_only", "data_range"]
    # As they are when they are asked for.
    inside.data_range, inside.on_grid_only, inside.learned_variance, inside.predicts = (
        (0.0, 1.0),
        True,
        True,
        "end_point",
    )
    assert all(getattr(wrapped, name) == getattr(inside, name) for name in names)
    x_t = situation(inside.process, T)[0]
    torch.testing.assert_close(wrapped(x_t, T).x0, 0.25 * inside(x_t, T).x0, rtol=1e-6, atol=1e-9)
    # The process is not a second time among its parts.
    assert [name for name, _ in wrapped.named_modules()] == [
        "",
        "denoiser",
        "denoiser.denoiser",
        "denoiser.denoiser.process",
    ]
