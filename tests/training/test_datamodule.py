"""The order of the images is a function of (seed, n) alone, each is normalized exactly once, none is padded in."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny import digits, digits_data, points_data

from lit_diffusion.conditions import Condition
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.data_spec import DataSpec
from lit_diffusion.errors import UserError
from lit_diffusion.randomness import keyed_uniform
from lit_diffusion.training.datamodule import PADDING_INDEX, Batch, DataModule, TrainingOrder


def numbers(order: TrainingOrder, steps: int) -> list[list[tuple[int, int]]]:
    batches = iter(order)
    return [next(batches) for _ in range(steps)]


def on(data: DataModule, rank: int = 0, world_size: int = 1, images: int = 0, training: bool = True) -> DataModule:
    """As if attached to one of ``world_size`` processes that have seen ``images``."""
    clock = SimpleNamespace(images=images)
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, lightning_module=SimpleNamespace(clock=clock), training=training
    )
    return data


def ramp(count: int, levels: int = 256, size: int = 2, **keys) -> InMemory:
    """Images that say which they are: all pixels of number k are k."""
    values = np.repeat(np.arange(count, dtype=np.uint8), size * size).reshape(count, 1, size, size)
    return InMemory(values, num_grey_levels=levels, **keys)


# ---- order -------------------------------------------------------------------------------------------------------


def test_each_epoch_is_a_permutation_of_its_own():
    order = TrainingOrder(torch.arange(100, 110), seed=3, start=0, batch=5)
    flat = [index for batch in numbers(order, 6) for _, index in batch]
    epochs = [flat[:10], flat[10:20], flat[20:]]
    assert all(sorted(epoch) == list(range(100, 110)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = [index for batch in numbers(TrainingOrder(order.indices, 4, 0, 5), 2) for _, index in batch]
    assert sorted(other) == sorted(epochs[0])
    assert other != epochs[0]


def test_the_numbers_count_the_images_of_the_run_across_epochs():
    order = TrainingOrder(torch.arange(7), seed=0, start=0, batch=5)
    assert [n for batch in numbers(order, 4) for n, _ in batch] == list(range(20))


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = numbers(TrainingOrder(torch.arange(3), seed=0, start=0, batch=9), 1)
    assert [sorted(index for _, index in batch[k : k + 3]) for k in (0, 3, 6)] == [[0, 1, 2]] * 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_slices_make_the_single_processs_batch(world_size):
    single = numbers(TrainingOrder(torch.arange(17), 1, 0, 6), 5)
    ranks = [numbers(TrainingOrder(torch.arange(17), 1, 0, 6, rank, world_size), 5) for rank in range(world_size)]
    for step, batch in enumerate(single):
        assert [item for rank in ranks for item in rank[step]] == batch


@pytest.mark.parametrize("start", [6, 18, 24])
def test_starting_in_mid_run_goes_on_where_it_stopped(start):
    straight = numbers(TrainingOrder(torch.arange(17), 1, 0, 6), 10)
    assert numbers(TrainingOrder(torch.arange(17), 1, start, 6), 10 - start // 6) == straight[start // 6 :]


def test_the_loader_starts_at_the_clock_and_workers_change_nothing():
    batches = {}
    for workers in (0, 2):
        loader = iter(on(digits_data(8, num_workers=workers), images=1_760).train_dataloader())
        batches[workers] = [next(loader) for _ in range(3)]
        assert batches[workers][0]["index"].tolist() == list(range(1_760, 1_768))  # the last batch of epoch 0
    for first, second in zip(batches[0], batches[2], strict=True):
        assert all(torch.equal(first[key], second[key]) for key in ("value", "label", "index"))
    loader = iter(on(digits_data(8)).train_dataloader())
    assert not torch.equal(next(loader)["value"], batches[0][0]["value"])


def test_value_and_label_belong_together():
    data = on(digits_data(16))
    batch = next(iter(data.train_dataloader()))
    everything = digits()
    for value, label in zip(batch["value"], batch["label"].tolist(), strict=True):
        (same,) = (k for k in range(len(everything)) if np.array_equal(everything.value(k), value.numpy()))
        assert everything.label(same) == label


# ---- the split ---------------------------------------------------------------------------------------------------


def test_the_split_is_the_same_for_every_seed_disjoint_and_complete():
    first, second = digits_data(seed=0), digits_data(seed=7)
    assert torch.equal(first.held_out_indices, second.held_out_indices)
    train, held_out = set(first.train_indices.tolist()), set(first.held_out_indices.tolist())
    assert not train & held_out
    assert train | held_out == set(range(1797))
    assert len(held_out) == round(0.02 * 1797)
    # Nor does it depend on anything else: runs are compared on these very images.
    assert torch.equal(digits_data(64, flip=True, value_range=(-1.0, 1.0)).held_out_indices, first.held_out_indices)
    assert first.held_out_indices[:6].tolist() == [32, 89, 100, 174, 194, 201]


def test_a_source_of_its_own_leaves_the_training_data_whole():
    data = DataModule(ramp(9), 3, held_out=ramp(4))
    assert (len(data.train_indices), len(data.held_out_indices)) == (9, 4)
    loader = on(data).val_dataloader()
    assert sorted(int(v) for batch in loader for v in batch["value"][:, 0, 0, 0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_held_out_image_comes_exactly_once(world_size):
    seen, positions = [], []
    for rank in range(world_size):
        data = on(DataModule(ramp(3), 6, held_out=ramp(7)), rank, world_size, training=False)
        batches = list(data.val_dataloader())
        assert len(batches) == {1: 2, 2: 2, 3: 2}[world_size]  # as many on every process, whatever its share
        for batch in batches:
            assert len(batch["index"]) <= 6 // world_size
            counted = batch["index"] != PADDING_INDEX
            seen += batch["value"][counted][:, 0, 0, 0].tolist()
            positions += batch["index"][counted].tolist()
    assert sorted(seen) == list(range(7))
    assert seen == positions  # its noise is keyed by its place in the held-out set, whichever process has it


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_samples_to_predict_come_exactly_once(world_size):
    indices = []
    for rank in range(world_size):
        data = on(DataModule(ramp(3), 6, predict_samples=7), rank, world_size)
        batches = list(data.predict_dataloader())
        assert len(batches) == {1: 2, 2: 2, 3: 2}[world_size]
        indices += [int(i) for batch in batches for i in batch if i < 7]  # Number 7 pads.
    assert sorted(indices) == list(range(7))


# ---- normalization -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("training", [True, False])
def test_grey_levels_become_the_range_once(value_range, training):
    data = digits_data(value_range=value_range)
    value = torch.arange(17, dtype=torch.uint8).repeat(4)[:64].view(1, 1, 8, 8)
    batch = data.prepare(value, torch.tensor([3]), torch.tensor([0]), training)
    low, high = value_range
    assert batch.x.dtype == torch.float32
    expected = torch.linspace(low, high, 17).repeat(4)[:64].view(1, 1, 8, 8)
    assert torch.allclose(batch.x, expected, atol=1e-6)
    assert (float(batch.x.min()), float(batch.x.max())) == (low, high)
    assert batch.cond.label.tolist() == [3]


def test_the_whole_training_set_fills_the_range():
    data = digits_data(value_range=(-1.0, 1.0))
    values = data.training_values(torch.arange(len(data.train_indices)))
    assert values.shape == (1761, 1, 8, 8)
    assert (float(values.min()), float(values.max())) == (-1.0, 1.0)
    everything = digits()
    first = torch.from_numpy(everything.value(int(data.train_indices[5]))).float() / 16 * 2 - 1
    assert torch.allclose(values[5], first)


def test_points_are_used_as_they_are():
    data = points_data(value_range=(-1.0, 1.0), dequantize=True)
    value = torch.tensor([[3.5, -7.25]])
    batch = data.prepare(value, torch.tensor([0]), torch.tensor([4]), training=True)
    assert torch.equal(batch.x, value)
    assert data.data_spec.value_range is None


def test_dequantised_values_fill_their_grey_level_and_are_keyed_by_the_image():
    data = digits_data(dequantize=True)
    value = torch.arange(17, dtype=torch.uint8).repeat(4)[:64].view(1, 1, 8, 8).repeat(500, 1, 1, 1)
    index = torch.arange(500)
    label = torch.zeros(500, dtype=torch.int64)
    x = data.prepare(value, label, index, training=True).x
    assert float(x.min()) > 0.0
    assert float(x.max()) < 1.0
    inside = x * 17 - value
    assert float(inside.min()) > -1e-4
    assert float(inside.max()) < 1 + 1e-4
    assert abs(float(inside.mean()) - 0.5) < 0.01
    assert abs(float(inside.std()) - 12**-0.5) < 0.01
    again = data.prepare(value[7:9], label[7:9], index[7:9], training=True).x
    assert torch.equal(again, x[7:9])
    assert not torch.equal(x[7], x[8])
    held_out = data.prepare(value[:1], label[:1], index[:1], training=False).x
    assert torch.allclose(held_out, (value[:1] + 0.5) / 17)  # the middle of each level's bin


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_the_data_spec_says_where_the_grey_levels_lie(dequantize, value_range):
    data = digits_data(dequantize=dequantize, value_range=value_range)
    values = data.normalize(torch.arange(17, dtype=torch.uint8))
    lie = data.data_spec.grey_levels
    assert torch.allclose(values, lie.low + lie.width * torch.arange(17))
    assert float(values[-1]) == pytest.approx(lie.high)
    bins = (lie.low - lie.width / 2, lie.high + lie.width / 2)
    assert bins == pytest.approx(value_range) if dequantize else (lie.low, lie.high) == value_range
    assert points_data().data_spec.grey_levels is None
    assert DataSpec.from_plain(data.data_spec.plain()) == data.data_spec


def test_flips_are_keyed_by_the_number_in_the_run():
    data = digits_data(flip=True)
    picture = torch.arange(8, dtype=torch.uint8).repeat(8).view(1, 1, 8, 8)
    n = torch.arange(3 * 1761)  # three epochs of the same picture
    x = data.prepare(picture.repeat(len(n), 1, 1, 1), torch.zeros(len(n)), n, training=True).x * 16
    flipped = x[:, 0, 0, 0] == 7
    assert torch.equal(flipped, keyed_uniform(0, "flip", n) < 0.5)
    assert torch.equal(x[~flipped][0, 0], picture[0, 0].float())
    assert torch.equal(x[flipped][0, 0], picture[0, 0].flip(-1).float())
    assert abs(float(flipped.double().mean()) - 0.5) < 0.03
    epochs = flipped.view(3, 1761)
    assert 0.4 < float((epochs[0] == epochs[1]).double().mean()) < 0.6  # another epoch, another coin
    later = data.prepare(picture.repeat(64, 1, 1, 1), torch.zeros(64), n[2000:2064], training=True).x * 16
    assert torch.equal(later, x[2000:2064])  # the same coin after a resume
    still = data.prepare(picture.repeat(64, 1, 1, 1), torch.zeros(64), n[:64], training=False).x * 16
    assert torch.equal(still[:, 0], picture[0].float().expand(64, 8, 8))
    other = digits_data(flip=True, seed=1)
    assert not torch.equal(other.prepare(picture.repeat(64, 1, 1, 1), torch.zeros(64), n[:64], True).x * 16, x[:64])


# ---- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 9, 10, 11, None])
def test_micro_batches_partition_the_batch(size):
    batch = Batch(torch.randn(10, 2), torch.arange(10), Condition(label=torch.arange(10) % 3))
    parts = batch.split(size)
    assert all(0 < len(part) <= (size or 10) for part in parts)
    assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
    assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
    assert torch.equal(torch.cat([part.cond.label for part in parts]), batch.cond.label)
    assert Batch(batch.x, batch.index).split(3)[0].cond is None
    assert Batch(batch.x, batch.index).split(3)[0].eps is None
    paired = [part.eps for part in Batch(batch.x, batch.index, eps=batch.x + 1).split(3)]
    assert torch.equal(torch.cat(paired), batch.x + 1)


# ---- what is refused ---------------------------------------------------------------------------------------------


def refusal(make) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "keys", "said"),
    [
        (ramp(1), {}, "1 items"),
        (ramp(9), {"global_batch_size": 0}, "global_batch_size is 0"),
        (ramp(9), {"micro_batch_size": 0}, "micro_batch_size is 0"),
        (ramp(9), {"value_range": (1.0, 1.0)}, "value_range"),
        (ramp(9), {"held_out": ramp(9, size=3)}, "shape"),
        (ramp(9, levels=17), {"held_out": ramp(9)}, "256 grey levels, data.source 17"),
        (ramp(9), {"held_out_fraction": 1.0}, "held_out_fraction"),
        (ramp(2), {"held_out_fraction": 0.9}, "leaves nothing"),
        (InMemory(np.zeros((9, 2), np.float32), num_grey_levels=None), {"flip": True}, "flip"),
        (InMemory(np.zeros((9, 2), np.float32)), {}, "num_grey_levels 256"),
        (InMemory(np.zeros((9, 1, 2, 2), np.float32), num_grey_levels=None), {}, "num_grey_levels None"),
    ],
)
def test_a_wrong_configuration(source, keys, said):
    assert said in refusal(lambda: DataModule(source, **keys))


def test_data_that_were_normalised_already_are_refused_at_the_first_batch():
    data = DataModule(InMemory(np.zeros((9, 1, 2, 2), np.float32)), 4)
    line = refusal(lambda: data.prepare(torch.rand(4, 1, 2, 2), torch.zeros(4), torch.arange(4), True))
    assert "normalized already" in line
    assert "[0.0, 1.0]" in line


def test_grey_levels_beyond_the_declared_ones_are_refused():
    data = DataModule(ramp(30, levels=17), 4)
    value = torch.full((4, 1, 2, 2), 29, dtype=torch.uint8)
    line = refusal(lambda: data.prepare(value, torch.zeros(4), torch.arange(4), True))
    assert "grey level 29" in line
    assert "0..16" in line


def test_a_batch_that_the_processes_cannot_share_is_refused():
    assert "not a multiple of the 3 processes" in refusal(lambda: on(DataModule(ramp(9), 8), 0, 3).setup("fit"))
    on(DataModule(ramp(9), 9, held_out=ramp(4)), 0, 3).setup("fit")


def test_a_process_with_nothing_to_evaluate_is_refused():
    data = on(DataModule(ramp(9), 9, held_out=ramp(2), predict_samples=2), 0, 3)
    assert "2 held-out images for 3 processes" in refusal(lambda: data.setup("fit"))
    assert "predict_samples is 2" in refusal(lambda: data.setup("predict"))
    on(DataModule(ramp(9), 9, held_out_fraction=0.0), 0, 3).setup("fit")  # none at all is a choice


def test_single_data_come_as_a_batch_does():
    data = DataModule(digits(), 16)
    indices = torch.tensor([5, 0, 9])
    batch = data.training_batch(indices)
    which = data.train_indices[indices]
    assert batch.cond.label.tolist() == [digits().label(int(i)) for i in which]
    assert torch.equal(batch.index, indices)
    values = torch.stack([torch.from_numpy(digits().value(int(i))) for i in which])
    torch.testing.assert_close(batch.x, data.normalize(values))
    held_out = data.held_out_values(torch.tensor([3]))
    torch.testing.assert_close(
        held_out[0] * 16, torch.from_numpy(digits().value(int(data.held_out_indices[3]))).float()
    )


# ---- classes -----------------------------------------------------------------------------------------------------


def labelled(labels, num_classes=None, names=None) -> InMemory:
    """A ramp with labels."""
    return ramp(len(labels), labels=np.array(labels), num_classes=num_classes or max(labels) + 1, class_names=names)


def test_the_data_spec_says_the_classes_names_and_how_often_each_is_in_training():
    data = DataModule(labelled([2, 0, 2, 2, 0] * 4, 4, ["a", "b", "c", "d"]), 4, held_out_fraction=0.25)
    left = torch.tensor([data.source.label(int(i)) for i in data.train_indices])
    assert data.data_spec.class_names == ("a", "b", "c", "d")
    assert data.data_spec.class_counts == tuple(torch.bincount(left, minlength=4).tolist())
    assert sum(data.data_spec.class_counts) == 15
    assert [a + b for a, b in zip(data.data_spec.class_counts, data.class_counts(held_out=True), strict=True)] == [
        8,
        0,
        12,
        0,
    ]
    assert (DataModule(ramp(9), 3).data_spec.class_names, DataModule(ramp(9), 3).data_spec.class_counts) == (None, None)


def held_out_labels(data: DataModule) -> list[int]:
    """As validation sees them."""
    return torch.cat([batch["label"] for batch in on(data, training=False).val_dataloader()]).tolist()


def test_held_out_classes_have_the_numbers_of_training_by_their_names():
    source = labelled([0, 1, 2, 0, 1, 2], names=["a", "b", "c"])
    data = DataModule(source, 3, held_out=labelled([0, 1, 1, 0], names=["b", "c"]))
    assert held_out_labels(data) == [1, 2, 2, 1]
    assert data.class_counts(held_out=True) == (0, 2, 2)
    turned = DataModule(source, 3, held_out=labelled([0, 1, 2], names=["c", "a", "b"]))
    assert held_out_labels(turned) == [2, 0, 1]
    # Known by name, though it has no data there; one unknown that has none does no harm.
    declared = DataModule(source, 3, held_out=labelled([1, 1], 3, ["z", "a", "y"]))
    assert held_out_labels(declared) == [0, 0]


def test_held_out_classes_without_names_keep_their_numbers():
    source = labelled([0, 1, 2, 0, 1, 2], names=["a", "b", "c"])
    assert held_out_labels(DataModule(source, 3, held_out=labelled([1, 0, 1]))) == [1, 0, 1]
    assert held_out_labels(DataModule(labelled([0, 1]), 2, held_out=labelled([1, 0], names=["x", "y"]))) == [1, 0]
    assert held_out_labels(DataModule(ramp(4), 2, held_out=labelled([1, 0]))) == [-1, -1]  # They are ignored.


@pytest.mark.parametrize(
    ("source", "held_out", "said"),
    [
        (
            labelled([0, 1], names=["b", "c"]),
            labelled([0, 1, 2], names=["a", "b", "c"]),
            "data.held_out has a class 'a' that data.source has not: a, b, c against b, c",
        ),
        (labelled([0, 1]), labelled([0, 1, 2]), "data.held_out has 3 classes, data.source 2"),
        (labelled([0, 1, 0, 3], 3), None, "data.source array: the label of item 3 is 3, and it has 3 classes, 0 to 2"),
        (labelled([0, 1, -1, -1], 2), None, "label of item 2 is -1, and it has 2 classes, 0 to 1 (2 such items)"),
        (ramp(3, num_classes=2), None, "the label of item 0 is None"),
        (labelled([0, 1]), labelled([0, 5], 2), "data.held_out array: the label of item 1 is 5"),
        (labelled([0, 1], names=["a", "b", "c"]), None, "has 2 classes and the names a, b, c"),
        (labelled([0, 1], names=["a", "a"]), None, "give each its own name"),
        (labelled([0, 4_000_000_000]), None, "has 4000000001 classes: number them from 0 without gaps"),
    ],
)
def test_labels_that_are_no_classes_are_refused_in_their_place(source, held_out, said):
    assert said in refusal(lambda: DataModule(source, 2, held_out=held_out))
