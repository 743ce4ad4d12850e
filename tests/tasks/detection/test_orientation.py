"""EXIF orientation: read from headers, applied as in mmdet, asked for where sizes do not tell."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_fakes import loaded, pixels, tiny, write_images, write_json
from detection_runs import cell
from PIL import Image, ImageFile, ImageOps

from fimaq_core.errors import DataError
from fimaq_core.recipe import make_recipe
from tasks.common.cell.identity import planned_folder
from tasks.common.data.images import DamagedImage
from tasks.common.registry import defaults
from tasks.common.request import DataRequest
from tasks.detection.calibration import calibration_set
from tasks.detection.coco import ImageFiles, open_file
from tasks.detection.orientation import Exif, orientation_of, turned

HEIGHT, WIDTH = 40, 60
TURNED = {tag: (WIDTH, HEIGHT) if tag > 4 else (HEIGHT, WIDTH) for tag in range(1, 9)}


def save(path: Path, tag: int, size: tuple[int, int] = (HEIGHT, WIDTH), seed: int = 0) -> Path:
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(pixels(*size, seed)).save(path, exif=exif)
    return path


def late(path: Path) -> Path:
    """Move the EXIF block of a PNG behind its pixels, where some programs write it."""
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    length = struct.unpack(">I", content[start : start + 4])[0] + 12
    block, rest = content[start : start + length], content[:start] + content[start + length :]
    end = rest.index(b"IEND") - 4
    path.write_bytes(rest[:end] + block + rest[end:])
    return path


@pytest.mark.parametrize("tag", range(1, 9))
def test_turning_as_pillow_does(tag: int, tmp_path: Path) -> None:
    with Image.open(save(tmp_path / "x.png", tag)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(turned(pixels(HEIGHT, WIDTH, 0), tag), expected)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_applied_as_mmdet_does(ending: str, tag: int, tmp_path: Path) -> None:
    from mmcv.transforms import LoadImageFromFile

    path = save(tmp_path / f"x.{ending}", tag)
    expected = LoadImageFromFile().transform({"img_path": str(path)})["img"]
    assert np.array_equal(
        ImageFiles([path], [TURNED[tag]], Path("x.json"), "apply").read(0), expected
    )


def test_ignored_are_the_stored_pixels(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", 6)
    found = ImageFiles([path], [(HEIGHT, WIDTH)], Path("x.json"), "ignore").read(0)
    assert np.array_equal(found, pixels(HEIGHT, WIDTH, 0)[:, :, ::-1])


@pytest.mark.parametrize("place", [lambda path: path, late])
def test_png_before_and_behind_the_pixels(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(save(tmp_path / "x.png", 3))
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded")
    )
    assert orientation_of(path, (HEIGHT, WIDTH), None).tag == 3


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("exif", [None, "apply", "ignore"])
def test_decisions(tag: int, exif: Exif | None, tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", tag)
    as_stored = orientation_of(path, (HEIGHT, WIDTH), exif)
    as_turned = orientation_of(path, TURNED[tag], exif)
    assert (as_stored.tag, as_stored.stored) == (tag, (HEIGHT, WIDTH))
    if tag == 1:
        assert as_stored.applied is False
    elif exif is not None:
        assert as_stored.applied == as_turned.applied == (exif == "apply")
    elif tag > 4:
        assert (as_stored.applied, as_turned.applied) == (False, True)
    else:
        assert as_stored.applied is None


def test_square_images_do_not_tell(tmp_path: Path) -> None:
    assert orientation_of(save(tmp_path / "x.jpg", 6, (50, 50)), (50, 50), None).applied is None


@pytest.mark.parametrize(
    "block", [b"", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\0", b"Exif\0\0nonsense"]
)
def test_damaged_blocks_have_no_orientation(block: bytes, tmp_path: Path) -> None:
    Image.fromarray(pixels(HEIGHT, WIDTH, 0)).save(tmp_path / "x.jpg", exif=block)
    assert orientation_of(tmp_path / "x.jpg", (HEIGHT, WIDTH), None).applied is False
    assert orientation_of(save(tmp_path / "x.png", 9), (HEIGHT, WIDTH), None).tag == 1


def written(folder: Path, tags: dict[int, int], turn: bool) -> Path:
    """The tiny data set with EXIF tags by position; ``turn`` gives sizes of the turned image."""
    content = tiny()
    write_images(folder / "images", content)
    for position, tag in tags.items():
        entry = content["images"][position]
        save(
            folder / "images" / entry["file_name"],
            tag,
            (entry["height"], entry["width"]),
            entry["id"],
        )
        if turn and tag > 4:
            entry["height"], entry["width"] = entry["width"], entry["height"]
    content["annotations"] = [
        item
        for item in content["annotations"]
        if not isinstance(item["segmentation"], dict) or "iscrowd" not in item
    ]
    return write_json(folder / "x.json", content)


@pytest.mark.parametrize("turn", [False, True])
def test_sizes_that_tell(turn: bool, tmp_path: Path) -> None:
    source = open_file(written(tmp_path, {0: 6, 2: 5}, turn)).settled()
    word = "2 are turned by it and 0 are" if turn else "0 are turned by it and 2 are"
    assert source.notes == (
        f"2 of 4 images have an EXIF orientation tag: {word} read as stored, as their annotated "
        "sizes show",
    )
    stored = pixels(60, 80, 40)[:, :, ::-1]
    assert np.array_equal(source.read(0), turned(stored, 6) if turn else stored)
    described = source.describe()
    assert (described.oriented_images, described.exif) == (2, None)


def test_sizes_that_do_not_tell_are_asked_for_together(tmp_path: Path) -> None:
    path = written(tmp_path, {0: 3, 1: 6, 2: 2, 3: 8}, True)
    source = open_file(path)
    with pytest.raises(
        DataError,
        match=r"3 images of x images \(such as images/0+4.png\) .*--exif apply .*--exif ignore",
    ):
        source.settled()
    with pytest.raises(DataError, match="--exif apply"):
        source.read(0)
    assert source.read(1).shape == (48, 64, 3)
    with pytest.raises(DataError, match="1 image of"):
        source.head(2).settled()
    assert open_file(path, exif="apply").settled().oriented == 4


def test_a_decision_makes_other_data(tmp_path: Path) -> None:
    path = written(tmp_path, {0: 3, 2: 2}, False)
    found = {exif: open_file(path, exif=exif).settled() for exif in ("apply", "ignore")}
    assert (
        found["apply"]
        .notes[0]
        .endswith("2 are turned by it and 0 are read as stored, by --exif apply")
    )
    assert (
        found["ignore"]
        .notes[0]
        .endswith("0 are turned by it and 2 are read as stored, by --exif ignore")
    )
    assert np.array_equal(found["apply"].read(0), found["ignore"].read(0)[::-1, ::-1])
    assert found["apply"].fingerprint != found["ignore"].fingerprint
    plain = written(tmp_path / "plain", {}, False)
    assert (
        open_file(plain, exif="apply").settled().fingerprint
        == open_file(plain).settled().fingerprint
    )
    assert (open_file(plain).settled().oriented, open_file(plain).settled().notes) == (0, ())


def test_sizes_that_fit_neither_way(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", 6)
    read = ImageFiles([path], [(33, 44)], Path("x.json")).read
    with pytest.raises(
        DataError,
        match=r"40 x 60 pixels \(turned by its EXIF orientation tag 6; 60 x 40 as stored\), but",
    ):
        read(0)
    read = ImageFiles([path], [(60, 40)], Path("x.json"), "ignore").read
    with pytest.raises(
        DataError, match=r"60 x 40 pixels \(as stored; its EXIF orientation tag 6 is ignored\), but"
    ):
        read(0)


@pytest.mark.parametrize(
    ("wrong", "right", "size"), [("apply", "ignore", (40, 60)), ("ignore", "apply", (60, 40))]
)
def test_the_other_decision_is_named_where_it_fits(
    wrong: Exif, right: Exif, size: tuple[int, int], tmp_path: Path
) -> None:
    path = save(tmp_path / "x.jpg", 6)
    with pytest.raises(DataError, match=f"do not belong together.*try --exif {right}"):
        ImageFiles([path], [size], Path("x.json"), wrong).read(0)
    assert ImageFiles([path], [size], Path("x.json"), right).read(0).shape == (*size, 3)
    with pytest.raises(DataError, match=r"would not fit\.$"):
        ImageFiles([path], [(33, 44)], Path("x.json"), wrong).read(0)


def test_damaged_images_are_left_to_the_reader(tmp_path: Path) -> None:
    path = written(tmp_path, {1: 6}, True)
    (tmp_path / "images" / "000000000004.png").write_bytes(b"no image")
    source = open_file(path).settled()
    assert source.oriented == 1
    with pytest.raises(DamagedImage, match="none of the formats"):
        source.read(0)


def test_a_decision_makes_another_cell(tmp_path: Path) -> None:
    request = cell(tmp_path)
    folders = {
        exif: planned_folder(replace(request, data=DataRequest(exif=exif)))
        for exif in (None, "apply", "ignore")
    }
    assert len(set(folders.values())) == 3


def test_calibration_images(tmp_path: Path) -> None:
    recipe = make_recipe("rtn", defaults("detection"), {"calibration_images": 4})
    model = loaded(transform=_plain)

    def drawn(path: Path, **changes: Any) -> Any:
        return calibration_set(
            model, DataRequest(path=path, calibration_data=path, **changes), recipe
        )

    tagged = written(tmp_path, {0: 3, 1: 6, 2: 2}, False)
    with pytest.raises(DataError, match=r"2 images of x images .*--exif apply .*--exif ignore"):
        drawn(tagged)
    ignored = drawn(tagged, exif="ignore")
    assert ignored.notes == [
        "3 of 4 calibration images have an EXIF orientation tag: 0 are turned by it and 3 are "
        "read as stored, by --exif ignore"
    ]
    applied = drawn(written(tmp_path / "turned", {0: 3, 1: 6, 2: 2}, True), exif="apply")
    assert applied.ids == ignored.ids
    for name, one, other in zip(applied.ids, applied.images, ignored.images, strict=True):
        tag = {"4": 3, "2": 6, "3": 2}.get(name[-5], 1)
        assert np.array_equal(
            one[0].permute(1, 2, 0), turned(other[0].permute(1, 2, 0).numpy(), tag)
        )
    assert drawn(written(tmp_path / "plain", {}, False)).notes == []


def _plain(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None], {}
