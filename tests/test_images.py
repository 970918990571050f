import ast
import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import lit_diffusion
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.data_spec import DataSpec
from lit_diffusion.errors import UserError
from lit_diffusion.images import image_grid, save_png, to_uint8
from lit_diffusion.metrics.reference import RealData
from lit_diffusion.training.datamodule import DataModule

RANGES = [(0.0, 1.0), (-1.0, 1.0)]
ENDS = [-1.2, -1.0, 0.0, 1.0, 1.2, float(np.nextafter(np.float32(1), np.float32(0))), 0.5, -0.5, 1e-30]
values = st.lists(st.floats(-1.2, 1.2) | st.sampled_from(ENDS), min_size=1, max_size=50)


def bytes_of(numbers, value_range, dtype=torch.float32):
    x = torch.tensor(numbers, dtype=dtype).view(1, 1, 1, -1)
    out = to_uint8(x, value_range)
    assert (out.dtype, out.shape) == (np.uint8, (1, 1, len(numbers), 1))
    return out.ravel().astype(int)


@pytest.mark.parametrize("value_range", RANGES)
@given(numbers=values)
@settings(max_examples=150, deadline=None)
def test_bytes_are_clamped_scaled_and_rounded_to_the_nearest(value_range, numbers):
    low, high = map(Fraction, value_range)
    numbers = np.array(numbers, dtype=np.float32).tolist()
    got = bytes_of(numbers, value_range)
    for number, byte in zip(numbers, got, strict=True):
        exact = (min(max(Fraction(float(number)), low), high) - low) / (high - low) * 255
        # Nearest, but for what float32 cannot tell from a half.
        assert abs(byte - exact) <= Fraction(1, 2) + Fraction(1, 10_000)
        if number <= low:
            assert byte == 0
        if number >= high:
            assert byte == 255
    order = np.argsort(np.array(numbers, dtype=np.float64))
    assert (np.diff(got[order]) >= 0).all()


@pytest.mark.parametrize("value_range", [*RANGES, (-0.5, 0.5)])
def test_black_white_and_every_level_between(value_range):
    low, high = value_range
    assert bytes_of([low, high, low - 100, high + 100], value_range).tolist() == [0, 255, 0, 255]
    levels = [low + (high - low) * byte / 255 for byte in range(256)]
    assert bytes_of(levels, value_range).tolist() == list(range(256))
    assert bytes_of(levels, value_range, torch.float64).tolist() == list(range(256))
    # A third of a level away is still the same byte.
    for shift in (0.3, -0.3):
        moved = [level + shift * (high - low) / 255 for level in levels]
        assert bytes_of(moved, value_range).tolist() == list(range(256))


@pytest.mark.parametrize("levels", [2, 7, 11, 16, 17, 64, 101, 127, 161, 256])
def test_a_grey_level_is_one_byte_in_training_reference_and_samples(levels):
    source = InMemory(np.tile(np.arange(levels, dtype=np.uint8), (2, 1, 1, 1)), num_grey_levels=levels)
    both = torch.arange(2)
    reference = RealData.of(source, both, "all").values(both)
    assert reference[0, 0, :, 0].tolist() == [
        int(Fraction(255 * v, levels - 1) + Fraction(1, 2)) for v in range(levels)
    ]
    for value_range in RANGES:
        for dequantize in (False, True):
            data = DataModule(source, 1, value_range, held_out_fraction=0.0, dequantize=dequantize)
            np.testing.assert_array_equal(to_uint8(data.training_values(both), data.data_spec), reference)


@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_nothing_on_the_way(value_range, dtype):
    x = torch.linspace(-1.2, 1.2, 1000).to(dtype).view(2, 1, 20, 25)
    assert np.array_equal(to_uint8(x, value_range), to_uint8(x.float(), value_range))
    assert len(np.unique(to_uint8(x, value_range))) > 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_has_no_grey_level(bad):
    x = torch.zeros(2, 3, 4, 4)
    x[1, 2, 0, 3] = bad
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="NaN or infinite"):
            to_uint8(x.to(dtype), (-1.0, 1.0))


def test_channels_come_last_and_gradients_stay_out():
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).float().requires_grad_() / 255
    out = to_uint8(x, (0.0, 1.0))
    assert out.shape == (2, 4, 5, 3)
    for n, c, h, w in [(0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 3), (0, 1, 3, 1)]:
        assert out[n, h, w, c] == ((n * 3 + c) * 4 + h) * 5 + w


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("levels", [2, 17, 255, 256])
def test_training_values_have_the_bytes_of_their_source(levels, value_range, dequantize):
    """A perfect model's samples are judged as what they are."""
    grey = np.arange(levels, dtype=np.uint8).repeat(50)[:, None, None, None]
    source = InMemory(grey, num_grey_levels=levels)
    data = DataModule(source, 1, value_range=value_range, held_out_fraction=0.0, dequantize=dequantize)
    index = torch.arange(len(grey))
    expected = RealData.of(source, index, "train").values(index)
    for training in (False, True):
        x = data.prepare(torch.from_numpy(grey), torch.full((len(grey),), -1), index, training).x
        np.testing.assert_array_equal(to_uint8(x, data.data_spec), expected)
    if not dequantize:
        np.testing.assert_array_equal(to_uint8(x, data.data_spec), to_uint8(x, value_range))


def test_a_bin_holds_its_lower_end_and_the_outermost_all_beyond():
    data_spec = DataSpec("x", (1, 1, 1), 4, (0.0, 1.0), None, dequantized=True)
    x = torch.tensor([-9.0, 0.0, 0.25, 0.4999, 0.5, 0.75, 0.999, 1.0, 9.0]).view(1, 1, 1, -1)
    assert (to_uint8(x, data_spec).ravel() / 85).tolist() == [0, 0, 1, 1, 2, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="x are points"):
        to_uint8(x, DataSpec("x", (2,), None, None, None))


def pictures(count, height, width, channels):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(4, None, (2, 2)), (5, None, (2, 3)), (6, 2, (3, 2)), (1, None, (1, 1)), (3, 8, (1, 8))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_its_images_row_by_row(count, columns, shape, channels):
    images = pictures(count, 3, 5, channels)
    grid = image_grid(images, columns, gap=2, min_side=1)
    rows, columns = shape
    assert grid.shape == (rows * 5 + 2, columns * 7 + 2, channels)
    assert grid.dtype == np.uint8
    rest = np.ones(grid.shape[:2], dtype=bool)
    for n, image in enumerate(images):
        top, left = 2 + 5 * (n // columns), 2 + 7 * (n % columns)
        np.testing.assert_array_equal(grid[top : top + 3, left : left + 5], image)
        rest[top : top + 3, left : left + 5] = False
    assert len(np.unique(grid[rest])) == 1


def test_a_grid_of_small_images_is_enlarged_by_a_whole_factor():
    images = pictures(4, 8, 8, 3)
    grid = image_grid(images, min_side=256)
    # 256 // (2 * 9) = 14 times, the gap 14 // 4 = 3.
    assert grid.shape == (2 * (8 * 14 + 3) + 3, 2 * (8 * 14 + 3) + 3, 3)
    np.testing.assert_array_equal(grid[3 : 3 + 112, 3 : 3 + 112], np.kron(images[0], np.ones((14, 14, 1), np.uint8)))
    np.testing.assert_array_equal(grid[118 : 118 + 112 : 14, 118 : 118 + 112 : 14], images[3])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_bytes(tmp_path, channels):
    image = pictures(1, 16, 9, channels)[0]
    path = tmp_path / "new" / "picture.png"
    save_png(image, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with Image.open(io.BytesIO(path.read_bytes())) as decoded:
        assert decoded.mode == {1: "L", 3: "RGB"}[channels]
        np.testing.assert_array_equal(np.asarray(decoded).reshape(image.shape), image)
    assert [entry.name for entry in path.parent.iterdir()] == ["picture.png"]


def test_a_png_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_png(pictures(1, 2, 2, 1)[0], tmp_path / "file" / "picture.png")


# No other module makes bytes of floats.

ALLOWED = {
    "images.py": "to_uint8 itself",
    "data/pixels.py": "decodes pictures: the high byte of 16-bit values, integers all",
    "data/digits.py": "the digits' grey levels 0 .. 16, integers that scikit-learn stores as floats",
}
SCALES = {255, 127.5, 256}  # 255.0 equals 255.


def made_bytes(source):
    """The lines of a module that convert to uint8 or scale to 0 .. 255."""

    converters = ("to", "type", "astype", "asarray", "array", "tensor", "convert_image_dtype")
    found = []

    def is_uint8(node):
        return (isinstance(node, ast.Attribute) and node.attr in ("uint8", "ubyte", "ByteTensor")) or (
            isinstance(node, ast.Constant) and node.value in ("uint8", "u1", "B", "torch.uint8")
        )

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            # Conversions, and constructors from values; empty, zeros and full take none.
            converts = node.func.attr in converters and any(is_uint8(argument) for argument in arguments)
            if converts or node.func.attr in ("byte", "ByteTensor", "uint8"):
                found.append(node.lineno)
        scaled = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            scaled = [node.left, node.right]
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Mult):
            scaled = [node.value]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("mul", "mul_", "multiply")
        ):
            scaled = node.args
        if any(isinstance(factor, ast.Constant) and factor.value in SCALES for factor in scaled):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "y = x.byte()",
        "y = x * 255",
        "y = 255.0 * x",
        "y = (x + 1) * 127.5",
        "x *= 255",
        "y = x.mul(255).add_(0.5)",
        "y = x.to(torch.uint8)",
        "y = x.to(device, dtype=torch.uint8)",
        "y = x.type(torch.uint8)",
        "y = x.astype(np.uint8)",
        "y = x.astype('uint8')",
        "y = np.asarray(x, dtype=np.uint8)",
        "y = np.uint8(x)",
    ],
)
def test_the_search_finds_bytes_that_are_made(line):
    assert made_bytes(f"import torch\n{line}\n") == [2]


def test_the_search_passes_what_makes_none():
    assert (
        made_bytes(
            '"""x.to(torch.uint8) * 255"""\na = np.zeros(3, dtype=np.uint8)\nb = x.dtype == np.uint8\nc = x / 255\n'
        )
        == []
    )


def test_images_of_a_model_are_made_bytes_with_its_data_spec():
    """A bare value range knows nothing of dequantized levels: only a source's own levels need no more."""
    root = Path(lit_diffusion.__file__).parent
    bare = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "to_uint8":
                known = getattr(node.args[1], "id", "") in ("data_spec", "spec")
                bare += [] if known else [path.relative_to(root).as_posix()]
    assert bare == ["metrics/reference.py"]


def test_to_uint8_is_the_only_way_from_floats_to_bytes():
    root = Path(lit_diffusion.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        lines = made_bytes(path.read_text())
        if lines:
            found[path.relative_to(root).as_posix()] = lines
    assert set(found) <= set(ALLOWED), {name: lines for name, lines in found.items() if name not in ALLOWED}
    assert set(found) == set(ALLOWED), "the allow-list names a module that no longer needs it"
