import pytest
import torch
from helpers.tiny import digits_data, events, fit, ncsn, points_data, run_logger, same, toy_dsm, weights

from lit_diffusion.backbones import MLP
from lit_diffusion.callbacks import NoiseLevels
from lit_diffusion.errors import UserError
from lit_diffusion.methods import NCSN, ScoreSDE
from lit_diffusion.processes import VP
from lit_diffusion.randomness import keyed_normal
from lit_diffusion.training.datamodule import Batch


def drawn(tmp_path, method, data, **keys):
    logger = run_logger(tmp_path, method)
    fit(method, data, tmp_path, callbacks=[NoiseLevels(**keys)], logger=logger)
    return logger.run_dir


def test_it_records_and_draws_every_level(tmp_path):
    method = ncsn()
    run = drawn(tmp_path, method, digits_data(), images=16)
    (event,) = events(run, "noise_levels")
    assert len(event["loss"]) == len(event["gradient_norm"]) == 3  # the method has three levels
    assert event["sigma_over_alpha"] == pytest.approx([0.1, 0.2**0.5, 2.0])
    assert "score_error" not in event
    assert (run / "samples" / "noise-levels-0000000096.png").is_file()


def test_the_numbers_are_those_of_the_loss_and_its_gradient(tmp_path):
    method, data = ncsn(), digits_data()
    (event,) = events(drawn(tmp_path, method, data, images=16), "noise_levels")
    index = torch.arange(16)
    x = data.training_values(index)
    eps = keyed_normal(method.seed, "noise levels", index, (1, 8, 8))
    for k, time in enumerate(event["times"]):
        method.zero_grad()
        t = torch.full((16,), time, dtype=torch.float64)
        loss = method.loss_given_t(Batch(x, index), t, eps).per_sample.mean()
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in method.denoiser.parameters()]).sum().sqrt()
        assert event["loss"][k] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert event["gradient_norm"][k] == pytest.approx(float(norm), rel=1e-4)


def test_looking_changes_nothing(tmp_path):
    plain, watched = ncsn(network={"dropout": 0.3}), ncsn(network={"dropout": 0.3})
    fit(plain, digits_data(), tmp_path / "a")
    drawn(tmp_path / "b", watched, digits_data(), every_n_steps=1, images=8)
    assert same(weights(plain), weights(watched))
    assert watched.training


def test_where_the_score_is_known_its_error_is_shown(tmp_path):
    torch.manual_seed(0)
    method = NCSN(MLP((2,), width=16, depth=1), 4.0, 0.5, 4, "score", "log_sigma")
    (event,) = events(drawn(tmp_path, method, points_data()), "noise_levels")
    assert len(event["score_error"]) == 4
    # At a level of noise far above the data's spread the score is nearly that of the noise alone.
    assert all(error > 0.0 for error in event["score_error"])
    assert event["score_error"][-1] < event["score_error"][0]


def test_continuous_time_is_divided_evenly():
    method = ScoreSDE(MLP((2,), width=16, depth=1), VP(), c_noise="time_999")
    times = NoiseLevels(num_levels=5).times(method)
    assert times.tolist() == pytest.approx([1e-5, 0.25, 0.5, 0.75, 1.0], abs=1e-4)


def test_a_single_level_is_one_point(tmp_path):
    (event,) = events(drawn(tmp_path, toy_dsm(), points_data()), "noise_levels")
    assert len(event["loss"]) == 1


def test_none_are_drawn_and_wrong_numbers_refused(tmp_path):
    assert not events(drawn(tmp_path, ncsn(), digits_data(), num_levels=0), "noise_levels")
    with pytest.raises(UserError, match="images 0 must be positive"):
        NoiseLevels(images=0)
    with pytest.raises(UserError, match="every_n_steps"):
        NoiseLevels(every_n_steps=0)
