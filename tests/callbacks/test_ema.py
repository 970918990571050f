"""Averages are the closed form, live beside the raw weights, and come back exactly."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import digits_data, fit, ncsn, run_logger, same, trainer, weights

from lit_diffusion.callbacks import EMA, Checkpoint
from lit_diffusion.callbacks.ema import choose_average, load_average, named_averages
from lit_diffusion.errors import UserError


class Recorder(pl.Callback):
    """The raw weights after each step."""

    def __init__(self):
        self.raw = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.raw.append(weights(pl_module))


def closed_form(start, raw, half_life, batch, ramp):
    """The average after all steps as one weighted sum: each step's share times what later steps left of it."""
    decays = [0.5 ** (batch / min(half_life, ramp * batch * step)) for step in range(1, len(raw) + 1)]
    left, average = 1.0, {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.items()}
    for decay, values in zip(reversed(decays), reversed(raw), strict=True):
        for name in average:
            average[name] += left * (1.0 - decay) * values[name].double()
        left *= decay
    return {name: average[name] + left * start[name].double() for name in average}


# ---- the formula -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ramp", [0.1, 1.0])
def test_averages_equal_the_closed_form(tmp_path, ramp):
    method, recorder = ncsn(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)), Recorder()
    start = weights(method)
    half_lives = [1, 40, 200, 10**6]
    ema = EMA(half_lives, ramp=ramp)
    fit(method, digits_data(), tmp_path, 384, callbacks=[ema, recorder])
    assert ema.updates == len(recorder.raw) == 12
    for half_life, shadow in zip(half_lives, ema.shadows, strict=True):
        for name, expected in closed_form(start, recorder.raw, half_life, 32, ramp).items():
            assert torch.allclose(shadow[name].double(), expected, atol=1e-6), (half_life, name)
    ends = [torch.cat([value.flatten() for value in shadow.values()]) for shadow in ema.shadows]
    if ramp == 1.0:
        assert len({float(end.double().sum()) for end in ends}) == 4


def test_the_ramp_makes_early_averages_short():
    """With no ramp left (a long run) the half-life is the half-life: after H images half of the old is there."""
    method, ema = ncsn(), EMA([320], ramp=0.1)
    method.clock.batch = 32
    ema.on_train_start(None, method)
    for p in method.denoiser.parameters():
        p.data.fill_(1.0)
    for shadow in ema.shadows:
        for value in shadow.values():
            value.zero_()
    method.clock.images = 10_000
    for _ in range(10):
        method.clock.tick()
        ema.after_step(method)
    assert all(torch.allclose(value, torch.full_like(value, 0.5), atol=1e-6) for value in ema.shadows[0].values())
    method.clock.images, method.clock.steps = 0, 0
    method.clock.tick()
    for value in ema.shadows[0].values():
        value.zero_()
    ema.after_step(method)  # the first step: half-life 3.2 images, so 2^-10 of the start is left
    assert all(torch.allclose(value, torch.full_like(value, 1 - 2.0**-10)) for value in ema.shadows[0].values())


def test_only_parameters_are_averaged(tmp_path):
    method, ema = ncsn(), EMA([64])
    buffer = method.denoiser.backbone.seven
    fit(method, digits_data(), tmp_path, 320, callbacks=[ema])
    assert ema.shadows[0].keys() == dict(method.named_parameters()).keys()
    with ema.applied(method, "ema"):
        assert method.denoiser.backbone.seven is buffer
        assert buffer.tolist() == [7919]
    assert buffer.tolist() == [7919]
    assert all(
        shadow.device == p.device for shadow, p in zip(ema.shadows[0].values(), method.parameters(), strict=True)
    )


def test_training_is_the_same_with_and_without(tmp_path):
    ends = []
    for callbacks in ([], [EMA([64, 500])]):
        method = ncsn()
        fit(method, digits_data(), tmp_path, 96, callbacks=callbacks)
        ends.append(weights(method))
    assert same(*ends)


def test_every_callback_sees_the_average_of_the_step_just_made(tmp_path):
    shadows = {}
    for place in ("before", "after"):
        method, ema, seen = ncsn(), EMA([64]), []

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_, ema=ema, seen=seen):
                seen.append({name: value.clone() for name, value in ema.shadows[0].items()})

        callbacks = [Look(), ema] if place == "before" else [ema, Look()]
        fit(method, digits_data(), tmp_path, 96, callbacks=callbacks)
        shadows[place] = seen
    assert len(shadows["before"]) == 3
    assert all(same(a, b) for a, b in zip(shadows["before"], shadows["after"], strict=True))


# ---- applied -----------------------------------------------------------------------------------------------------


def test_applied_gives_the_average_and_restores_the_raw_weights_bit_for_bit(tmp_path):
    method, ema = ncsn(), EMA([64, 500])
    fit(method, digits_data(), tmp_path, 96, callbacks=[ema])
    raw = weights(method)
    for name, position in (("ema", 0), ("ema:64", 0), ("ema:500", 1)):
        with ema.applied(method, name):
            assert same(weights(method), ema.shadows[position])
        assert same(weights(method), raw)
    with ema.applied(method, "raw"):
        assert same(weights(method), raw)
    shadow = {name: value.clone() for name, value in ema.shadows[0].items()}

    class Stop(Exception):
        pass

    def interrupted():
        with ema.applied(method, "ema"):
            next(method.denoiser.parameters()).data.add_(1.0)  # whatever happens inside
            raise Stop

    with pytest.raises(Stop):
        interrupted()
    assert same(weights(method), raw)
    assert same(ema.shadows[0], shadow)


def test_weights_that_are_not_there_are_refused_and_not_the_raw_ones_in_silence():
    method, ema = ncsn(), EMA([64])
    with pytest.raises(UserError, match="'ema' are not in this checkpoint"), ema.applied(method, "ema"):
        raise AssertionError
    with pytest.raises(UserError, match=r"'ema:65' are not kept; choose one of raw, ema, ema:64$"):
        ema.applied(method, "ema:65").__enter__()


def test_names_of_weights():
    assert named_averages([3, 40]) == ["ema:3", "ema:40"]
    assert [choose_average([3, 40], name) for name in ("raw", "ema", "ema:3", "ema:40")] == [None, 0, 0, 1]
    assert choose_average([], "raw") is None
    for half_lives, name in (([], "ema"), ([3], "ema:4"), ([3], "ema:"), ([3], "EMA"), ([3], "ema:3.0")):
        with pytest.raises(UserError, match="not kept; choose one of raw") as caught:
            choose_average(half_lives, name)
        assert "\n" not in str(caught.value)


# ---- half-lives --------------------------------------------------------------------------------------------------


def test_half_lives_in_steps_are_the_same_in_images(tmp_path):
    by_images, by_steps = EMA(half_lives_images=[64, 320]), EMA(half_lives_steps=[2, 10])
    for ema in (by_images, by_steps):
        fit(ncsn(), digits_data(), tmp_path, 128, callbacks=[ema])
    assert by_steps.half_lives == [64, 320]
    assert all(same(a, b) for a, b in zip(by_images.shadows, by_steps.shadows, strict=True))


def test_no_half_lives_no_average(tmp_path):
    for ema in (EMA(), EMA([])):
        made = fit(ncsn(), digits_data(), tmp_path, 64, callbacks=[ema])
        made.save_checkpoint(tmp_path / "a.ckpt")
        assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["EMA"]["shadows"] == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"half_lives_images": [0]}, "half_lives_images"),
        ({"half_lives_steps": [5, -1]}, "half_lives_steps"),
        ({"half_lives_images": [5], "half_lives_steps": [5]}, "not both"),
        ({"ramp": 0.0}, "ramp is 0"),
        ({"ramp": 1.5}, "ramp is 1.5"),
    ],
)
def test_a_wrong_configuration(keys, said):
    with pytest.raises(UserError, match=said) as caught:
        EMA(**keys)
    assert "\n" not in str(caught.value)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_every_checkpoint_holds_both_raw_and_average_as_they_were(tmp_path):
    """At the end of a step, at the end of training, after fit, and when validation raises."""
    live = {}

    class Saver(pl.Callback):
        def save(self, trainer, pl_module, name):
            trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
            shadows = [{k: v.clone() for k, v in shadow.items()} for shadow in ema.shadows]
            live[name] = ({k: v.clone() for k, v in pl_module.state_dict().items()}, shadows, pl_module.clock.steps)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.save(trainer, pl_module, f"step{pl_module.clock.steps}")

        def on_validation_end(self, trainer, pl_module):
            self.save(trainer, pl_module, "validation")

        def on_train_end(self, trainer, pl_module):
            self.save(trainer, pl_module, "train-end")

        def on_exception(self, trainer, pl_module, exception):
            self.save(trainer, pl_module, "exception")

    for place in ("before", "after"):
        live.clear()
        method, ema, saver = ncsn(), EMA([64, 500]), Saver()
        callbacks = [saver, ema] if place == "before" else [ema, saver]
        made = trainer(tmp_path, 96, callbacks=callbacks, limit_val_batches=1)
        made.fit(method, datamodule=digits_data())
        saver.save(made, method, "after")
        method.validation_step = lambda batch, batch_idx: 1 / 0
        with pytest.raises(ZeroDivisionError):
            made.validate(method, datamodule=digits_data())
        assert live.keys() == {"step1", "step2", "step3", "validation", "train-end", "after", "exception"}
        for name, (raw, shadows, steps) in live.items():
            saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
            assert same(saved["state_dict"], raw), name
            assert saved["callbacks"]["EMA"]["half_lives"] == [64, 500]
            assert saved["callbacks"]["EMA"]["updates"] == steps
            for mine, theirs in zip(saved["callbacks"]["EMA"]["shadows"], shadows, strict=True):
                assert same(mine, theirs), name
            assert not same({key: raw[key] for key in shadows[0]}, shadows[0]), name


def saved_after(tmp_path, images, half_lives, **keys):
    method, ema = ncsn(), EMA(half_lives, **keys)
    made = fit(method, digits_data(), tmp_path, images, callbacks=[ema])
    made.save_checkpoint(tmp_path / "a.ckpt")
    return method, ema


def resumed(tmp_path, images, ema):
    start = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            start["shadows"] = [{k: v.clone() for k, v in shadow.items()} for shadow in ema.shadows]
            start["raw"] = weights(pl_module)

    method = ncsn(seed=9)
    fit(method, digits_data(), tmp_path, images, callbacks=[ema, Look()], ckpt_path=tmp_path / "a.ckpt")
    return method, start


def test_resuming_with_the_same_half_lives_is_exact(tmp_path, capsys):
    straight, straight_ema = ncsn(), EMA([64, 500])
    fit(straight, digits_data(), tmp_path, 160, callbacks=[straight_ema])
    saved_after(tmp_path, 96, [64, 500])
    ema = EMA([64, 500])
    method, _ = resumed(tmp_path, 160, ema)
    assert same(weights(straight), weights(method))
    assert all(same(a, b) for a, b in zip(straight_ema.shadows, ema.shadows, strict=True))
    assert ema.updates == straight_ema.updates == 5
    assert "ema:" not in capsys.readouterr().out


def test_resuming_by_steps_what_was_saved_by_images(tmp_path):
    _, first = saved_after(tmp_path, 96, [64])
    ema = EMA(half_lives_steps=[2])
    _, start = resumed(tmp_path, 128, ema)
    assert same(start["shadows"][0], first.shadows[0])


def test_another_half_life_starts_at_the_raw_weights_with_a_note(tmp_path, capsys):
    _, first = saved_after(tmp_path, 96, [64, 500])
    ema = EMA([500, 7])
    _, start = resumed(tmp_path, 128, ema)
    assert same(start["shadows"][0], first.shadows[1])  # kept
    assert same(start["shadows"][1], start["raw"])  # new
    assert "no average of half-life [7] images; it starts at its raw weights" in capsys.readouterr().out
    assert not same(ema.shadows[1], start["raw"])


def test_a_checkpoint_without_averages_starts_them_at_its_raw_weights_with_a_note(tmp_path, capsys):
    saved_after(tmp_path, 96, [])
    _, start = resumed(tmp_path, 128, EMA([64]))
    assert same(start["shadows"][0], start["raw"])
    assert "[64]" in capsys.readouterr().out


def test_the_order_of_the_names_in_a_file_does_not_matter(tmp_path):
    _, first = saved_after(tmp_path, 96, [64])
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (shadow,) = saved["callbacks"]["EMA"]["shadows"]
    saved["callbacks"]["EMA"]["shadows"] = [dict(reversed(shadow.items()))]
    torch.save(saved, tmp_path / "a.ckpt")
    ema = EMA([64])
    method, start = resumed(tmp_path, 128, ema)
    assert same(dict(start["shadows"][0]), first.shadows[0])
    assert list(ema.shadows[0]) == [name for name, _ in method.named_parameters()]


def test_load_average_is_for_good(tmp_path):
    method, ema = saved_after(tmp_path, 96, [64, 500])
    raw = weights(method)
    load_average(method, ema.state_dict(), "raw")
    assert same(weights(method), raw)
    load_average(method, ema.state_dict(), "ema:500")
    assert same(weights(method), ema.shadows[1])
    with pytest.raises(UserError, match="not kept"):
        load_average(method, None, "ema")


def test_the_checkpoint_callback_comes_after_the_average_wherever_it_is_listed(tmp_path):
    method, ema = ncsn(), EMA([64])
    logger = run_logger(tmp_path, method)
    fit(method, digits_data(), tmp_path, 64, callbacks=[Checkpoint(every_n_steps=1), ema], logger=logger)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert same(saved["callbacks"]["EMA"]["shadows"][0], ema.shadows[0])
