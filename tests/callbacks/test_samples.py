"""Pictures from fixed noise, with the averaged weights, that say so and change nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.tiny import digits_data, events, fit, ncsn, points_data, run_logger, same, toy_dsm, trainer, weights
from PIL import Image

from lit_diffusion.callbacks import EMA, Samples
from lit_diffusion.callbacks.samples import FILM_ROWS, _Film
from lit_diffusion.errors import UserError
from lit_diffusion.images import image_grid, to_uint8
from lit_diffusion.samplers import AnnealedLangevin
from lit_diffusion.samplers.base import Progress


def drawn(folder, callbacks, images=96, **keys):
    """A run with these callbacks; returns its method and its folder."""
    method = ncsn(**keys)
    fit(method, digits_data(), folder, images, callbacks=callbacks, logger=run_logger(folder, method))
    return method, folder / "run"


def pictures(run_dir):
    return {path.name: np.asarray(Image.open(path)) for path in sorted((run_dir / "samples").glob("*.png"))}


def grid(x, columns=None):
    picture = image_grid(to_uint8(x, (0.0, 1.0)), columns)
    return picture[..., 0] if picture.shape[-1] == 1 else picture


def test_the_grid_shows_samples_of_the_seed_with_the_averaged_weights(tmp_path):
    ema = EMA([64])
    method, run_dir = drawn(tmp_path, [ema, Samples(count=5, seed=7, film_columns=0)])
    with ema.applied(method, "ema"):
        expected = grid(method.generate(torch.arange(5), seed=7).x)
    raw = grid(method.generate(torch.arange(5), seed=7).x)
    (picture,) = pictures(run_dir).values()
    assert np.array_equal(picture, expected)
    assert not np.array_equal(picture, raw)
    (event,) = events(run_dir, "picture")
    assert event["weights"] == "ema"
    assert event["caption"] == "96 images seen, step 3, weights ema, seed 7"
    assert event["file"] == "samples/samples-0000000096.png"
    assert event["network_evaluations"] == 7
    assert (event["step"], event["images"]) == (3, 96)


@pytest.mark.parametrize(
    ("asked", "half_lives", "used"), [("raw", [64], "raw"), ("ema:500", [64, 500], "ema:500"), ("ema", [], "raw")]
)
def test_other_weights_by_name(tmp_path, asked, half_lives, used):
    ema = EMA(half_lives)
    method, run_dir = drawn(tmp_path, [ema, Samples(count=5, weights=asked, film_columns=0)])
    with ema.applied(method, used):
        expected = grid(method.generate(torch.arange(5), seed=0).x)
    (picture,) = pictures(run_dir).values()
    assert np.array_equal(picture, expected)
    (event,) = events(run_dir, "picture")
    assert event["weights"] == used
    assert f"weights {used}," in event["caption"]


def test_without_an_average_the_raw_weights_are_used_and_named(tmp_path):
    method, run_dir = drawn(tmp_path, [Samples(count=5, film_columns=0)])
    assert np.array_equal(*pictures(run_dir).values(), grid(method.generate(torch.arange(5), seed=0).x))
    (event,) = events(run_dir, "picture")
    assert event["weights"] == "raw"


@pytest.mark.parametrize("half_lives", [[64], []])
def test_weights_that_are_not_kept_are_refused_before_the_training(tmp_path, half_lives):
    method = ncsn()
    with pytest.raises(UserError, match="'ema:3' are not kept"):
        fit(method, digits_data(), tmp_path, callbacks=[Samples(weights="ema:3"), EMA(half_lives)])
    assert method.clock.images == 0


def test_the_cadence_and_the_end(tmp_path):
    _, run_dir = drawn(tmp_path, [Samples(every_n_images=64, count=4, film_columns=2)], 160)
    assert list(pictures(run_dir)) == [
        f"{name}-{images:010d}.png" for name in ("film", "samples") for images in (64, 128, 160)
    ]
    _, run_dir = drawn(tmp_path / "b", [Samples(every_n_images=32, count=4, film_columns=0)], 96)
    assert len(events(run_dir, "picture")) == 3  # the end is not drawn twice


def test_the_same_noise_every_time(tmp_path):
    """With weights that stand still all pictures are one, bit for bit, and drawing twice gives the same."""
    still = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    _, run_dir = drawn(tmp_path, [EMA([64]), Samples(every_n_steps=1, count=4, film_columns=2)], **still)
    shown = pictures(run_dir)
    assert len(shown) == 6
    for name in ("samples", "film"):
        first, *others = (picture for file, picture in shown.items() if file.startswith(name))
        assert all(np.array_equal(first, other) for other in others)
    assert len({picture.tobytes() for picture in shown.values()}) == 2


def test_the_picture_is_the_same_at_any_place_in_the_list(tmp_path):
    shown = []
    for place in range(3):
        callbacks = [EMA([64]), pl.Callback()]
        callbacks.insert(place, Samples(every_n_steps=1, count=4, film_columns=2))
        shown.append(pictures(drawn(tmp_path / str(place), callbacks)[1]))
    assert len(shown[0]) == 6
    for other in shown[1:]:
        assert shown[0].keys() == other.keys()
        assert all(np.array_equal(shown[0][name], other[name]) for name in other)


def test_drawing_does_not_disturb_the_training(tmp_path):
    ends = []
    for count in (0, 4):
        ema = EMA([64])
        callbacks = [ema, Samples(every_n_steps=1, count=count)]
        method, run_dir = drawn(tmp_path / str(count), callbacks, 160, network={"dropout": 0.3})
        assert len(events(run_dir, "picture")) == (10 if count else 0)
        ends.append((weights(method), ema.shadows[0]))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


def test_nothing_is_drawn_with_no_count_or_of_points(tmp_path):
    _, run_dir = drawn(tmp_path, [Samples(every_n_steps=1, count=0)])
    assert pictures(run_dir) == {}
    method = toy_dsm()
    logger = run_logger(tmp_path / "points", method)
    fit(method, points_data(), tmp_path, 64, callbacks=[Samples(every_n_steps=1)], logger=logger)
    assert pictures(tmp_path / "points" / "run") == {}


def test_a_bare_trainer_has_nowhere_to_draw(tmp_path):
    fit(ncsn(), digits_data(), tmp_path, 32, callbacks=[Samples(count=4)])
    assert list(tmp_path.rglob("*.png")) == []


def test_each_class_in_turn_where_there_are_classes(tmp_path):
    method, run_dir = drawn(tmp_path, [Samples(count=12, film_columns=0)], network={"num_classes": 10})
    from lit_diffusion.conditions import Condition

    expected = method.generate(torch.arange(12), 0, Condition(label=torch.arange(12) % 10)).x
    assert np.array_equal(*pictures(run_dir).values(), grid(expected))


def test_a_sampler_that_diverges_costs_the_picture_and_not_the_run(tmp_path, capsys):
    method = ncsn()
    generate = method.generate

    def diverges(*args, **keys):
        made = generate(*args, **keys)
        return replace(made, x=made.x * math.nan)

    method.generate = diverges
    logger = run_logger(tmp_path, method)
    fit(method, digits_data(), tmp_path, 64, callbacks=[Samples(every_n_steps=1, count=4)], logger=logger)
    assert method.clock.images == 64
    assert pictures(tmp_path / "run") == {}
    assert "diverged at 32 images (NaN); no picture" in capsys.readouterr().out


# ---- the film strip ----------------------------------------------------------------------------------------------


def film_of(levels, steps_per_level=2, columns=3):
    """A film of a made-up trajectory: the state after step k of level i is i + k/10."""
    film = _Film(columns)
    total = levels * steps_per_level
    for step in range(total):
        level, k = divmod(step, steps_per_level)
        x = torch.full((5, 1, 2, 2), level + k / 10)
        film(Progress(step + 1, total, 1.0 - level / levels, x))
    return [float(row[0, 0, 0, 0]) for row in film.rows(torch.full((5, 1, 2, 2), -1.0), lambda z: z)], film


def test_the_film_has_a_row_a_level_and_the_end():
    rows, film = film_of(levels=4)
    assert rows == pytest.approx([0.1, 1.1, 2.1, 3.1, -1.0])  # the state at the end of each level
    assert all(len(row) == 3 for row in film.rows(torch.zeros(5, 1, 2, 2), lambda z: z))


@pytest.mark.parametrize("levels", [1, FILM_ROWS - 1, FILM_ROWS, 100])
def test_the_film_is_bounded(levels):
    rows, _ = film_of(levels)
    assert len(rows) == min(levels + 1, FILM_ROWS)
    assert rows[-1] == -1.0
    assert rows[0] == pytest.approx(0.1)  # the first and the last level are always there
    assert rows[-2] == pytest.approx(levels - 1 + 0.1)
    gaps = np.diff(rows[:-1])
    assert all(gap > 0 for gap in gaps)
    assert levels == 1 or gaps.max() - gaps.min() < 1.01


def test_the_film_shows_the_trajectories_of_the_grids_first_samples(tmp_path):
    sampler = AnnealedLangevin(steps_per_level=2, eta=1e-3, denoise=True)
    method, run_dir = drawn(tmp_path, [Samples(count=4, film_columns=3)], sampler=sampler)
    frames = []
    end = method.generate(torch.arange(4), 0, on_step=lambda progress: frames.append(progress.x[:3].clone())).x
    strip = torch.cat([frames[1], frames[3], frames[5], end[:3]])
    assert np.array_equal(pictures(run_dir)["film-0000000096.png"], grid(strip, 3))
    film, samples = sorted(events(run_dir, "picture"), key=lambda event: event["name"])
    assert {key: film[key] for key in ("weights", "seed", "caption")} == {
        key: samples[key] for key in ("weights", "seed", "caption")
    }


def test_no_film_without_columns_and_no_more_columns_than_samples(tmp_path):
    _, run_dir = drawn(tmp_path, [Samples(count=4, film_columns=0)])
    assert list(pictures(run_dir)) == ["samples-0000000096.png"]
    assert Samples(count=4).film_columns == 4


# ---- predict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "used"), [("ema", "ema"), ("raw", "raw")])
def test_predict_uses_the_named_weights_and_gives_the_raw_ones_back(tmp_path, asked, used):
    method, ema = ncsn(network={"num_classes": 10}), EMA([64])
    data = digits_data(4, predict_samples=11)
    made = trainer(tmp_path, 96, callbacks=[Samples(weights=asked, count=0), ema], logger=run_logger(tmp_path, method))
    made.fit(method, datamodule=data)
    raw = weights(method)
    method.seed = 3
    made.predict(method, datamodule=data)
    assert same(weights(method), raw)
    archive = np.load(tmp_path / "run" / "samples" / "predict.npz")
    images = archive["arr_0"]
    cond = method.condition_by_counts(torch.arange(11), 3, data.data_spec.class_counts)
    with ema.applied(method, used):
        expected = method.generate(torch.arange(11), 3, cond).x
    difference = images.astype(int) - to_uint8(expected, (0.0, 1.0)).astype(int)
    assert images.shape == (11, 8, 8, 1)
    assert archive["labels"].tolist() == cond.label.tolist()
    assert np.abs(difference).max() <= 1
    (event,) = events(tmp_path / "run", "predict")
    assert (event["weights"], event["seed"], event["file"]) == (used, 3, "samples/predict.npz")


def test_predict_of_points_keeps_the_numbers(tmp_path):
    method = toy_dsm()
    made = trainer(tmp_path, 32, callbacks=[Samples()], logger=run_logger(tmp_path, method))
    made.predict(method, datamodule=points_data(predict_samples=5))
    points = np.load(tmp_path / "run" / "samples" / "predict.npz")["arr_0"]
    assert points.dtype == np.float32
    assert np.allclose(points, method.generate(torch.arange(5), 0).x.numpy(), atol=1e-5)


def test_samples_that_went_astray_are_said(tmp_path, capsys):
    """In the pictures and by predict, without what it makes for other processes' sake."""
    method = ncsn()
    method.denoiser.backbone.second.bias.data.fill_(-1e5)
    data = digits_data(4, predict_samples=11)
    made = trainer(
        tmp_path, 32, callbacks=[Samples(count=6, film_columns=0), EMA()], logger=run_logger(tmp_path, method)
    )
    made.fit(method, datamodule=data)
    (event,) = events(tmp_path / "run", "picture")
    assert (event["strays"]["count"], event["strays"]["of"]) == (6, 6)
    assert capsys.readouterr().out.count("6 of 6 samples ended far outside") == 1
    made.predict(method, datamodule=data)
    assert capsys.readouterr().out.count("11 of 11 samples ended far outside") == 1


def test_predict_that_diverges_is_one_line(tmp_path):
    method = ncsn()
    method.denoiser.backbone.second.bias.data.fill_(math.nan)
    made = trainer(tmp_path, 32, callbacks=[Samples()], logger=run_logger(tmp_path, method))
    with pytest.raises(UserError, match="diverged"):
        made.predict(method, datamodule=digits_data())
    assert not (tmp_path / "run" / "samples" / "predict.npz").exists()


@pytest.mark.parametrize("keys", [{"count": -1}, {"film_columns": -1}, {"every_n_images": 0}])
def test_a_wrong_configuration(keys):
    with pytest.raises(UserError, match="samples"):
        Samples(**keys)
