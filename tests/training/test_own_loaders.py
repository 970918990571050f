"""A plain Lightning Trainer, a DataLoader of one's own, Lightning's own checkpoints: they work, or a line says why."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.tiny import TINY, digits, digits_data, events, ncsn, same, toy_dsm, weights
from helpers.tiny import trainer as our_trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

import lit_diffusion
from lit_diffusion.__main__ import dispatch
from lit_diffusion.callbacks import EMA, Checkpoint, Evaluator, NoiseLevels, Samples, Telemetry
from lit_diffusion.checkpoints import build_method
from lit_diffusion.data_spec import DataSpec
from lit_diffusion.errors import UserError
from lit_diffusion.runs.logger import RunLogger
from lit_diffusion.training.own_loaders import batch_of

IMAGES = torch.from_numpy(np.stack([digits().value(k) for k in range(40)])).float() / 16
LABELS = torch.tensor([digits().label(k) for k in range(40)])
FACTS = DataSpec("mine", (1, 8, 8), 17, (0.0, 1.0), None)


def loader(*parts, batch=16, **keys):
    return DataLoader(TensorDataset(*(parts or (IMAGES, LABELS))), batch_size=batch, **keys)


def plain(folder, callbacks=(), logger=False, **keys):
    """Lightning's own Trainer, quiet."""
    if not any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks):
        keys["enable_checkpointing"] = False
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), logger=logger, **quiet, **keys)


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- batches -----------------------------------------------------------------------------------------------------


def test_a_plain_trainer_and_a_loader_of_images_and_labels(tmp_path, capsys):
    """Three batches an epoch, the last of 8: 80 images in two epochs, numbered by the clock."""
    method, numbers = ncsn(), []
    loss = method.loss
    method.loss = lambda batch, seed: (numbers.append(batch.index.tolist()), loss(batch, seed))[1]
    before = weights(method)
    plain(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(method, loader())
    assert (method.clock.images, method.clock.steps, method.global_step) == (80, 6, 6)
    assert [number for batch in numbers for number in batch] == list(range(80))
    assert [len(batch) for batch in numbers] == [16, 16, 8] * 2
    assert not same(before, weights(method))
    assert method.data_spec == DataSpec("DataLoader", (1, 8, 8), 256, (0.0, 1.0), None)
    assert "taken to be in [0, 1] with 256 grey levels" in capsys.readouterr().out


def test_images_alone_uint8_and_two_workers_train_alike(tmp_path):
    """Grey levels are mapped to the range of the data spec."""
    ends = []
    for given, keys in (
        (IMAGES, {}),
        ((16 * IMAGES).to(torch.uint8), {}),
        (IMAGES.double(), {"num_workers": 2}),
    ):
        method = ncsn()
        method.data_spec = FACTS
        plain(tmp_path, max_steps=3).fit(method, loader(given, **keys))
        ends.append(weights(method))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_our_trainer_and_a_loader_are_the_plain_trainer_and_it(tmp_path):
    ends = []
    for made in (our_trainer(tmp_path, 72), plain(tmp_path, max_steps=5)):
        method = ncsn(warmup_steps=4)
        made.fit(method, loader())
        ends.append(weights(method))
        assert method.clock.images == 72  # 16, 16, 8, 16, 16
    assert same(*ends)


def test_a_loader_says_the_classes(tmp_path):
    method = ncsn({"num_classes": 10})
    seen = []
    loss = method.loss
    method.loss = lambda batch, seed: (seen.append(batch.cond.label), loss(batch, seed))[1]
    plain(tmp_path, max_steps=3).fit(method, loader())
    assert torch.equal(torch.cat(seen), LABELS)
    assert method.data_spec.num_classes == 10
    assert method.condition(torch.arange(3)).label.tolist() == [0, 1, 2]


def test_labels_of_every_batch_are_looked_at(tmp_path):
    late = LABELS.clone().clamp(max=9)
    late[-1] = 10  # The network's own row for no class.
    made = plain(tmp_path, max_epochs=1)
    batches = DataLoader(TensorDataset(IMAGES, late), batch_size=8)
    assert "labels from" in refusal(lambda: made.fit(ncsn({"num_classes": 10}), batches))


@pytest.mark.parametrize(
    ("given", "classes", "line"),
    [
        (2 * IMAGES - 1, None, "values from -1 to 1, not in [0, 1]: scale them, or set their range first"),
        (255 * IMAGES, None, "values from 0 to 255, not in [0, 1]"),
        (IMAGES * float("nan"), None, "values from nan to nan"),
        (IMAGES.long(), None, "torch.int64; give floats in [0, 1], or uint8 grey levels"),
        ((16 * IMAGES).to(torch.uint8) + 1, None, "grey level 17, and method.data_spec says 17 grey levels"),
        (IMAGES.expand(40, 3, 8, 8), None, "shape [40, 3, 8, 8]; the model takes [B, 1, 8, 8]"),
        ({"image": IMAGES, "label": LABELS}, None, "gives a dict with the keys image, label; give batches of images"),
        ([IMAGES, LABELS, LABELS], None, "gives a list; give batches of images, or of (images, labels)"),
        (IMAGES, 10, "the backbone has 10 classes and the DataLoader gives no labels"),
        ([IMAGES, LABELS + 1], 10, "labels from 1 to 10; the backbone's classes are 0 to 9: give it num_classes=11"),
        ([IMAGES, LABELS[:, None]], 10, "labels of shape [40, 1], torch.int64; give class numbers [B], int64"),
        ([IMAGES, LABELS.float()], 10, "torch.float32; give class numbers"),
    ],
)
def test_other_batches_are_refused_in_a_line(given, classes, line):
    assert line in refusal(lambda: batch_of(given, FACTS, classes, check=True))


def test_labels_are_ignored_by_an_unconditional_backbone():
    assert batch_of([IMAGES, LABELS + 100], FACTS, None, check=True).cond is None


def test_another_range_is_set_by_the_data_spec(tmp_path):
    method = ncsn()
    method.data_spec = DataSpec("mine", (1, 8, 8), 17, (-1.0, 1.0), None)
    plain(tmp_path, max_steps=1).fit(method, loader(2 * IMAGES - 1))
    assert method.denoiser.data_range == (-1.0, 1.0)


def test_points_have_no_range(tmp_path):
    method = toy_dsm()
    plain(tmp_path, max_steps=2).fit(method, loader(100 * torch.randn(32, 2)))
    assert method.clock.images == 32


# ---- validate, test, predict -------------------------------------------------------------------------------------


def test_held_out_images_of_a_loader_have_their_own_noise_whatever_the_batch(tmp_path):
    method = ncsn()
    losses = []
    for batch in (40, 7):
        made = plain(tmp_path)
        losses += [made.validate(method, loader(batch=batch), verbose=False)[0]["val/loss"]]
        losses += [made.test(method, loader(batch=batch), verbose=False)[0]["test/loss"]]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_predict_takes_the_numbers_of_samples(tmp_path):
    method = ncsn()
    made = plain(tmp_path)
    found = torch.cat([batch.x for batch in made.predict(method, DataLoader(torch.arange(6), batch_size=4))])
    assert torch.equal(found, method.generate(torch.arange(6), method.seed).x)
    assert "predict takes the numbers of the samples" in refusal(lambda: made.predict(method, loader()))


def test_predicted_samples_have_the_classes_that_they_were_made_of(tmp_path):
    method = ncsn({"num_classes": 10})
    method.data_spec = DataSpec("mine", (1, 8, 8), 17, (0.0, 1.0), 10, class_counts=(1,) * 10)
    method.clock.batch = 16
    made = plain(
        tmp_path, [Samples(count=0, weights="raw"), EMA([64])], logger=RunLogger("mine", run_dir=tmp_path / "run")
    )
    made.predict(method, DataLoader(torch.arange(5, 11), batch_size=4))
    expected = method.condition_by_counts(torch.arange(5, 11), method.seed, method.data_spec.class_counts)
    assert np.load(tmp_path / "run/samples/predict.npz")["labels"].tolist() == expected.label.tolist()


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_by_lightnings_own_call_is_loaded_into_the_same_model(tmp_path):
    method, ema = ncsn(), EMA([64], ramp=1.0)
    made = plain(tmp_path, [ema], max_steps=3)
    made.fit(method, loader())
    path = tmp_path / "mine.ckpt"
    made.save_checkpoint(path)
    line = refusal(lambda: lit_diffusion.load(path))
    assert "holds no configuration" in line
    assert "lit_diffusion.load(path, method=...)" in line
    asked = ["sample", "--ckpt_path", str(path), "--num_samples", "2", "--out", str(tmp_path / "x.npz")]
    assert "holds no configuration" in refusal(lambda: dispatch(asked))
    raw = lit_diffusion.load(path, weights="raw", method=ncsn(seed=1))
    assert same(weights(raw), weights(method))
    assert raw.data_spec == method.data_spec
    average = lit_diffusion.load(path, method=ncsn(seed=1))
    assert same(weights(average), ema.shadows[0])
    assert "does not fit this model" in refusal(lambda: lit_diffusion.load(path, method=ncsn({"channels": 5})))


def test_a_checkpoint_of_a_method_from_a_configuration_opens_by_itself(tmp_path):
    shape = {**TINY["model"]["init_args"]["backbone"]["init_args"], "data_shape": [1, 8, 8]}
    init = {**TINY["model"]["init_args"], "backbone": {"class_path": "UNet", "init_args": shape}}
    method = build_method({"class_path": "NCSN", "init_args": init})
    saved = ModelCheckpoint(dirpath=tmp_path, filename="best", save_top_k=1, monitor="val/loss", save_weights_only=True)
    plain(tmp_path, [saved], max_epochs=1).fit(method, loader(), loader())
    again = lit_diffusion.load(tmp_path / "best.ckpt")
    assert same(weights(again), weights(method))
    asked = ["sample", "--ckpt_path", str(tmp_path / "best.ckpt"), "--num_samples", "2"]
    dispatch([*asked, "--out", str(tmp_path / "x.npz")])
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (2, 8, 8, 1)


@pytest.mark.parametrize("data", ["loader", "datamodule"])
def test_a_plain_trainer_continues(tmp_path, data):
    """With our DataModule, the middle of an epoch included, to the same bits."""
    given = {
        "loader": lambda: {"train_dataloaders": loader()},
        "datamodule": lambda: {"datamodule": digits_data(512)},  # Four batches an epoch.
    }[data]
    straight, ema = ncsn(), EMA([64])
    second = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    plain(tmp_path, [ema, second], max_epochs=2, limit_val_batches=0).fit(straight, **given())
    again, ema_again = ncsn(seed=1), EMA([64])
    made = plain(tmp_path, [ema_again], max_epochs=2, limit_val_batches=0)
    made.fit(again, **given(), ckpt_path=tmp_path / "step=2.ckpt")
    assert again.clock.steps == straight.clock.steps
    if data == "datamodule":
        assert again.clock.images == straight.clock.images == 2 * 4 * 512
        assert same(weights(straight), weights(again))
        assert same(ema.shadows[0], ema_again.shadows[0])


# ---- callbacks ---------------------------------------------------------------------------------------------------


def test_our_callbacks_and_lightnings_beside_each_other(tmp_path):
    """With the run's logger: pictures, telemetry, averages, checkpoints; and early stopping, rates, the best."""
    method = ncsn(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="val/loss")
    callbacks = [
        EMA([64]),
        Samples(every_n_steps=2, count=4, film_columns=0),
        Telemetry(every_n_steps=2),
        NoiseLevels(num_levels=2, images=8),
        Evaluator(),
        Checkpoint(),
        best,
        EarlyStopping("val/loss", patience=1),
        LearningRateMonitor("step"),
    ]
    logger = RunLogger("tiny", run_dir=tmp_path / "run")
    made = plain(tmp_path, callbacks, logger, max_epochs=9, log_every_n_steps=1)
    made.fit(method, loader(), loader())
    assert made.current_epoch == 2  # Nothing improves with a rate of 0.
    found = events(tmp_path / "run")
    assert [e["images"] for e in found if e["event"] == "picture"] == [32, 56, 80]
    assert [e["images"] for e in found if e["event"] == "train"] == [32, 56, 80]
    assert {"val/loss", "lr-SGD", "train/loss"} <= {key for e in found if e["event"] == "metrics" for key in e}
    assert found[-1]["failures"] == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert best.best_model_path.endswith("epoch=0-step=3.ckpt")


def test_lightnings_loggers_have_the_losses(tmp_path):
    logger = CSVLogger(tmp_path)
    plain(tmp_path, logger=logger, max_epochs=1, log_every_n_steps=1).fit(ncsn(), loader(), loader())
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {"train/loss", "val/loss"} <= set(header.split(","))


def test_what_writes_nothing_says_so(tmp_path, capsys):
    plain(tmp_path, [Samples(), NoiseLevels(), Telemetry()], max_steps=1).fit(ncsn(), loader())
    said = capsys.readouterr().out
    assert "Samples, NoiseLevels, Telemetry: nothing is drawn or written, since the Trainer has no RunLogger" in said


@pytest.mark.parametrize(
    ("callbacks", "keys", "line"),
    [
        ([Evaluator(every_n_steps=1)], {}, "evaluation compares with a lit_diffusion DataModule"),
        ([EMA(half_lives_steps=[5])], {}, "give half_lives_images"),
        ([], {"precision": "bf16-mixed"}, "precision is bf16-mixed: Lightning's own Trainer would"),
    ],
)
def test_what_does_not_go_is_refused_in_a_line(tmp_path, callbacks, keys, line):
    method = ncsn()
    assert line in refusal(lambda: plain(tmp_path, callbacks, max_steps=1, **keys).fit(method, loader()))
    assert method.clock.images == 0


def test_a_plain_trainer_draws_from_our_datamodule_in_epochs(tmp_path, recwarn):
    """Of 1,761 images in batches of 512: four steps an epoch; validated at the end of each."""
    method, data = ncsn(), digits_data(512)
    made = plain(tmp_path, max_epochs=2)
    made.fit(method, datamodule=data)
    assert (method.clock.steps, method.clock.images, made.current_epoch) == (8, 4096, 2)
    ours = ncsn()
    our_trainer(tmp_path, 4096).fit(ours, datamodule=digits_data(512))
    assert same(weights(method), weights(ours))
    assert "val/loss" in made.callback_metrics
    assert not [warning for warning in recwarn if "overridden" in str(warning.message)]
