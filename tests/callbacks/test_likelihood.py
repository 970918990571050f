"""What ``test`` measures, through the command line."""

import json
import math

import pytest
import yaml
from helpers.tiny import TINY, events

from lit_diffusion.__main__ import dispatch
from lit_diffusion.callbacks import Likelihood
from lit_diffusion.errors import UserError

NETWORK = TINY["model"]["init_args"]["backbone"]
SMALL = {
    **TINY,
    "data": {**TINY["data"], "value_range": [-1.0, 1.0]},
    "trainer": {**TINY["trainer"], "max_images": 320},
    "samples": {"count": 0},
}


def trained(folder, model):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({**SMALL, "model": model}))
    dispatch(["fit", "--config", str(folder / "run.yaml"), "--run_dir", str(folder / "run")])
    return folder / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def vp(tmp_path_factory):
    process = {"class_path": "VP"}
    keys = {"process": process, "c_noise": "time_999", "backbone": NETWORK, "reduction": "mean"}
    return trained(tmp_path_factory.mktemp("vp"), {"class_path": "ScoreSDE", "init_args": keys})


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    keys = {"num_timesteps": 20, "beta_T": 0.4, "variance": "learned", "loss": "hybrid", "backbone": NETWORK}
    return trained(tmp_path_factory.mktemp("ddpm"), {"class_path": "DDPM", "init_args": keys})


@pytest.fixture
def measure(tmp_path):
    def call(checkpoint, *arguments):
        folder = tmp_path / f"test{len(list(tmp_path.iterdir()))}"
        loose = ("--likelihood.rtol", "1e-3", "--likelihood.atol", "1e-3", "--likelihood.bound_steps", "20")
        alone = ("--eval.metrics", "[]")
        given = ["test", "--ckpt_path", checkpoint, "--run_dir", folder, *alone, *loose, *arguments]
        dispatch([str(argument) for argument in given])
        return folder

    return call


def test_it_reports_both_likelihoods_and_says_that_neither_bounds_the_other(measure, vp, capsys):
    run = measure(vp)
    printed = capsys.readouterr().out
    ode, bound = events(run, "test")
    assert ode["images"] == bound["images"] == 36
    for event, key in ((ode, "bpd_ode"), (bound, "bpd_bound")):
        assert 1.0 < event[key] < 20.0
        assert 0.0 < event[f"{key}_error"] < 1.0
        assert event["weights"] == "ema"
        assert f"{event[key]:.4f} +- {event[f'{key}_error']:.4f}" in printed
    assert f"{bound['bpd_bound'] - ode['bpd_ode']:+.4f}" in printed
    assert "neither number bounds the other" in printed
    parts = [bound[f"bpd_bound_{name}"] for name in ("prior", "kl", "decoder")]
    assert sum(parts) == pytest.approx(bound["bpd_bound"], rel=1e-9)
    assert sum(bound["kl_by_time"]) == pytest.approx(bound["bpd_bound_kl"], rel=1e-6)
    assert len(bound["kl_by_time"]) == len(bound["times"]) == 19
    (picture,) = events(run, "picture")
    assert (run / picture["file"]).is_file()
    (loss,) = events(run, "metrics")
    assert loss["weights"] == "ema"


def test_one_datum_has_no_standard_error(measure, ddpm, capsys):
    run = measure(ddpm, "--data.held_out_fraction", "0.0006", "--likelihood.metrics", "[bpd_bound]")
    (event,) = events(run, "test")
    assert event["images"] == 1
    assert "bpd_bound_error" not in event
    said = capsys.readouterr().out
    assert f"{event['bpd_bound']:.4f}  (prior" in said
    assert "+-" not in said


@pytest.mark.slow
def test_the_batch_changes_nothing(measure, ddpm):
    tight = ("--likelihood.rtol", "1e-5", "--likelihood.atol", "1e-5")
    many = events(measure(ddpm, *tight), "test")
    few = events(measure(ddpm, *tight, "--data.global_batch_size", "7"), "test")
    for first, second in zip(many, few, strict=True):
        for key in ("bpd_ode", "bpd_bound"):
            if key in first:
                assert first[key] == pytest.approx(second[key], rel=1e-3 if key == "bpd_ode" else 1e-5)
    chain = {"variance": "learned", "first_variance": "between beta and beta_tilde of the second step"}
    assert {**many[1], **chain, "clip_x0": "data [-1, 1]", "steps": 20} == many[1]


def test_the_bound_is_of_the_chain_that_the_methods_sampler_draws_from(measure, ddpm, capsys):
    """Its steps, variance and range; a key of one's own goes before the sampler's."""
    walk = {"steps": 10, "variance": "beta_tilde", "spacing": "quadratic", "clip_x0": None}
    given = ("--model.sampler", json.dumps({"class_path": "Ancestral", "init_args": walk}), "--eval.metrics", "[]")
    alone = ("--likelihood.metrics", "[bpd_bound]", "--likelihood.bound_steps")
    chain = {"variance": "beta_tilde", "first_variance": "beta_tilde of the second step", "clip_x0": "null"}
    (event,) = events(measure(ddpm, *given, *alone, "null"), "test")
    assert {**event, **chain, "steps": 10, "spacing": "quadratic"} == event
    assert "10 steps, variance beta_tilde, first beta_tilde of the second step, clip_x0 null" in capsys.readouterr().out
    (own,) = events(measure(ddpm, *given, *alone, "5", "--likelihood.bound_variance", "beta"), "test")
    assert {**own, **chain, "variance": "beta", "steps": 5} == own
    assert own["bpd_bound"] != event["bpd_bound"]


def test_what_is_measured_is_one_key(measure, vp):
    (event,) = events(measure(vp, "--likelihood.metrics", "[bpd_bound]"), "test")
    assert "bpd_bound" in event
    other = events(measure(vp, "--likelihood.metrics", "[bpd_bound]", "--likelihood.bound_sampled", "5"), "test")[0]
    assert other["sampled"] == 5
    assert other["bpd_bound"] == pytest.approx(
        event["bpd_bound"], abs=5 * math.hypot(*(e["bpd_bound_error"] for e in (event, other)))
    )
    assert not events(measure(vp, "--likelihood.metrics", "[]"), "test")


def test_weights_are_chosen_by_name(measure, vp):
    ema, raw = (
        events(measure(vp, "--likelihood.metrics", "[bpd_bound]", "--likelihood.weights", weights), "test")[0]
        for weights in ("ema:500", "raw")
    )
    assert ema["weights"] == "ema:500"
    assert raw["weights"] == "raw"
    assert ema["bpd_bound"] != raw["bpd_bound"]


def test_the_smallest_time_has_a_figure(measure, vp, capsys):
    run = measure(
        vp,
        "--likelihood.metrics",
        "[smallest_time]",
        "--likelihood.smallest_times",
        "[0.01, 0.3]",
        "--likelihood.samples",
        "20",
    )
    (event,) = events(run, "smallest_time")
    assert event["smallest_times"] == [0.3, 0.01]
    assert len(event["bpd_ode"]) == len(event["fd/pixels-20"]) == 2
    assert event["bpd_ode"][0] != event["bpd_ode"][1]
    assert all(distance > 0 for distance in event["fd/pixels-20"])
    (picture,) = events(run, "picture")
    assert (run / picture["file"]).is_file()
    assert "fd/pixels-20" in capsys.readouterr().out


def test_a_model_of_one_level_has_no_likelihood(measure, tmp_path, capsys):
    keys = {"sigma": 0.5, "backbone": NETWORK}
    checkpoint = trained(tmp_path / "dsm", {"class_path": "DSM", "init_args": keys})
    run = measure(checkpoint)
    assert not events(run, "test")
    assert "test/loss" in events(run, "metrics")[0]
    assert capsys.readouterr().out.count("not measured") == 2
    for metric in ("bpd_ode", "bpd_bound"):
        with pytest.raises(UserError, match="one noise level"):
            measure(checkpoint, "--likelihood.metrics", f"[{metric}]")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metrics": ["fid"]}, "bpd_ode"),
        ({"probes": 0}, "probes"),
        ({"bound_steps": 0}, "bound_steps"),
        ({"samples": 1}, "samples"),
        ({"smallest_times": (0.0,)}, "smallest time"),
        ({"t_min": 1.5}, "smallest time"),
        ({"trace": "none"}, "trace"),
    ],
)
def test_wrong_values_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        Likelihood(**keys)


def test_a_learned_variance_that_is_not_there_is_refused(measure, vp):
    with pytest.raises(UserError, match="learned"):
        measure(vp, "--likelihood.bound_variance", "learned")
