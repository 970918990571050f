"""All figures at once: their names, what is refused, what is said of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_diffusion.errors import UserError
from lit_diffusion.metrics import (
    Context,
    Reference,
    ScoreOptions,
    Scores,
    choose_metrics,
    frechet_distance,
    gaussian_of,
    load_extractor,
)
from lit_diffusion.metrics.catalogue import CATALOGUE, count_label, default_metrics, is_better, metric_key
from lit_diffusion.metrics.choice import left_out_line
from lit_diffusion.metrics.extractors import CLIP, Extractor, Features
from lit_diffusion.metrics.frechet import bias_caveat
from lit_diffusion.metrics.memorisation import FLAGGED_ABOVE

OPTIONS = ScoreOptions(is_splits=4, kid_subsets=5, kid_subset_size=30, manifold_samples=50)
DEFAULT_METRICS = tuple(default_metrics())
ALL = (*DEFAULT_METRICS, "fid_infinity")


class Linear(Extractor):
    """Points with logits."""

    name, model, dimension, has_logits = "digits", "linear", 3, True

    def require_fit(self, shape):
        assert shape == (3,)

    def __call__(self, data):
        x = torch.from_numpy(data).float()
        return Features(x, x @ torch.arange(12.0).view(3, 4).sin())


def points(count, seed):
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)


def reference_to(x, **record):
    rows = torch.from_numpy(x)
    return Reference(gaussian_of(rows), rows, torch.arange(len(x)), record)


def scores_of(x, parts=None, metrics=ALL, options=OPTIONS, real=None, **keys):
    scores = Scores(metrics, Linear(), reference_to(points(60, 0) if real is None else real), (3,), options, **keys)
    for part in parts or torch.arange(len(x)).split(17):
        scores.update(x[part.numpy()], part)
    return scores


# ---- names --------------------------------------------------------------------------------------------------------


def test_a_count_is_short_only_where_nothing_is_lost():
    assert [count_label(n) for n in (1, 500, 1000, 1500, 2000, 10_000, 50_000)] == [
        "1",
        "500",
        "1k",
        "1500",
        "2k",
        "10k",
        "50k",
    ]


@pytest.mark.parametrize(
    ("metric", "extractor", "count", "name"),
    [
        ("fid", "inception", 2000, "fid-2k"),
        ("fid_infinity", "inception", 50_000, "fid_infinity-50k"),
        ("is", "inception", 50_000, "is-50k"),
        ("kid", "inception", 123, "kid-123"),
        ("fid", "digits", 500, "fd/digits-500"),
        ("fid_infinity", "dinov2", 2000, "fd_infinity/dinov2-2k"),
        ("kid", "points", 2000, "kd/points-2k"),
        ("is", "digits", 2000, "is/digits-2k"),
        ("precision", "inception", 10_000, "precision/inception-10k"),
        ("near_copies", "inception", 500, "near_copies/inception-500"),
        ("clip_score", "inception", 500, "clip_score-500"),
    ],
)
def test_only_inceptions_figures_have_the_papers_names(metric, extractor, count, name):
    assert metric_key(metric, extractor, count) == name


def test_figures_of_neighbours_name_the_samples_that_they_are_of():
    scores = scores_of(points(80, 1))
    assert set(scores.compute(80).values) == {
        "fd/digits-80",
        "fd_infinity/digits-80",
        "is/digits-80",
        "kd/digits-80",
        *(f"{name}/digits-50" for name in ("precision", "recall", "density", "coverage")),
        *(f"{name}/digits-80" for name in ("near_copies", "nn_ratio", "memorised", "authenticity")),
    }


# ---- what can be had ----------------------------------------------------------------------------------------------


def choose(wanted, count=100, real=100, options=OPTIONS, extractor=None, **keys):
    return list(choose_metrics(wanted, Context(extractor or Linear(), count, real, options, **keys)).metrics)


def test_by_default_all_that_can_be_had_are_chosen():
    assert choose(None) == list(DEFAULT_METRICS)
    plain = load_extractor("points", (3,))
    assert choose(None, extractor=plain) == [m for m in DEFAULT_METRICS if m != "is"]
    assert choose(None, has_features=False) == ["fid", "is"]
    assert choose(None, count=5) == ["fid", "is", "kid", "memorisation"]
    assert choose(["kid", "fid", "kid"]) == ["kid", "fid"]


@pytest.mark.parametrize(
    ("metric", "keys", "words"),
    [
        ("is", {"extractor": load_extractor("points", (3,))}, "needs a classifier, extractor points is none"),
        ("is", {"count": 3}, "4 parts need at least as many samples, there are 3"),
        ("fid", {"count": 1}, "needs at least 2 samples, there are 1"),
        ("kid", {"count": 1}, "needs at least 2 samples, there are 1"),
        ("kid", {"real": 1}, "at least 2 real data, there are 1"),
        ("fid_infinity", {"count": 29}, "3 dimensions needs at least 30 samples, there are 29"),
        ("kid", {"has_features": False, "real": 0}, "mean and covariance only; give the images"),
        ("memorisation", {"has_features": False}, "mean and covariance only"),
        ("recall", {"has_features": False}, "mean and covariance only"),
        ("precision", {"count": 5}, "more than 5 samples and data"),
        ("coverage", {"real": 5}, "more than 5 samples and data"),
        ("density", {"options": ScoreOptions(manifold_samples=5)}, "more than 5 samples and data"),
        ("recall", {"options": ScoreOptions(precision_neighbours=100)}, "100 nearest neighbors"),
        ("memorisation", {"real": 1}, "at least 2 training data"),
        ("clip_score", {}, "have no captions"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(metric, keys, words):
    with pytest.raises(UserError, match=words) as caught:
        choose([metric], **keys)
    assert str(caught.value).startswith(f"{metric} cannot be measured: ")
    assert "\n" not in str(caught.value)
    assert metric not in choose(None, **keys)
    enough = {"has_captions": True} if metric == "clip_score" else {}
    assert choose([metric], **enough) == [metric]


def test_nothing_and_the_unknown_are_refused():
    with pytest.raises(UserError, match=r"metrics is 'fdi'; choose one of fid, .*\(did you mean 'fid'\?\)$"):
        choose(["fid", "fdi"])
    with pytest.raises(UserError, match="no metric can be measured with 1 samples and 1 real data"):
        choose(None, count=1, real=1)


@pytest.mark.parametrize("name", [*vars(ScoreOptions())])
def test_options_are_checked(name):
    least = {"bootstrap": 0, "seed": 0, "kid_subset_size": 2}.get(name, 1)
    assert getattr(ScoreOptions(**{name: least}), name) == least
    with pytest.raises(UserError, match=f"{name} is {least - 1}; give at least {least}"):
        ScoreOptions(**{name: least - 1})


# ---- figures ------------------------------------------------------------------------------------------------------


def test_batches_and_their_order_change_nothing():
    x = points(80, 1)
    expected = scores_of(x, pairs=3).compute(80)
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(80))
    for parts in (shuffled.split(9), [shuffled], torch.arange(80).split(1), [torch.arange(80), torch.arange(0)]):
        found = scores_of(x, parts, pairs=3).compute(80)
        assert found.values == pytest.approx(expected.values, rel=1e-6)
        assert found.errors == pytest.approx(expected.errors, rel=1e-6)
        assert found.protocol == expected.protocol


def test_the_same_again_is_the_same_to_the_bit():
    x, options = points(80, 1), ScoreOptions(is_splits=4, kid_subsets=5, kid_subset_size=30, bootstrap=20)
    scores = scores_of(x, options=options)
    first = scores.compute(80)
    assert scores_of(x, options=options).compute(80) == first
    scores.reset()
    assert scores.count == 0
    scores.update(x, torch.arange(80))
    again = scores.compute(80)
    assert again.values == pytest.approx(first.values, rel=1e-9)
    scores.release()
    scores.update(points(80, 2), torch.arange(80))
    assert scores.compute(80).values["fd/digits-80"] != pytest.approx(first.values["fd/digits-80"], rel=0.01)


def test_only_what_is_asked_for_is_computed():
    for metric in ("fid", "fid_infinity", "is", "kid", "recall"):
        assert [*scores_of(points(80, 1), metrics=(metric,)).compute(80).values] == [
            metric_key(metric, "digits", 50 if metric == "recall" else 80)
        ]
    assert len(scores_of(points(80, 1), metrics=("memorisation",)).compute(80).values) == 4


def test_each_figure_is_its_own():
    """Of shares, the mean of what the metric says of each sample; of others, the metric's."""
    x, real = points(80, 1), points(60, 0)
    scores = scores_of(x)
    found = scores.compute(80).values
    assert found["fd/digits-80"] == pytest.approx(
        frechet_distance(gaussian_of(torch.from_numpy(real)), gaussian_of(torch.from_numpy(x))), rel=1e-9
    )
    manifolds = scores.metric("recall").compute()
    for name, parts in {**manifolds, **scores.metric("memorisation").compute()}.items():
        assert found[metric_key(name, "digits", 50 if name in manifolds else 80)] == float(parts.mean())
    result = scores.compute(80)
    assert (result.values["kd/digits-80"], result.errors["kd/digits-80"]) == scores.metric("kid").compute()
    assert (result.values["is/digits-80"], result.errors["is/digits-80"]) == scores.metric("is").compute()
    assert result.errors["fd_infinity/digits-80"] == scores.metric("fid_infinity").compute()[1]
    assert set(result.errors) == {"kd/digits-80", "is/digits-80", "fd_infinity/digits-80"}


def test_intervals_are_about_their_figures():
    options = ScoreOptions(is_splits=2, kid_subsets=5, kid_subset_size=30, bootstrap=200)
    result = scores_of(points(80, 1), options=options).compute(80)
    assert set(result.intervals) == set(result.values) - {"kd/digits-80", "fd_infinity/digits-80"}
    for name, (low, high) in result.intervals.items():
        assert low <= result.values[name] <= high, name
    assert scores_of(points(80, 1)).compute(80).intervals == {}


def test_the_interval_of_a_sorted_folders_inception_score_is_about_its_figure():
    """Samples in the order of their classes: unshuffled parts would score 1."""
    x = np.repeat(60.0 * np.eye(3, dtype=np.float32), 40, axis=0)
    options = ScoreOptions(is_splits=3, bootstrap=100)
    result = scores_of(x, metrics=("is",), options=options).compute(120)
    low, high = result.intervals["is/digits-120"]
    assert result.values["is/digits-120"] > 1.8
    assert low <= result.values["is/digits-120"] <= high


def test_copies_are_flagged_and_fresh_samples_not():
    real = points(400, 0)
    fresh, copied = points(300, 1), points(300, 1)
    copied[:30] = real[:30]
    for x, flagged in ((fresh, False), (copied, True)):
        result = scores_of(x, metrics=("memorisation",), real=real).compute(300)
        assert result.flagged is flagged
        assert (result.values["near_copies/digits-300"] > FLAGGED_ABOVE) is flagged


def test_pairs_are_kept_of_images_only():
    extractor = load_extractor("digits", (1, 8, 8))
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    real = extractor(images).features
    reference = Reference(gaussian_of(real), real, torch.arange(20))
    scores = Scores(("memorisation",), extractor, reference, (1, 8, 8), pairs=4)
    scores.update(images[::-1].copy(), torch.arange(100, 120))
    pairs = scores.compute(20).pairs
    assert len(pairs) == 4
    for pair in pairs:
        assert pair.neighbour == 119 - pair.index
        np.testing.assert_array_equal(pair.image, images[pair.neighbour])
    assert scores_of(points(80, 1), pairs=4).compute(80).pairs == []


def test_the_protocol_says_what_the_figures_depend_on():
    reference = reference_to(points(60, 0), split="train", reference_source="x")
    reference = replace(reference, gaussian=replace(reference.gaussian, count=1234))  # Of all; some keep features.
    scores = Scores(ALL, Linear(), reference, (3,), OPTIONS)
    assert scores.protocol(80) == {
        "extractor": "linear",
        "extractor_sha256": "",
        "resize": "none",
        "reference": reference.key,
        "reference_source": "x",
        "split": "train",
        "n_real": 1234,
        "n_fake": 80,
        "is_splits": 4,
        "kid_subsets": 5,
        "kid_subset_size": 30,
        "precision_neighbours": 3,
        "density_neighbours": 5,
        "manifold_n_real": 50,
        "metric_seed": 2020,
        "kid_n_real": 60,
        "memorisation_n_real": 60,
    }
    assert set(scores_of(points(9, 1), metrics=("fid",)).protocol(9)) == {
        "extractor",
        "extractor_sha256",
        "resize",
        "reference",
        "reference_source",
        "split",
        "n_real",
        "n_fake",
    }


def test_the_protocol_says_what_was_measured_of_other_data_or_fewer():
    """Features are kept of some of very many data, and copies may be looked for among others than the reference."""
    x = points(80, 1)
    assert not {key for key in scores_of(x).compute(80).protocol if key.endswith("_n_real")} - {"manifold_n_real"}
    reference = reference_to(points(60, 0), split="held_out")
    reference = replace(reference, gaussian=replace(reference.gaussian, count=1234))

    def protocol(**keys):
        scores = Scores(ALL, Linear(), reference, (3,), OPTIONS, **keys)
        scores.update(x, torch.arange(80))
        return scores.compute(80).protocol

    fewer = protocol()
    assert (fewer["n_real"], fewer["kid_n_real"], fewer["memorisation_n_real"]) == (1234, 60, 60)
    training = reference_to(x, split="train", reference_source="t")
    others = protocol(training=training, mirrored=reference_to(-x))
    assert others["memorisation_reference"] == training.key != others["reference"]
    assert (others["memorisation_source"], others["memorisation_split"]) == ("t", "train")
    assert (others["memorisation_n_real"], others["memorisation_mirrored"]) == (80, True)


def test_copies_are_looked_for_among_the_training_data_and_their_mirror_images():
    x = points(80, 1)
    for training, mirrored in ((x, -x), (-x, x)):
        both = {"training": reference_to(training), "mirrored": reference_to(mirrored)}
        result = scores_of(x, metrics=("memorisation",), real=points(60, 5), **both).compute(80)
        assert result.values["near_copies/digits-80"] == 1.0
        assert result.flagged
    assert not scores_of(x, metrics=("memorisation",), real=x, training=reference_to(-x)).compute(80).flagged


@pytest.mark.parametrize(
    ("options", "count", "left_out"),
    [
        ({"kid_subset_size": 1000}, 60, {"kid error": "subsets of 60 share most of 60 samples and 60 data"}),
        ({"kid_subset_size": 50}, 80, {"kid error": "subsets of 50 share most of 80 samples and 60 data"}),
        ({"is_splits": 1}, 80, {"is error": "1 parts of 80 samples have no spread"}),
        ({"is_splits": 50}, 80, {"is error": "50 parts of 80 samples have no spread"}),
        ({}, 80, {}),
    ],
)
def test_an_error_bar_that_is_none_is_left_out_and_said(options, count, left_out):
    options = replace(OPTIONS, **options)
    result = scores_of(points(count, 1), metrics=("is", "kid"), options=options).compute(count)
    assert result.left_out == left_out
    assert {f"{key.split('/')[0].replace('kd', 'kid')} error" for key in result.values} - {
        f"{key.split('/')[0].replace('kd', 'kid')} error" for key in result.errors
    } == set(left_out)
    size = min(options.kid_subset_size, count, 60)
    assert result.protocol["kid_subset_size"] == size
    assert result.protocol["kid_subsets"] == (1 if size == count else 5)


def test_intervals_say_what_was_resampled_and_are_never_empty():
    options = replace(OPTIONS, bootstrap=20)
    real = points(60, 0)
    result = scores_of(real.copy(), metrics=("precision", "recall", "memorisation"), options=options, real=real)
    found = result.compute(60)
    assert found.values["near_copies/digits-60"] == 1.0
    assert found.intervals["near_copies/digits-60"] == pytest.approx((0.025 ** (1 / 60), 1.0))
    assert found.left_out == {"nn_ratio interval": "all resamples give the same value"}
    assert (found.protocol["bootstrap"], found.protocol["bootstrap_of"]) == (
        20,
        "samples; of recall and coverage the real data",
    )
    assert all(low < high for low, high in found.intervals.values())
    with pytest.raises(UserError, match="bootstrap is 1, and one resample has no spread"):
        ScoreOptions(bootstrap=1)


def test_what_is_left_out_is_said_a_reason_once():
    left_out = choose_metrics(None, Context(load_extractor("points", (3,)), 1, 100, OPTIONS)).left_out
    assert left_out == {
        "fid": "it needs at least 2 samples, there are 1",
        "is": "it needs a classifier, extractor points is none",
        "kid": "it needs at least 2 samples, there are 1",
        **dict.fromkeys(
            ("precision", "recall", "density", "coverage"), "5 nearest neighbors need more than 5 samples and data"
        ),
    }
    scores = scores_of(points(1, 1), metrics=("memorisation",), left_out=left_out)
    result = scores.compute(1)
    assert result.left_out == left_out
    assert left_out_line(result.left_out).startswith("fid, kid (it needs at least 2 samples, there are 1); is (")
    assert choose_metrics(["fid"], Context(Linear(), 9, 9, OPTIONS)).left_out == {}
    assert choose_metrics(None, Context(Linear(), 100, 100, OPTIONS, training_count=1)).left_out == {
        "memorisation": "it needs at least 2 training data"
    }


def test_a_name_holds_the_number_that_was_measured():
    with pytest.raises(ValueError, match="80 samples were taken, the values' names would say 100"):
        scores_of(points(80, 1), metrics=("fid",)).compute(100)


def test_captions_are_scored_by_clip():
    class Clip(CLIP):
        def __init__(self):
            self.sha256, self.seen = "abc", []

        def __call__(self, data):
            return Features(torch.from_numpy(data))

        def captions(self, texts):
            self.seen += texts
            return torch.tensor([[1.0, 0.0, 0.0]] * len(texts))

    clip, x = Clip(), np.eye(3, dtype=np.float32)
    scores = Scores(("clip_score",), Linear(), reference_to(points(60, 0)), (3,), clip=clip)
    scores.update(x[:2], torch.arange(2), ["a", "b"])
    scores.update(x[2:], torch.arange(2, 3), ["c"])
    result = scores.compute(3)
    assert clip.seen == ["a", "b", "c"]
    assert result.values == {"clip_score-3": pytest.approx(100.0 / 3.0)}
    assert (result.protocol["clip"], result.protocol["clip_sha256"]) == ("clip-vit-b-32", "abc")
    assert set(result.errors) == {"clip_score-3"}
    scores.reset()
    scores.update(x[:1], torch.arange(1), ["a"])
    assert (scores.compute(1).errors, scores.compute(1).left_out) == (
        {},
        {"clip_score error": "one image has no spread"},
    )


def test_a_sample_counts_once():
    scores = scores_of(points(20, 1), metrics=("kid",))
    scores.update(points(1, 2), torch.tensor([7]))
    with pytest.raises(ValueError, match="two samples have the same number"):
        scores.compute(21)


def test_few_samples_are_warned_of():
    assert bias_caveat(Linear(), 3) is None
    assert "2 samples are fewer than the 3 dimensions of digits's features" in bias_caveat(Linear(), 2)


# ---- the best -----------------------------------------------------------------------------------------------------

VALUES = st.one_of(st.floats(allow_nan=False), st.just(math.nan))


@given(st.sampled_from(["fid", "kid", "is", "recall", "clip_score"]), VALUES, st.one_of(st.none(), VALUES))
def test_nan_is_never_better(metric, value, than):
    found = is_better(metric, value, than)
    if math.isnan(value):
        assert not found
    elif than is None or math.isnan(than):
        assert found
    else:
        assert found == (value > than if CATALOGUE[metric].better == "max" else value < than)
        assert not (found and is_better(metric, than, value))


def test_which_way_is_better():
    higher = {name for name, row in CATALOGUE.items() if row.better == "max"}
    assert higher == {"is", "precision", "recall", "density", "coverage", "clip_score"}
    assert {name for name, row in CATALOGUE.items() if row.better is None} == {"memorisation"}
