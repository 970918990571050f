"""A model comes back from its file alone; what is not such a file is refused in one line."""

from __future__ import annotations

import copy
import zipfile

import pytest
import torch
from helpers.tiny import TINY, digits_data, fit, run_logger, same, weights

import lit_diffusion
from lit_diffusion.callbacks import EMA, Checkpoint
from lit_diffusion.checkpoints import (
    DamagedError,
    build_method,
    checkpoint_config,
    load,
    newest_checkpoint,
    open_checkpoint,
    read_checkpoint,
    require_fitting_weights,
)
from lit_diffusion.errors import UserError
from lit_diffusion.methods import NCSN
from lit_diffusion.runs.formats import require_known_format

MODEL = copy.deepcopy(TINY["model"])
MODEL["init_args"]["backbone"]["init_args"]["data_shape"] = [1, 8, 8]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A method, its averages and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    method, ema = build_method(MODEL), EMA([64, 500], ramp=1.0)
    method.run_config = {"model": MODEL}
    fit(
        method,
        digits_data(value_range=(-1.0, 1.0)),
        folder,
        96,
        callbacks=[ema, Checkpoint()],
        logger=run_logger(folder, method),
    )
    return method, ema, folder / "run" / "checkpoints" / "last.ckpt"


def test_a_method_is_built_from_its_section():
    method = build_method(MODEL)
    assert isinstance(method, NCSN)
    assert method.denoiser.process.num_timesteps == 3
    assert method.sampler.eta == 0.001
    assert method.configure_optimizers()[0].param_groups[0]["lr"] == 0.01
    with pytest.raises(UserError, match="levelz"):
        build_method({**MODEL, "init_args": {**MODEL["init_args"], "levelz": 3}})


def test_load_gives_the_method_of_the_file(trained):
    method, _, path = trained
    loaded = load(path, weights="raw")
    assert same(loaded.state_dict(), method.state_dict())
    assert loaded.data_spec == method.data_spec
    assert loaded.data_spec.value_range == (-1.0, 1.0)
    assert (loaded.clock.images, loaded.clock.steps) == (96, 3)
    assert loaded.run_config == {"model": MODEL}
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded.generate(torch.arange(3), 1).x, method.generate(torch.arange(3), 1).x)


@pytest.mark.parametrize(("asked", "position"), [(None, 0), ("ema", 0), ("ema:64", 0), ("ema:500", 1)])
def test_load_takes_the_average_asked_for(trained, asked, position):
    _, ema, path = trained
    assert same(weights(load(path, asked)), ema.shadows[position])
    assert not same(*ema.shadows)


def test_load_without_averages_gives_the_raw_weights(trained, tmp_path):
    method, _, path = trained
    saved = torch.load(path, weights_only=True)
    del saved["callbacks"]["EMA"]
    torch.save(saved, tmp_path / "a.ckpt")
    assert same(weights(load(tmp_path / "a.ckpt")), weights(method))
    with pytest.raises(UserError, match=r"'ema' are not kept; choose one of raw$"):
        load(tmp_path / "a.ckpt", "ema")


def test_the_package_offers_load(trained):
    assert isinstance(lit_diffusion.load(trained[2]), NCSN)


def refusal(make) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_none(trained, tmp_path):
    path = tmp_path / "a.ckpt"
    assert "does not exist" in refusal(lambda: read_checkpoint(path))
    assert "does not exist" in refusal(lambda: read_checkpoint(tmp_path))
    whole = trained[2].read_bytes()
    for torn in (b"", b"PK\x03\x04", b"text\n", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(torn)
        assert f"cannot read checkpoint {path}: truncated, or not a checkpoint" in refusal(
            lambda: read_checkpoint(path)
        )


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"lit_diffusion": Evil()}, tmp_path / "a.ckpt")
    assert "not a checkpoint" in refusal(lambda: read_checkpoint(tmp_path / "a.ckpt"))
    assert not Evil.ran


def test_foreign_and_newer_files(trained, tmp_path):
    path = tmp_path / "a.ckpt"
    for foreign in ({"state_dict": {}}, [1, 2], torch.zeros(3)):
        torch.save(foreign, path)
        assert "was not written by lit_diffusion" in refusal(lambda: read_checkpoint(path))
    saved = torch.load(trained[2], weights_only=True)
    for version in (2, 0, None, "1"):
        saved["lit_diffusion"]["format_version"] = version
        torch.save(saved, path)
        assert f"format_version {version!r}, this lit_diffusion reads 1" in refusal(lambda: read_checkpoint(path))
    assert "what has format_version 3" in refusal(lambda: require_known_format(3, "what"))


def test_a_run_of_python_code_has_no_configuration(trained, tmp_path):
    saved = torch.load(trained[2], weights_only=True)
    assert checkpoint_config(saved, "x") == {"model": MODEL}
    saved["lit_diffusion"]["config"] = None
    assert "holds no configuration" in refusal(lambda: checkpoint_config(saved, "a.ckpt"))


def test_weights_of_another_model_are_refused_by_the_first_that_differs(trained):
    method, _, path = trained
    state = method.state_dict()
    require_fitting_weights(method, state, path)
    name = sorted(state)[3]
    fewer = {key: value for key, value in state.items() if key != name}
    assert f"the checkpoint has no {name}" in refusal(lambda: require_fitting_weights(method, fewer, path))
    more = {**state, "denoiser.other": torch.zeros(2)}
    assert "this model has no denoiser.other" in refusal(lambda: require_fitting_weights(method, more, path))
    wider = {**state, name: torch.zeros(9, 9)}
    line = refusal(lambda: require_fitting_weights(method, wider, path))
    assert f"{name} is [9, 9] there and {list(state[name].shape)} here" in line


def test_a_file_whose_weights_do_not_fit_its_own_configuration(trained, tmp_path):
    saved = torch.load(trained[2], weights_only=True)
    saved["lit_diffusion"]["config"]["model"]["init_args"]["backbone"]["init_args"]["channels"] = 16
    torch.save(saved, tmp_path / "a.ckpt")
    assert "does not fit this model" in refusal(lambda: load(tmp_path / "a.ckpt"))


# ---- the newest of a run -----------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(trained, tmp_path):
    """A run with two checkpoints, which differ in their images seen."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    saved = torch.load(trained[2], weights_only=True)
    for name, images in (("previous.ckpt", 64), ("last.ckpt", 96)):
        saved["lit_diffusion"]["images_seen"] = images
        torch.save(saved, folder / "checkpoints" / name)
    return folder


def newest(run_dir):
    path, saved = newest_checkpoint(run_dir)
    assert path.parent == run_dir / "checkpoints"
    return path.name, saved["lit_diffusion"]["images_seen"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_byte(path):
    """In the middle of the largest tensor, where nothing but the checksum can tell."""
    with zipfile.ZipFile(path) as parts:
        part = max((part for part in parts.infolist() if "/data/" in part.filename), key=lambda part: part.file_size)
    content = bytearray(path.read_bytes())
    head = part.header_offset  # A local header: 30 bytes, its name, its padding.
    sizes = content[head + 26 : head + 30]
    start = head + 30 + int.from_bytes(sizes[:2], "little") + int.from_bytes(sizes[2:], "little")
    content[start + part.file_size // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_is_the_last(run_dir, capsys):
    assert newest(run_dir) == ("last.ckpt", 96)
    assert capsys.readouterr().out == ""
    (run_dir / "checkpoints" / "previous.ckpt").unlink()
    assert newest(run_dir) == ("last.ckpt", 96)


def test_a_run_without_any_has_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".last.ckpt.tmp").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", [cut, flip_a_byte, lambda path: path.write_bytes(b"")])
def test_a_damaged_last_one_is_passed_over_with_a_note(run_dir, damage, capsys):
    damage(run_dir / "checkpoints" / "last.ckpt")
    assert newest(run_dir) == ("previous.ckpt", 64)
    (line,) = capsys.readouterr().out.splitlines()
    assert "last.ckpt: truncated, or not a checkpoint" in line
    assert line.endswith(f"continuing from {run_dir / 'checkpoints' / 'previous.ckpt'}, the one before")


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_a_runs_directory_means_its_newest_checkpoint_and_that_is_said(run_dir, inside, capsys):
    given = run_dir / inside
    path, saved = open_checkpoint(given)
    assert (path, saved["lit_diffusion"]["images_seen"]) == (run_dir / "checkpoints" / "last.ckpt", 96)
    assert capsys.readouterr().out == f"{given}: taking {path}, 96 images seen\n"
    assert load(given).clock.images == 96
    assert f"taking {path}" in capsys.readouterr().out
    assert open_checkpoint(path)[0] == path
    assert capsys.readouterr().out == ""
    cut(path)
    path, saved = open_checkpoint(given)
    assert (path.name, saved["lit_diffusion"]["images_seen"]) == ("previous.ckpt", 64)
    said = capsys.readouterr().out
    assert f"taking {path}, the one before" in said
    assert f"{given}: taking {path}, 64 images seen" in said


def test_a_directory_that_is_no_runs_is_one_line(run_dir, tmp_path):
    for given in (tmp_path, run_dir.parent, tmp_path / "empty"):
        (tmp_path / "empty" / "checkpoints").mkdir(parents=True, exist_ok=True)
        line = refusal(lambda given=given: open_checkpoint(given))
        assert f"{given} is a directory without a checkpoint of a run" in line
    assert "does not exist" in refusal(lambda: open_checkpoint(tmp_path / "nowhere"))


def test_a_missing_last_one_is_no_damage(run_dir, capsys):
    """A kill between two renamings, on a file system without hard links."""
    (run_dir / "checkpoints" / "last.ckpt").unlink()
    assert newest(run_dir) == ("previous.ckpt", 64)
    assert capsys.readouterr().out == ""


def test_a_flipped_byte_of_a_weight_is_found_by_the_checksum_alone(run_dir):
    path = run_dir / "checkpoints" / "last.ckpt"
    flip_a_byte(path)
    torch.load(path, weights_only=True)  # Sees nothing.
    with pytest.raises(DamagedError, match="checksum"):
        read_checkpoint(path)


def test_two_damaged_ones_are_one_line(run_dir):
    for name in ("last.ckpt", "previous.ckpt"):
        cut(run_dir / "checkpoints" / name)
    assert "cannot read checkpoint" in refusal(lambda: newest_checkpoint(run_dir))
    (run_dir / "checkpoints" / "previous.ckpt").unlink()
    assert "cannot read checkpoint" in refusal(lambda: newest_checkpoint(run_dir))


def test_a_newer_format_is_refused_and_not_passed_over(run_dir, capsys):
    path = run_dir / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["lit_diffusion"]["format_version"] = 2
    torch.save(saved, path)
    assert "format_version 2, this lit_diffusion reads 1" in refusal(lambda: newest_checkpoint(run_dir))
    assert capsys.readouterr().out == ""
