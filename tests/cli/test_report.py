"""``report``: a run's dashboard from its own files; whole, self-contained, harmless and honest."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import yaml
from helpers.tiny import events
from PIL import Image

from lit_diffusion.__main__ import dispatch
from lit_diffusion.errors import UserError
from lit_diffusion.images import png_bytes
from lit_diffusion.metrics.catalogue import CATALOGUE, better, metric_of, row_of
from lit_diffusion.plots.figures import new_figure
from lit_diffusion.plots.panels import Curve, metric_panels, noise_level_panels, protocols_of, smoothed, training_panels
from lit_diffusion.runs.events import read_run

HOSTILE = "<script>alert('\"&$x^{')</script>"
PROTOCOL = {"extractor": "digits", "resize": "none", "n_fake": 500, "sampler": "ancestral", "seed": 0, "stage": "fit"}


def evaluation(images: int, quality: float, **protocol) -> dict:
    """An event of the shape that evaluations have."""
    figures = {
        "fd": 2.0 / quality,
        "is": 9.0 * quality,
        "kd": 0.01 / quality,
        "precision": 0.9 * quality,
        "recall": 0.8 * quality,
        "density": 0.9 * quality,
        "coverage": 0.7 * quality,
        "near_copies": 0.01 * quality,
        "memorised": 0.0,
        "nn_ratio": 1.0 - 0.1 * quality,
        "authenticity": 1.0 - 0.4 * quality,
    }
    return {
        "event": "evaluation",
        "images": images,
        **{f"{name}/digits-500": value for name, value in figures.items()},
        "seconds": 12.0,
        "errors": {"kd/digits-500": 0.003},
        "intervals": {"fd/digits-500": [1.5, 2.5]},
        "samples_file": f"samples/evaluation-{images:010d}.npz",
        "protocol": {**PROTOCOL, **protocol},
    }


def all_events() -> list[dict]:
    """Every kind of event that a run may have, of a run that was continued once."""
    made: list[dict] = [{"event": "start", "images": 0, "format_version": 1, "run_id": "an-id", "resumed": False}]
    for step in range(1, 61):
        if step == 31:
            made.append({"event": "start", "images": 120_000, "format_version": 1, "run_id": "an-id", "resumed": True})
        by_time = {f"loss@{(k + 0.5) / 10:.2f}": (1 + 5 / step) * math.exp(-0.4 * k) for k in range(10)}
        train = {"loss": 1.0 + 5.0 / step, "gradient_norm": 3.0 / step + 0.1 * (step % 3), "learning_rate": 2e-3}
        speed = {"images_per_second": 400.0 + 10 * (step % 5), "skipped_steps": step // 20}
        made.append({"event": "train", "images": 4000 * step, **train, **speed, **by_time})
        if step % 12 == 0:
            made.append({"event": "metrics", "images": 4000 * step, "val/loss": 1.2 + 3.0 / step, "weights": "raw"})
            made.append(evaluation(4000 * step, step / 60))
            made += [
                {
                    "event": "picture",
                    "images": 4000 * step,
                    "name": name,
                    "file": f"samples/{name}-{4000 * step:010d}.png",
                    "caption": f"{4000 * step} images seen, weights ema",
                    "network_evaluations": 1000,
                }
                for name in ("samples", "film", "neighbours", "noise-levels", "smallest-time", "mine")
            ]
    made += [
        {"event": "metrics", "images": 240_000, "test/loss": 0.07, "mine/number": 4.5, "weights": "ema"},
        {"event": "noise_levels", "images": 240_000, "times": [0.1, 1.0], "loss": [0.7, 0.001]},
        {
            "event": "test",
            "images": 180,
            "bpd_ode": 2.1061,
            "bpd_ode_error": 0.0175,
            "weights": "ema",
            "seed": 0,
            "rtol": 1e-5,
            "t_min": None,
        },
        {
            "event": "test",
            "images": 180,
            "bpd_bound": 2.975,
            "bpd_bound_error": 0.02,
            "bpd_bound_kl": 2.97,
            "steps": 1000,
            "variance": "beta",
            "kl_by_time": [1.0, 1.97],
        },
        {
            "event": "test",
            "images": 240_000,
            "fd/digits-500/mean": 0.25,
            "fd/digits-500/min": 0.2,
            "protocol": {"sampler": "ddim", "n_fake": 500, "seeds": [0, 1], "split": "train"},
        },
        {"event": "smallest_time", "images": 240_000, "smallest_times": [0.1, 0.01], "bpd_ode": [3.1, 2.2]},
        {"event": "score_error", "images": 240_000, "score_error": 0.03, "sigma": 0.5},
        {"event": "end", "images": 240_000, "status": "success"},
    ]
    return [{"step": event["images"] // 128, "time": 1.79e9 + 10 * n, **event} for n, event in enumerate(made)]


def write_run(folder, made, config="experiment: synthetic\n", torn=()):
    """A run's directory of these events, with all their pictures."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    generator = np.random.default_rng(0)
    for event in made:
        if event["event"] == "picture":
            grid = generator.integers(0, 256, (64, 96, 1), dtype=np.uint8)
            (folder / event["file"]).write_bytes(png_bytes(grid))
    (folder / "metrics.jsonl").write_text("\n".join([*map(json.dumps, made), *torn]))
    return folder


class Page(HTMLParser):
    """What a page holds: its elements, its texts and its pictures."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.texts, self.pictures, self.policy = [], [], [], [], ""
        self.raw = path.read_text()
        self.feed(self.raw)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        given = dict(attrs)
        self.pictures += [given[key] for key in ("src", "srcset") if key in given]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]

    def handle_data(self, data):
        self.texts.append(data)

    def decoded(self):
        """The pictures as arrays."""
        made = []
        for source in self.pictures:
            assert source.startswith("data:image/png;base64,")
            made.append(np.asarray(Image.open(BytesIO(base64.b64decode(source.partition(",")[2])))))
        return made


def report(folder, *arguments):
    dispatch(["report", str(folder), *map(str, arguments)])
    return Page(folder / "report" / "report.html")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A report over every kind of event."""
    folder = write_run(tmp_path_factory.mktemp("synthetic") / "run", all_events(), torn=['{"event": "train", "ima'])
    return folder, report(folder)


# ---- the page ----------------------------------------------------------------------------------------------------


def test_everything_recorded_is_on_the_page(synthetic):
    _, page = synthetic
    for text in (
        "synthetic",
        "an-id",
        "240,000",
        "success",
        "at 120,000 images",
        "2026-09-21 14:13 UTC",
        "Frechet distance: digits-500",
        "Inception score: digits-500",
        "Kernel distance: digits-500",
        "Precision and recall: digits-500",
        "Density and coverage: digits-500",
        "Memorisation: digits-500",
        "Held-out loss",
        "Training loss",
        "Gradient norm",
        "Learning rate",
        "Skipped steps",
        "Loss by noise level",
        "Loss against t",
        "Throughput",
        "Time of an evaluation",
        "Samples and their nearest training images",
        "From noise to samples",
        "240000 images seen, weights ema; network evaluations 1000",
        "bpd_ode 2.1061 ± 0.0175 180 weights ema, seed 0, rtol 1e-05",
        "bpd_bound_kl 2.9700",
        "test/loss 0.0700",
        "fd/digits-500 2 95 %: 1.5 to 2.5 240,000 2 240,000",
        "kd/digits-500 0.01 ± 0.003 240,000",
        "fd/digits-500/mean 0.2500 sampler ddim, n_fake 500, seeds 0, 1",
        "0.01 2.2",
        "mine/number",
        "score_error 0.03, sigma 0.5",
        "extractor digits",
        "experiment: synthetic",
    ):
        assert text in page.text, text
    assert "differ in" not in page.text  # one protocol
    assert "1 line of metrics.jsonl is torn" in page.text


def test_every_picture_decodes_inside_the_page_and_beside_it(synthetic):
    folder, page = synthetic
    panels = sorted((folder / "report").glob("*.png"))
    assert len(panels) >= 16
    shown = page.decoded()
    recorded = 6
    assert len(shown) == 2 * len(panels) + recorded  # light and dark
    for path in panels:
        picture = np.asarray(Image.open(path))
        assert picture.ndim == 3
        assert picture.std() > 1.0  # not empty
        assert any(np.array_equal(picture, other) for other in shown)
    for path in (folder / "samples").glob("*-0000240000.png"):
        assert any(np.array_equal(np.asarray(Image.open(path)), other) for other in shown), path


def test_the_page_needs_nothing_else(synthetic):
    _, page = synthetic
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not {"href", "action", "onload", "onerror", "onclick", "style"} & {key for key, _ in page.attributes}
    assert "http://" not in page.raw
    assert "https://" not in page.raw
    assert "url(" not in page.raw
    assert "@import" not in page.raw
    (style,) = re.findall(r"<style>(.*?)</style>", page.raw, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert page.policy.startswith(f"default-src 'none'; img-src data:; style-src 'sha256-{digest}';")
    assert "prefers-color-scheme: dark" in style


def test_hostile_texts_stay_texts(tmp_path):
    made = all_events()
    for event in made:
        for key in ("run_id", "status", "caption", "weights"):
            if key in event:
                event[key] = HOSTILE
        if event["event"] == "evaluation":
            event[f"fd/{HOSTILE}"] = 1.0
            event[HOSTILE] = 2.0
            event["protocol"] = {HOSTILE: HOSTILE, "../../up": [HOSTILE, {"a": HOSTILE}]}
        if event["event"] == "metrics":
            event["../../../up$"] = 3.0
            event[f"test/{HOSTILE}"] = 3.0
        if event["event"] == "score_error":
            event["event"] = HOSTILE
    before = set(tmp_path.rglob("*"))
    folder = write_run(tmp_path / "run", made, yaml.safe_dump({"experiment": HOSTILE, "data": f"</pre>{HOSTILE}"}))
    page = report(folder)
    assert HOSTILE.partition(">")[0] not in page.raw
    assert "script" not in page.tags
    assert page.text.count("alert(") > 10
    assert all(path == folder or folder in path.parents for path in set(tmp_path.rglob("*")) - before)
    assert page.decoded()


def test_pictures_outside_the_run_and_broken_ones_are_not_shown(tmp_path):
    (tmp_path / "secret.png").write_bytes(png_bytes(np.full((5, 5, 1), 7, np.uint8)))
    folder = write_run(tmp_path / "run", all_events()[:1])
    (folder / "samples" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    (folder / "samples" / "text.png").write_text("<svg onload=alert(1)>")
    (folder / "samples" / "link.png").symlink_to(tmp_path / "secret.png")
    whole = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    (folder / "samples" / "whole.png").write_bytes(png_bytes(whole))
    files = ["../secret.png", str(tmp_path / "secret.png"), "samples/../../secret.png", "samples/link.png", "\0", None]
    files += ["samples/broken.png", "samples/text.png", "samples/gone.png", "samples", 3, "samples/whole.png"]
    base = {"event": "picture", "step": 0, "images": 0, "time": 0.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f"\n{json.dumps({**base, 'name': f'p{n}', 'file': name})}" for n, name in enumerate(files))
    page = report(folder)
    (shown,) = page.decoded()
    assert np.array_equal(shown, whole)
    assert "not there any more, or no PNG: ../secret.png" in page.text


# ---- what is left out, and said --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "torn",
    [
        '{"event": "train", "ima',
        "[]",
        "3",
        "\x00\x00",
        '{"event": "train"}',
        '{"event": 3, "images": 1, "time": 1}',
        '{"event": "train", "images": true, "time": 1}',
        '{"event": "train", "images": 1e3, "time": 1}',
        '{"event": "train", "images": 1, "time": "nan"}',
        f'{{"event": "train", "images": 1{"0" * 400}, "time": 1}}',
        f'{{"event": "train", "images": 1{"0" * 5000}, "time": 1}}',
        "[" * 100_000,
    ],
    ids=range(12),
)
def test_lines_that_are_no_events_are_counted_and_left_out(tmp_path, torn):
    folder = write_run(tmp_path / "run", all_events()[:5], torn=[torn, "", torn])
    run = read_run(folder)
    assert run.torn == 2
    assert [event["event"] for event in run.events] == ["start", *["train"] * 4]


def test_torn_lines_are_said_on_the_page_and_at_the_terminal(tmp_path, capsys):
    folder = write_run(tmp_path / "run", all_events()[:5], torn=["{", "\ufffd"])
    assert "2 lines of metrics.jsonl are torn, as a kill leaves them, and left out" in report(folder).text
    said = capsys.readouterr().out
    assert "2 lines of metrics.jsonl are torn" in said
    assert f"wrote {folder}/report/report.html" in said


def test_what_is_not_finite_is_a_gap_that_is_said(tmp_path):
    made = all_events()
    trains = [event for event in made if event["event"] == "train"]
    trains[3]["loss"], trains[4]["loss"], trains[5]["loss"] = "nan", "inf", math.nan
    evaluations = [event for event in made if event["event"] == "evaluation"]
    for event in evaluations:
        event["kd/digits-500"] = "nan"
    page = report(write_run(tmp_path / "run", made))
    assert "loss: 3 of 60 values are NaN or infinite" in page.text
    assert "kd/digits-500: 5 of 5 values" in page.text
    assert "Kernel distance" not in page.text
    assert "kd/digits-500 nan ± 0.003 240,000" in page.text


def test_an_empty_run_and_one_that_still_runs(tmp_path):
    page = report(write_run(tmp_path / "run", all_events()[:1]))
    assert "not ended: it runs, or was killed" in page.text
    assert "Evaluation" not in page.text
    assert page.pictures == []
    assert page.tags.count("section") == 1  # the configuration
    (tmp_path / "run" / "config.yaml").write_text("{: not yaml")
    assert "{: not yaml" in report(tmp_path / "run").text
    (tmp_path / "run" / "config.yaml").unlink()
    page = report(tmp_path / "run")
    assert "There is no config.yaml" in page.text
    assert "<h1>run</h1>" in page.raw


def test_a_continued_run_that_was_killed_has_not_ended(tmp_path):
    made = all_events()
    end = made.pop()
    first = next(n for n, event in enumerate(made) if event.get("resumed"))
    made.insert(first, {**end, "images": 120_000, "time": made[first - 1]["time"]})
    page = report(write_run(tmp_path / "run", made))
    assert "not ended: it runs, or was killed" in page.text


# ---- protocols ---------------------------------------------------------------------------------------------------


def drawn_lines(panel):
    """The lines of a panel as lists of points, without their style."""
    _, axes = new_figure(1, 1)
    panel.draw(axes[0, 0])
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in axes[0, 0].get_lines()}


def test_evaluations_of_different_protocols_are_never_joined(tmp_path):
    made = [
        all_events()[0],
        *({"step": 1, "time": 1.0, **evaluation(images, 0.5)} for images in (10, 20)),
        {"step": 1, "time": 1.0, **evaluation(20, 0.7, stage="test", sampler="ddim")},
        {"step": 1, "time": 1.0, **evaluation(30, 0.6)},
        {"step": 1, "time": 1.0, **evaluation(40, 0.8, stage="test", sampler="ddim")},
    ]
    folder = write_run(tmp_path / "run", made)
    panels = metric_panels(read_run(folder))
    assert len(panels) == 6
    metrics = [name for row in CATALOGUE.values() for name in row.value_names]
    for panel in panels:
        lines = drawn_lines(panel)
        for label, points in lines.items():
            expected = [10, 20, 30] if "protocol 1" in label else [20, 40]
            assert [x for x, _ in points] == expected
        assert {label.partition(", ")[0] for label in lines} <= set(metrics)
        assert {label.partition(", ")[2] for label in lines} == {"protocol 1", "protocol 2"}
    page = report(folder)
    assert "made in 2 ways, which differ in sampler, stage" in page.text
    assert "sampler ancestral ddim" in page.text
    assert page.raw.count('<tr class="differs">') == 2
    assert "fd/digits-500 protocol 2 2.5 95 %: 1.5 to 2.5 40" in page.text


def test_one_protocol_is_one_line_and_the_order_of_its_keys_is_nothing():
    same = dict(reversed(PROTOCOL.items()))
    assert len(protocols_of([{"protocol": PROTOCOL}, {"protocol": same}, {"protocol": dict(PROTOCOL)}])) == 1
    assert len(protocols_of([{"protocol": PROTOCOL}, {}, {"protocol": None}])) == 2


def test_families_and_directions():
    for key, metric, measured_with, direction in (
        ("fid-2k", "fid", "2k", "min"),
        ("fd/dinov2-2k", "fd", "dinov2-2k", "min"),
        ("is-50k", "is", "50k", "max"),
        ("kd/digits-500", "kd", "digits-500", "min"),
        ("recall/inception-2k", "recall", "inception-2k", "max"),
        ("near_copies/digits-500", "near_copies", "digits-500", None),
        ("seconds", "seconds", "", None),
    ):
        assert metric_of(key) == (metric, measured_with)
        assert better(key) == direction
    assert better("val/loss") == better("test/bpd_ode") == "min"
    assert row_of("fid-2k") is row_of("fd/dinov2-2k")


def test_features_of_different_extractors_have_panels_of_their_own(tmp_path):
    event = {"event": "evaluation", "step": 1, "images": 8, "time": 1.0, "protocol": {}, "samples_file": "inf"}
    made = [
        all_events()[0],
        {**event, "fid-2k": 9.0, "fd/dinov2-2k": 300.0, "precision-2k": 0.5, "fd-2k": 1, "mine": 3},
    ]
    panels = metric_panels(read_run(write_run(tmp_path / "run", made)))
    titles = [panel.title for panel in panels]
    assert titles[:3] == ["Frechet distance: 2k", "Frechet distance: dinov2-2k", "Precision and recall: 2k"]
    assert list(panels[0].curves) == ["fid", "fd"]
    assert "mine" in titles


# ---- curves ------------------------------------------------------------------------------------------------------


def test_the_smoothed_line_is_an_average_without_a_pull_to_zero():
    flat, half_life = smoothed(Curve([float(x) for x in range(200)], [3.0] * 200))
    assert half_life == 5
    assert flat.y == pytest.approx([3.0] * 200)
    step, half_life = smoothed(Curve([0.0, *map(float, range(1, 401))], [0.0] * 201 + [1.0] * 200))
    assert step.y[200] == 0.0
    assert step.y[200 + half_life] == pytest.approx(0.5, abs=1e-3)
    holes, _ = smoothed(Curve([0.0, 1.0, 2.0], [1.0, math.nan, 1.0]))
    assert (holes.x, holes.y) == ([0.0, 2.0], [1.0, 1.0])


def test_the_loss_by_noise_level_is_drawn_over_images_and_over_t(synthetic):
    run = read_run(synthetic[0])
    over_images, over_t = noise_level_panels(run)
    assert list(over_images.curves) == [f"t = {(k + 0.5) / 10:.2f}" for k in range(10)]
    moments = list(over_t.curves.values())
    assert all(moment.x == [pytest.approx((k + 0.5) / 10) for k in range(10)] for moment in moments)
    assert len(moments) == 5
    assert moments[0].y[0] > moments[-1].y[0]
    assert next(iter(over_t.curves)).startswith("4,000 to ")
    assert list(over_t.curves)[-1].endswith(" to 240,000 images")


def test_the_held_out_loss_of_different_weights_is_never_joined(tmp_path):
    base = {"event": "metrics", "step": 1, "time": 1.0}
    made = [all_events()[0]]
    made += [{**base, "images": n, "val/loss": 1.0, "weights": w} for n, w in ((1, "raw"), (2, "ema"), (3, "raw"))]
    (panel,) = training_panels(read_run(write_run(tmp_path / "run", made)))
    assert {label: curve.x for label, curve in panel.curves.items()} == {
        "val/loss, weights raw": [1.0, 3.0],
        "val/loss, weights ema": [2.0],
    }


# ---- the command -------------------------------------------------------------------------------------------------


def test_a_real_run(trained, tmp_path):
    dispatch(["report", str(trained), "--out", str(tmp_path / "made")])
    page = Page(tmp_path / "made" / "report.html")
    for text in ("tiny", "NCSN · UNet · Digits", "success", "Held-out loss", "From noise to samples", "sigma_max: 2.0"):
        assert text in page.text
    assert events(trained, "start")[0]["run_id"] in page.text
    for name in ("samples", "film", "noise-levels"):
        (path,) = (trained / "samples").glob(f"{name}-*.png")
        assert any(np.array_equal(np.asarray(Image.open(path)), shown) for shown in page.decoded())
    assert not (trained / "report").exists()


def test_a_report_again_replaces_the_first(tmp_path):
    folder = write_run(tmp_path / "run", all_events()[:10])
    first = report(folder)
    again = report(folder)
    assert again.pictures == first.pictures
    assert not list((folder / "report").glob(".*"))


@pytest.mark.parametrize("content", [None, "", "torn\n", '{"event": "train", "images": 1, "time": 1}\n'])
def test_what_is_no_run_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match="no run's") as caught:
        dispatch(["report", str(tmp_path)])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_the_help_names_it(capsys):
    dispatch(["--help"])
    assert "\n  report " in capsys.readouterr().out


def test_other_mistakes_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    folder = write_run(tmp_path / "run", all_events()[:1])
    for arguments, said in (
        ([], "report takes a run's directory"),
        ([tmp_path / "file"], "no run's directory"),
        ([tmp_path / "nowhere"], "no run's directory"),
        ([folder, "--out", tmp_path / "file"], "cannot write"),
        ([folder, "--outt", "x"], "there is no key 'outt'"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            dispatch(["report", *map(str, arguments)])
        assert "\n" not in str(caught.value)
    (folder / "metrics.jsonl").write_text(json.dumps({**all_events()[0], "format_version": 2}) + "\n")
    with pytest.raises(UserError, match="format_version 2"):
        dispatch(["report", str(folder)])
