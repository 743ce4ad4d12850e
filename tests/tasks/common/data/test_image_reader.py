"""Image files: right values for every depth and mode, notes for warnings, content before suffix."""

import os
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin, TiffTags
from torchvision.transforms.v2.functional import pil_to_tensor

from fimaq_core.errors import DataError
from tasks.common.data.calibration import take
from tasks.common.data.files import is_hidden
from tasks.common.data.images import (
    FORMATS,
    DamagedImage,
    Images,
    UnknownRange,
    file_reader,
    image_outputs,
    is_image,
    open_image,
    open_rgb,
)
from tasks.common.data.originals import originals_below
from tasks.detection import coco

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16
CPU = torch.device("cpu")


def grey(path: Path) -> np.ndarray:
    """The one channel that the read image has three times."""
    values = np.asarray(open_rgb(path))
    assert values.shape[2:] == (3,)
    assert (values == values[:, :, :1]).all()
    return values[:, :, 0]


def write_pgm(path: Path, values: np.ndarray, maximum: int) -> None:
    path.write_bytes(
        b"P5 %d %d %d\n" % (*values.shape[::-1], maximum) + values.astype(">u2").tobytes()
    )


def write_tiff(path: Path, values: np.ndarray, bits: int = 16, white_is_zero: bool = False) -> None:
    """A bare TIFF of 16-bit or packed 12-bit grey."""
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = (
            (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
        )
        content = packed.tobytes()
    else:
        content = values.astype("<u2").tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1}
    tags |= {273: 8, 277: 1, 278: height, 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(content)) + content + directory)


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    for name in ("a.png", "a.tif"):
        Image.fromarray(RAMP).save(tmp_path / name)
    Image.fromarray(RAMP).save(tmp_path / "a.jp2", irreversible=False)
    Image.fromarray(RAMP.astype(">u2")).save(tmp_path / "b.tif")
    write_pgm(tmp_path / "a.pgm", RAMP, 65535)
    for path in tmp_path.iterdir():
        assert np.array_equal(grey(path), RAMP >> 8), path.name
    assert len(np.unique(RAMP >> 8)) == 256
    for name in ("a.png", "a.tif", "a.pgm"):  # as detection reads it
        found = coco.ImageFiles([tmp_path / name], [(64, 64)], Path("x.json")).read(0)
        assert np.array_equal(found[:, :, 1], RAMP >> 8)


def test_a_file_says_how_many_bits_it_has(tmp_path: Path) -> None:
    write_pgm(tmp_path / "a.pgm", RAMP >> 4, 4095)
    assert np.abs(grey(tmp_path / "a.pgm").astype(int) - (RAMP >> 8)).max() <= 1
    write_tiff(tmp_path / "a.tif", RAMP >> 4, bits=12)
    assert np.array_equal(grey(tmp_path / "a.tif"), RAMP >> 8)
    write_tiff(tmp_path / "b.tif", RAMP, white_is_zero=True)
    assert np.array_equal(grey(tmp_path / "b.tif"), 255 - (RAMP >> 8))
    write_tiff(tmp_path / "c.tif", RAMP)
    assert np.array_equal(grey(tmp_path / "c.tif"), RAMP >> 8)


def test_sixteen_bit_colour_keeps_its_high_bytes(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    colour = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)
    for name in ("a.png", "a.tif"):
        cv2.imwrite(str(tmp_path / name), np.ascontiguousarray(colour[:, :, ::-1]))
        assert np.array_equal(np.asarray(open_rgb(tmp_path / name)), colour >> 8)


def plain(mode: str) -> Image.Image:
    if mode == "F":
        return Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    return Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8) * 10**6)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_without_a_range_are_refused_by_name(tmp_path: Path, mode: str) -> None:
    for name, image in (("a.tif", plain(mode)), ("b.png", Image.new("RGB", (8, 8), (1, 2, 3)))):
        image.save(tmp_path / name)
    paths = [tmp_path / "a.tif", tmp_path / "b.png"]
    for read in (file_reader(paths), coco.ImageFiles(paths, [(8, 8)] * 2, Path("x.json")).read):
        images = Images(["a.tif", "b.png"], [0, 1], read, torch.tensor, False)
        problem = images[0]
        assert isinstance(problem, DataError)
        assert f"The image a.tif has {'float' if mode == 'F' else 'integer'} values" in str(problem)
        assert (
            f"mode {mode}): convert it to 8 bits, or leave such images out with --skip-corrupt."
            in str(problem)
        )
        assert Images(["a.tif"], [0], read, torch.tensor, True)[0] is None
    with pytest.raises(DataError, match=r"a\.tif has .* values without a defined range"):
        originals_below(tmp_path, ["a.tif"])


def test_signed_sixteen_bits_have_no_range(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", RAMP)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    start = 8 + 2 * RAMP.size
    count = struct.unpack_from("<H", content, start)[0]
    extra = struct.pack("<HHII", 339, 4, 1, 2)  # SampleFormat: signed
    end = start + 2 + 12 * count
    struct.pack_into("<H", content, start, count + 1)
    (tmp_path / "a.tif").write_bytes(bytes(content[:end]) + extra + bytes(content[end:]))
    with pytest.raises(UnknownRange, match="integer values"):
        open_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_eight_bit_modes_are_converted_by_pillow(tmp_path: Path, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    if mode == "LAB":
        image = Image.frombytes("LAB", (1, 2), bytes([255, 0, 0, 0, 0, 0]))
    else:
        image = colour.convert("RGBA" if mode == "LA" else mode).convert(mode)
    path = tmp_path / f"a.{'tif' if mode in ('CMYK', 'YCbCr', 'LAB') else 'png'}"
    image.save(path)
    found = np.asarray(open_rgb(path))
    if mode == "LAB":
        assert np.abs(found.astype(int) - [[[255, 255, 255]], [[0, 0, 0]]]).max() <= 2
    else:
        with Image.open(path) as opened:
            assert np.array_equal(found, np.asarray(opened.convert("RGB")))
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(found, pixels)


def transparent_palette(path: Path) -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    image.save(path, format="PNG", transparency=bytes(range(0, 255, 4)))


@pytest.mark.parametrize("workers", [0, 2])
def test_warnings_become_notes(
    tmp_path: Path, workers: int, recwarn: pytest.WarningsRecorder
) -> None:
    """One line per kind of warning, in every process; no source path in the terminal."""
    makers: list[Callable[[Path], None]] = [transparent_palette] * 5
    makers += [lambda path: Image.new("RGB", (11, 11)).save(path, format="PNG")]
    makers += [lambda path: Image.new("RGB", (8, 8)).save(path, format="PNG")]
    names = [f"{number}.png" for number in range(len(makers))]
    for name, make in zip(names, makers, strict=True):
        make(tmp_path / name)

    def transform(image: Image.Image) -> torch.Tensor:
        return pil_to_tensor(image.resize((8, 8))).float()

    images = Images(
        names, [0] * 7, file_reader([tmp_path / name for name in names]), transform, False
    )
    assert images.notes() == []
    assert (
        sum(len(batch.values) for batch in image_outputs(lambda x: x, images, CPU, 2, workers)) == 7
    )
    assert images.notes() == [
        "5 images with a palette with transparency, which was dropped: "
        "0.png, 1.png, 2.png and 2 more"
    ]
    before = images.notes()
    take(images, range(7), 7, 0)
    assert images.notes() == before
    assert len(recwarn) == 0


def test_other_warnings_are_counted_too() -> None:
    def read(index: int) -> Image.Image:
        texts = (
            "Corrupt EXIF data.  Expecting to read 4 bytes but only got 0. ",
            "Truncated File Read",
            "odd",
            "",
        )
        warnings.warn(texts[index], UserWarning if index < 3 else DeprecationWarning, stacklevel=1)
        return Image.new("RGB", (4, 4))

    images = Images(list("abcd"), [0] * 4, read, lambda image: torch.zeros(1), False)
    for index in range(4):
        assert isinstance(images[index], tuple)
    assert images.notes() == [
        "1 image with damaged EXIF metadata: a",
        "1 image with a truncated part that Pillow does not need: b",
        "1 image with another flaw that Pillow ignores (--verbose shows which): c",
    ]


def test_content_says_what_an_image_is(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (9, 99, 199))
    for kind in ("GIF", "JPEG", "AVIF", "WEBP", "PNG", "BMP", "TGA", "JPEG2000", "PCX", "QOI"):
        image.save(tmp_path / kind, format=kind)
        assert is_image(tmp_path / kind), kind
        read = coco.ImageFiles([tmp_path / kind], [(8, 8)], Path("x.json")).read
        assert np.abs(read(0).astype(int) - [199, 99, 9]).max() <= 6, kind  # blue first
    image.save(tmp_path / "EPS", format="EPS")
    for name, content in (
        ("text", b"label,name\n0,ant\n"),
        ("empty", b""),
        ("film", b"\0\0\1\xb3" + bytes(100)),
        ("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(100)),
    ):
        (tmp_path / name).write_bytes(content)
    for name in ("EPS", "text", "empty", "film", "hdf5", "absent", "."):
        assert not is_image(tmp_path / name), name
    reds = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in (255, 0)]
    reds[0].save(tmp_path / "two.gif", save_all=True, append_images=reds[1:])
    assert open_rgb(tmp_path / "two.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("tag", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_tiff_on_its_side_is_turned(tmp_path: Path, mode: str, tag: int) -> None:
    shape = (5, 9, len(mode)) if mode.isalpha() else (5, 9, 1)
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    stored = values.squeeze() if mode != "I;16" else values.squeeze().astype(np.uint16) << 8
    image = (
        Image.fromarray(stored)
        if mode != "CMYK"
        else Image.frombytes("CMYK", (9, 5), stored.tobytes())
    )
    exif = Image.Exif()
    exif[274] = tag
    image.save(tmp_path / "a.tif", exif=exif)
    flat = np.repeat(values, 3, 2) if mode == "I;16" else np.asarray(image.convert("RGB"))
    turned = {
        1: flat,
        3: np.rot90(flat, 2),
        5: flat.swapaxes(0, 1),
        6: np.rot90(flat, -1),
        8: np.rot90(flat),
    }
    turned[7] = np.rot90(flat, 2).swapaxes(0, 1)
    assert np.array_equal(np.asarray(open_rgb(tmp_path / "a.tif")), turned[tag])


def test_a_damaged_file_with_an_images_ending_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.avif"
    Image.fromarray(RAMP.astype(np.uint8)).convert("RGB").save(path)
    whole = path.read_bytes()
    transform: Callable[[Image.Image], torch.Tensor] = lambda image: torch.zeros(1)  # noqa: E731
    for content in (whole[:40], whole[:-10], whole[:280] + b"\xff" * 8 + whole[288:], b""):
        path.write_bytes(content)
        assert is_image(path)
        for skip in (True, False):
            item = Images(["a.avif"], [0], file_reader([path]), transform, skip)[0]
            assert item is None if skip else "The image a.avif is damaged" in str(item)
    for name in ("a.heic", "a.pdf", "a.txt", "avif"):
        (tmp_path / name).write_bytes(whole[:40])
        assert not is_image(tmp_path / name)


def test_hidden_names() -> None:
    hidden = (
        ".DS_Store",
        "._a.jpg",
        ".ipynb_checkpoints",
        "__MACOSX",
        "Thumbs.db",
        "desktop.ini",
        "THUMBS.DB",
    )
    assert all(map(is_hidden, hidden))
    assert not any(map(is_hidden, ("a.jpg", "_a.jpg", "0", "notes.txt", "thumbs")))


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (9_500, 9_500), (101, 1)])
def test_an_image_that_resizing_would_blow_up_is_damaged(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    """Refused by its header: a strip of 1 x 50,000 pixels took 8 GB at a short side of 256."""
    path = tmp_path / "a.png"
    Image.new("1", size).save(path)
    images = Images(["a.png"], [0], file_reader([path]), pil_to_tensor, False)
    assert f"a.png is damaged ({size[0]} x {size[1]} pixels would take too much" in str(images[0])
    assert Images(["a.png"], [0], file_reader([path]), pil_to_tensor, True)[0] is None
    read = coco.ImageFiles([path], [size[::-1]], Path("x.json")).read
    with pytest.raises(DamagedImage, match="too much memory"):
        read(0)


@pytest.mark.parametrize("kind", ["EPS", "SGI", "DDS", "PDF"])
def test_only_named_formats_are_opened(tmp_path: Path, kind: str) -> None:
    """EPS starts Ghostscript, whatever the suffix of the file is."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(path, format=kind)
    for read in (file_reader([path]), coco.ImageFiles([path], [(8, 8)], Path("x.json")).read):
        with pytest.raises(DamagedImage, match=f"none of the formats {', '.join(FORMATS)}"):
            read(0)


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").mkdir()
    (tmp_path / "c.jpg").symlink_to("c.jpg")
    words = {"a.jpg": "pipe", "b.jpg": "directory", "c.jpg": "links", "d.jpg": "No such file"}
    for name, word in words.items():
        assert not is_image(tmp_path / name)
        with pytest.raises(DamagedImage, match=word), open_image(tmp_path / name):
            pass
    with pytest.raises(DamagedImage, match="device"), open_image(Path("/dev/zero")):
        pass


def test_a_header_that_promises_a_gigabyte_takes_no_memory(tmp_path: Path) -> None:
    """A box of JPEG 2000 states its own length."""
    path = tmp_path / "a.jp2"
    Image.new("RGB", (8, 8)).save(path)
    content = path.read_bytes()
    place = content.index(b"jp2h") - 4
    path.write_bytes(content[:place] + struct.pack(">I", 2**30) + content[place + 4 :])
    tracemalloc.start()
    with pytest.raises(DamagedImage):
        open_rgb(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_a_small_tiff_with_a_large_tile_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for place in range(2):  # Pillow writes no tags of tiles
        tags[65_000 + place] = 46_000
        tags.tagtype[65_000 + place] = TiffTags.LONG
    Image.new("RGB", (8, 8)).save(path, tiffinfo=tags)
    content = path.read_bytes()
    for place, tag in enumerate((322, 323)):
        own = struct.pack("<HH", 65_000 + place, TiffTags.LONG)
        assert content.count(own) == 1
        content = content.replace(own, struct.pack("<HH", tag, TiffTags.LONG))
    path.write_bytes(content)
    with pytest.raises(DamagedImage, match="its tiles would take too much memory"):
        open_rgb(path)


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    os.truncate(path, 2**40)  # takes no room on the disk
    with pytest.raises(DamagedImage, match="1,099,511,627,776 bytes"):
        open_rgb(path)
