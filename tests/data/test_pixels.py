"""One meaning of a file's pixels, whoever reads it: training, reference statistics, evaluation."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_diffusion.data import ImageFolder
from lit_diffusion.data.as_given import images_as_given
from lit_diffusion.data.pixels import LOOKED_AT, decode, height_and_width, middle, to_pixels
from lit_diffusion.errors import UserError
from lit_diffusion.images import to_uint8
from lit_diffusion.metrics.reference import RealData
from lit_diffusion.training.datamodule import DataModule


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_16(samples, colour_type, transparent=b""):
    """A PNG of 16-bit samples ``[H, W, C]``, which Pillow writes of grey alone."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    if transparent:
        parts.insert(1, chunk(b"tRNS", transparent))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(picture, file_format, **keys):
    out = io.BytesIO()
    picture.save(out, format=file_format, **keys)
    return out.getvalue()


def over_white(values, alpha):
    return values * (alpha / 255.0) + 255.0 * (1.0 - alpha / 255.0)


ORIENTED = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


def of_kind(kind, rng, shape, **exif):
    """The bytes of a file, its ending, and what its pixels mean: float ``[H, W, C]``."""
    grey, color, alpha = (rng.integers(0, 256, (*shape, *last), dtype=np.uint8) for last in ((), (3,), ()))
    more = rng.integers(0, 256, (*shape, 4)).astype(np.uint16)  # low bytes, which do not count
    if kind == "grey":
        return saved(Image.fromarray(grey), "PNG", **exif), "png", grey[..., None]
    if kind == "grey, one transparent":
        hole = int(grey[0, 0])
        return (
            saved(Image.fromarray(grey), "PNG", transparency=hole, **exif),
            "PNG",
            np.where(grey == hole, 255, grey)[..., None],
        )
    if kind == "grey and alpha":
        both = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
        return saved(both, "PNG", **exif), "png", over_white(grey, alpha)[..., None]
    if kind == "bilevel":
        return saved(Image.fromarray(grey > 127), "PNG", **exif), "png", np.where(grey > 127, 255, 0)[..., None]
    if kind == "16-bit grey":
        wide = (grey.astype(np.uint16) << 8) + more[..., 0]
        return saved(Image.fromarray(wide), "PNG", **exif), "png", grey[..., None]
    if kind == "16-bit grey, TIFF":
        wide = (grey.astype(np.uint16) << 8) + more[..., 0]
        return saved(Image.fromarray(wide), "TIFF", **exif), "tiff", grey[..., None]
    if kind == "rgb":
        return saved(Image.fromarray(color), "PNG", **exif), "png", color
    if kind == "rgb, WebP":
        return saved(Image.fromarray(color), "WEBP", lossless=True, **exif), "webp", color
    if kind == "rgb, TIFF":
        return saved(Image.fromarray(color), "TIFF", **exif), "tif", color
    if kind == "rgba":
        return (
            saved(Image.fromarray(np.dstack([color, alpha])), "PNG", **exif),
            "png",
            over_white(color, alpha[..., None]),
        )
    if kind == "cmyk":
        return saved(Image.fromarray(color).convert("CMYK"), "TIFF", **exif), "tiff", color
    indices, table = grey % 16, rng.integers(0, 256, (16, 3), dtype=np.uint8)
    palette = Image.fromarray(indices)
    palette.putpalette(table.tobytes())
    seen = table[indices].astype(float)
    if kind == "palette":
        return saved(palette, "PNG", **exif), "png", seen
    hole = int(indices[0, 0])
    seen[indices == hole] = 255
    assert kind == "palette, one transparent"
    return saved(palette, "PNG", transparency=hole, **exif), "png", seen


KINDS = [
    *("grey", "grey, one transparent", "grey and alpha", "bilevel", "16-bit grey", "16-bit grey, TIFF"),
    *("rgb", "rgb, WebP", "rgb, TIFF", "rgba", "cmyk", "palette", "palette, one transparent"),
]


@given(
    kind=st.sampled_from(KINDS),
    orientation=st.none() | st.sampled_from(sorted(ORIENTED)),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_every_reader_sees_the_same_pixels(tmp_path_factory, kind, orientation, shape, seed):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    data, ending, meant = of_kind(kind, np.random.default_rng(seed), shape, exif=exif)
    meant = ORIENTED[orientation or 1](meant).transpose(2, 0, 1)
    folder = tmp_path_factory.mktemp("set")
    for number in range(2):
        (folder / f"{number}.{ending}").write_bytes(data)

    given = images_as_given(folder)
    assert given.shape == meant.shape
    seen = given.value(0)
    assert seen.dtype == np.uint8
    assert np.abs(seen - meant).max() <= (1.0 if "alpha" in kind or kind == "rgba" else 0.0)
    source = ImageFolder(folder, size=meant.shape[1:], channels=meant.shape[0])
    np.testing.assert_array_equal(source.value(1), seen)
    for each in (given, source):
        np.testing.assert_array_equal(
            RealData.of(each, torch.arange(2), "all").values(torch.arange(1))[0].transpose(2, 0, 1), seen
        )
    trained_on = DataModule(source, 1, value_range=(-1.0, 1.0), held_out_fraction=0.0).training_values(torch.arange(2))
    np.testing.assert_array_equal(to_uint8(trained_on, (-1.0, 1.0))[1].transpose(2, 0, 1), seen)


def test_what_pillow_alone_reads_otherwise():
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 1 << 16, (4, 5, 4)).astype(np.uint16)
    high = (wide >> 8).astype(float)
    for colour_type, channels in ((0, 1), (2, 3)):
        seen = decode(png_16(wide[..., :channels], colour_type))
        np.testing.assert_array_equal(seen, high[..., :channels].transpose(2, 0, 1))
    assert np.abs(decode(png_16(wide, 6)) - over_white(high[..., :3], high[..., 3:]).transpose(2, 0, 1)).max() <= 1.0
    # Of 16 bits one grey is transparent, not all of its high byte.
    wide[0, 1, 0] = wide[0, 0, 0] ^ 1
    seen = decode(png_16(wide[..., :1], 0, transparent=struct.pack(">H", int(wide[0, 0, 0]))))
    assert seen[0, 0, 0] == 255
    assert seen[0, 0, 1] == wide[0, 0, 0] >> 8
    # What was widened from 8 bits, by either factor, is what it was.
    grey = np.arange(256, dtype=np.uint16)[None]
    for factor in (256, 257):
        np.testing.assert_array_equal(to_pixels(Image.fromarray(grey * factor))[0], grey)


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa", "RGBX", "LAB", "HSV", "YCbCr", "I;16B"])
def test_rare_modes(mode):
    plain = Image.fromarray(np.full((2, 3), 200, np.uint8))
    picture = plain.convert("LA").convert("La") if mode == "La" else plain
    if mode in ("RGBa", "PA"):
        picture = plain.convert("RGBA" if mode == "RGBa" else "P").convert(mode)
    elif mode == "LAB":
        picture = Image.new("LAB", (3, 2), (206, 128, 128))
    elif mode == "I;16B":
        picture = Image.frombytes("I;16B", (3, 2), b"\xc8\x37" * 6)
    elif mode != "La":
        picture = plain.convert("RGB").convert(mode)
    assert picture.mode == mode
    for channels in (1, 3):
        assert np.abs(to_pixels(picture, (2, 3), channels).astype(int) - 200).max() <= 3
    assert len(to_pixels(picture)) == (1 if mode in ("La", "I;16B") else 3)


def test_small_32_bit_values_are_not_taken_for_16_bit_ones(tmp_path):
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(tmp_path / "0.tiff")
    for read in (lambda: ImageFolder(tmp_path, 8).value(0), lambda: images_as_given(tmp_path)):
        with pytest.raises(UserError, match=r"0.tiff in .* \(32-bit values"):
            read()


def test_a_tiff_file_of_five_channels_is_sent_to_npz(tmp_path):
    small = Image.fromarray(np.zeros((2, 2, 3), np.uint8))
    data = bytearray(saved(small, "TIFF"))
    place = data.index(struct.pack("<HHI", 277, 3, 1))  # samples per pixel
    data[place + 8 : place + 10] = struct.pack("<H", 5)
    (tmp_path / "0.tif").write_bytes(data)
    with pytest.raises(UserError, match=r"0.tif in .* put images of other than grey or RGB into an .npz file"):
        ImageFolder(tmp_path, 2).value(0)


def test_of_an_animation_the_first_picture_counts_and_this_is_said_once(tmp_path, capsys):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255)]
    for ending, keys in (("gif", {}), ("png", {}), ("webp", {"lossless": True}), ("tiff", {})):
        frames[0].save(tmp_path / f"moving.{ending}", save_all=True, append_images=frames[1:], **keys)
    frames[1].save(tmp_path / "still.gif")
    source, given = ImageFolder(tmp_path, 8), images_as_given(tmp_path)
    for each in (source, given):
        assert [int(each.value(i).mean()) for i in range(5)] == [0, 0, 0, 0, 255]
        said = f"{tmp_path}: 4 of 5 images hold several pictures (animations, pages): the first of each is taken"
        assert each.notes() == [said]
    DataModule(source, 1)
    assert capsys.readouterr().out == said + "\n"


def test_grey_and_colour_in_one_folder_are_rgb_as_in_training(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "0.png")
    Image.fromarray(np.dstack([grey, grey.T, grey])).save(tmp_path / "1.png")
    source, given = ImageFolder(tmp_path, 8), images_as_given(tmp_path)
    assert given.shape == (3, 8, 8)
    for i in range(2):
        np.testing.assert_array_equal(given.value(i), source.value(i))


@pytest.mark.parametrize(
    ("sides", "size", "box"),
    [
        ((8, 8), (8, 8), (0, 0, 8, 8)),
        ((32, 16), (16, 16), (8, 0, 24, 16)),
        ((16, 32), (8, 8), (0, 8, 16, 24)),
        ((32, 16), (8, 16), (0, 0, 32, 16)),
        ((40, 16), (8, 16), (4, 0, 36, 16)),
        ((32, 20), (8, 16), (0, 2, 32, 18)),
        ((65, 33), (16, 32), (0, 0, 65, 33)),  # to the pixel
        ((1, 9), (1, 90), (0, 4, 1, 5)),
    ],
)
def test_the_largest_rectangle_of_a_ratio_in_the_middle(sides, size, box):
    assert middle(sides, size) == box


def test_rectangles_keep_their_pixels_and_cutting_is_said_once(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 16, 32, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    whole = ImageFolder(tmp_path, size=(16, 32))
    assert (whole.shape, whole.notes()) == ((3, 16, 32), [])
    np.testing.assert_array_equal(np.stack([whole.value(i) for i in range(3)]), images.transpose(0, 3, 1, 2))
    assert ImageFolder(tmp_path, size=(8, 16)).notes() == []
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(images[0].swapaxes(0, 1)).save(tmp_path / "turned.png", exif=exif)  # upright it is 16 x 32
    Image.fromarray(images[0, :, :16]).save(tmp_path / "square.png")
    assert ImageFolder(tmp_path, size=(16, 32)).notes() == [
        f"{tmp_path}: 1 of 5 images are cut to the middle that has the sides of 16 x 32"
    ]
    cut = ImageFolder(tmp_path, size=16)
    np.testing.assert_array_equal(cut.value(0), images[0][:, 8:24].transpose(2, 0, 1))
    DataModule(cut, 1, held_out=ImageFolder(tmp_path, size=16))
    said = capsys.readouterr().out.splitlines()
    line = f"{tmp_path}: 4 of 5 images are cut to the middle that has the sides of 16 x 16"
    assert said == [f"{line}; size takes [height, width], too"] * 2  # of the training and of the held-out set


def test_of_many_images_some_are_looked_at(tmp_path):
    Image.fromarray(np.zeros((1, 2), np.uint8)).save(tmp_path / "0.png")
    for number in range(1, LOOKED_AT + 500):
        (tmp_path / f"{number}.png").hardlink_to(tmp_path / "0.png")
    [line] = ImageFolder(tmp_path, size=1).notes()
    assert "1,000 of 1,000 images looked at (of 1,500) are cut" in line


@pytest.mark.parametrize("size", [0, (16, 0), (16,), (1, 2, 3), (16.0, 16.0)])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(
        UserError, match=r"is not an image's size: give a number of pixels, e.g. 32, or \[height, width\]"
    ):
        height_and_width(size)
