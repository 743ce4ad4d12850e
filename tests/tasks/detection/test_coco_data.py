"""Data in COCO's format: read as pycocotools does; faults are named with file and id."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_fakes import (
    CATEGORIES,
    box_polygon,
    in_memory,
    loaded,
    pixels,
    tiny,
    write_images,
    write_json,
    write_root,
)
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO

from fimaq_core.errors import DataError
from tasks.common.data.images import DamagedImage
from tasks.common.request import DataRequest
from tasks.detection import coco
from tasks.detection.annotations import _decoded_total, area_of, checked, read_annotations
from tasks.detection.coco import DetectionSource, open_coco, open_file, open_source

COUNTS = {"train": 4, "val": 4}


def test_what_is_kept() -> None:
    content = tiny()
    before = copy.deepcopy(content)
    found = checked(content, "here")
    assert content == before
    assert [entry["id"] for entry in found["images"]] == [40, 20, 30, 10]
    assert found["images"][0] == {
        "id": 40,
        "file_name": "000000000004.png",
        "height": 60,
        "width": 80,
    }
    assert found["categories"] == CATEGORIES
    assert [entry["id"] for entry in found["annotations"]] == [5, 9, 0, 3, 4]
    assert set(found["annotations"][0]) == {
        "id",
        "image_id",
        "category_id",
        "bbox",
        "area",
        "iscrowd",
        "segmentation",
    }
    assert [entry["iscrowd"] for entry in found["annotations"]] == [0, 0, 1, 0, 0]
    assert found["annotations"][3]["bbox"] == [5.0, 5.0, 0.0, 0.0]
    assert checked(content, "here", annotated=False)["annotations"] == []


def test_iscrowd_may_be_left_out() -> None:
    content = tiny()
    del content["annotations"][0]["iscrowd"]
    assert checked(content, "here")["annotations"][0]["iscrowd"] == 0


Change = Callable[[dict[str, Any]], object]


def first(**changes: Any) -> Change:
    return lambda content: content["annotations"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.pop("annotations"),
            "x.json has no list 'annotations' of objects: it is not a file in COCO's format",
        ),
        (lambda c: c.update(images=[]), "lists no images"),
        (lambda c: c.update(categories=[]), "lists no categories"),
        (lambda c: c["images"][1].update(id=40), "images with the same id: 40"),
        (
            lambda c: c["images"][1].update(file_name="./000000000004.png"),
            "same file_name: '000000000004.png'",
        ),
        (
            lambda c: c["images"][2].update(file_name="../a.png"),
            r"image 2 \(counted from 0\): '../a.png' is not the path",
        ),
        (
            lambda c: c["images"][2].update(file_name="..\\a.png"),
            "image 2 .* is not the path of an image",
        ),
        (
            lambda c: c["images"][2].update(file_name="/data/../a.png"),
            "image 2 .* is not the path of an image",
        ),
        (lambda c: c["images"][2].update(file_name=3), "image 2 .*: 3 is not the path of an image"),
        (lambda c: c["images"][2].update(width=0), "image 2 .*: its size is 0 x 33"),
        (lambda c: c["images"][2].pop("height"), "image 2 .*: height is None"),
        (lambda c: c["images"][2].update(id="a"), "image 2 .*: id is 'a'"),
        (
            lambda c: c.update(categories=[*CATEGORIES, {"id": 2, "name": "x"}]),
            "categories with the same id: 2",
        ),
        (
            lambda c: c.update(categories=[*CATEGORIES, {"id": 1, "name": "owl"}]),
            "categories with the same name: 'owl'",
        ),
        (lambda c: c.update(categories=[{"id": 1}]), "category 0 .*: its name is None"),
        (lambda c: c["annotations"][1].update(id=5), "annotations with the same id: 5"),
        (first(image_id=11), "annotation 5: there is no image with the id 11"),
        (first(category_id=3), "annotation 5 of the image 40: there is no category with the id 3"),
        (first(bbox=[1, 2, 3]), r"annotation 5 of the image 40: bbox is \[1, 2, 3\]"),
        (first(bbox=[1, 2, -3, 4]), "annotation 5 of the image 40: bbox is"),
        (first(bbox=[1, 2, float("nan"), 4]), "x.json is not valid JSON: NaN is not a JSON number"),
        (first(area="7"), "annotation 5 of the image 40: area is '7'"),
        (first(iscrowd=2), "annotation 5 of the image 40: iscrowd is 2"),
        (first(segmentation=[[1, 2, 3, 4]]), "holds a polygon that is not at least three pairs"),
        (
            first(segmentation=[[1, 2, 3, 4, 5, 6], [1, 2, 3]]),
            "holds a polygon that is not at least three pairs",
        ),
        (first(segmentation=[1, 2, 3, 4, 5, 6]), "is no list of polygons"),
        (first(segmentation=[[1, 2, 3, 4, 5, "6"]]), "is no list of polygons"),
        (
            first(segmentation={"size": [80, 60], "counts": [4800]}),
            r"is not of the image's size \(height, width\) \[60, 80\]",
        ),
        (first(segmentation={"size": [60, 80], "counts": [4799]}), "4799 of 4800 pixels"),
        (
            first(segmentation={"size": [60, 80], "counts": [4900, -100]}),
            "run lengths that are damaged",
        ),
        (first(segmentation={"size": [60, 80], "counts": "PPYo"}), "run lengths that are damaged"),
        (first(segmentation={"size": [60, 80]}), "run lengths that are damaged"),
        (
            first(segmentation={"size": [60, 80], "counts": "o" * 99}),
            "run lengths that are damaged",
        ),
        (
            first(segmentation={"size": [60.0, 80], "counts": [4800]}),
            "run lengths that are damaged",
        ),
        (
            first(segmentation={"size": [60, 80], "counts": [0] * 1000001}),
            "more than 1,000,000 run",
        ),
        (
            first(segmentation={"size": [60, 80], "counts": "0" * 1000001}),
            "more than 1,000,000 run",
        ),
        (
            first(segmentation=[[0, 0, 1e8, 0, 1e8, 1e8]]),
            "holds a point which is more than 10 times",
        ),
        (first(segmentation=[[0, 0, 9, 0, 9, -801]]), "holds a point which is more than 10 times"),
        (first(segmentation=[[0, 0, 9, 0, 9, 9]] * 10001), "more than 10,000 polygons"),
        (first(segmentation=[[0, 0] * 100001]), "more than 10,000 polygons or 200,000 numbers"),
        (first(segmentation=[[0, 0, 800, 800] * 2501]), "outlines of more than 2,000,000 pixels"),
        (first(bbox=[0, 0, 801, 4]), "bbox is .* more than 10 times the side of the image away"),
        (first(bbox=[1e300, 0, 3, 4]), "bbox is .*; x, y, width and height are expected"),
        (first(area=1e11), "area is 100000000000.0; the object's area"),
        (first(id=2**63), "an integer has more than 64 bits"),
        (first(id=1e30), "annotation 1e\\+30: id is 1e\\+30; a whole number is expected"),
        (first(category_id=10**400), "an integer has more than 64 bits"),
        (
            lambda c: c["images"][2].update(width=2**33, height=1),
            "its size is 8589934592 x 1, not 1 to",
        ),
        (
            lambda c: c["images"][2].update(file_name="a\nb"),
            "image 2 .* is not the path of an image",
        ),
        (
            lambda c: c["images"][2].update(file_name="a\0"),
            "image 2 .* is not the path of an image",
        ),
        (first(bbox=["x" * 10**6]), "bbox is .{,120}; x, y"),
        (first(segmentation=0), "is not of the image's size"),
    ],
)
def test_refused(change: Change, message: str, tmp_path: Path) -> None:
    content = tiny()
    change(content)
    path = write_json(tmp_path / "x.json", content)
    with pytest.raises(DataError, match=message):
        read_annotations(path)


@pytest.mark.parametrize("given", [0, 0.0, -1, None])
def test_an_area_of_nothing_is_missing(given: Any) -> None:
    content = tiny()
    first(area=given, bbox=[0, 0, 20, 30], segmentation=[])(content)
    content["annotations"][3]["area"] = 0
    images, annotations, _ = checked(content, "here").values()
    assert "area" not in annotations[0]
    assert area_of(annotations[0], images[0]) == 600
    assert annotations[3]["area"] == 0


@pytest.mark.parametrize(
    "given", [None, [], [[]], [[], []], {}, "", {"size": [60, 80], "counts": []}, {"counts": ""}]
)
def test_empty_masks_are_missing(given: Any) -> None:
    content = tiny()
    first(segmentation=given)(content)
    assert "segmentation" not in checked(content, "here")["annotations"][0]


def test_empty_polygons_beside_others() -> None:
    content = tiny()
    first(segmentation=[[], *box_polygon(3, 4, 20, 30)])(content)
    assert checked(content, "here")["annotations"][0]["segmentation"] == box_polygon(3, 4, 20, 30)


def test_broken_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(tiny())[:-20])
    with pytest.raises(DataError, match=r"x.json is not valid JSON"):
        read_annotations(path)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"x.json has no list 'images'"):
        read_annotations(path)


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    content = tiny()
    path = write_json(tmp_path / "x.json", content)
    once = read_annotations(path)
    assert read_annotations(path) is once
    content["annotations"].pop()
    write_json(path, content)
    assert len(read_annotations(path)["annotations"]) == 4
    assert read_annotations(path, annotated=False)["annotations"] == []


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths_sum_to_the_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, 2)
    mask = rng.random((height, width)) < rng.choice([0.001, 0.01, 0.5, 0.99])
    text = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert _decoded_total(text) == height * width
    assert _decoded_total(text + "1") == height * width + 1 + (_last_but_one(mask))
    assert _decoded_total(text + "~") is None


def _last_but_one(mask: np.ndarray) -> int:
    # One more run is coded by its difference to the last but one.
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    runs = np.diff(np.concatenate([[0], edges, [len(flat)]]))
    runs = np.concatenate([[0], runs]) if flat[0] else runs
    return int(runs[-2]) if len(runs) > 2 else 0


def test_pycocotools_takes_what_is_accepted() -> None:
    content = tiny()
    content["annotations"][0]["segmentation"] = [*box_polygon(3, 4, 20, 30), [1, 1, 5, 5], [2, 2]]
    found = COCO()
    found.dataset = {
        name: [dict(entry) for entry in entries]
        for name, entries in checked(content, "here").items()
    }
    found.createIndex()
    areas = [int(found.annToMask(entry).sum()) for entry in found.dataset["annotations"]]
    assert areas[0] >= 600
    assert areas[2] == 300
    assert areas[3] == 0
    assert areas[4] == 50 * 20 or areas[4] == 50 * 21


def test_coco_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "COUNTS", COUNTS)
    monkeypatch.setattr(coco, "CATEGORIES", 3)
    root = write_root(tmp_path / "coco", tiny())
    source = open_coco(root, "val")
    assert source.name == "COCO 2017"
    assert source.split == "val2017"
    assert source.image_ids[0] == "val2017/000000000004.png"
    assert [entry["name"] for entry in source.coco["categories"]] == ["cat", "dog", "owl"]
    assert len(source.coco["annotations"]) == 5
    for index, entry in enumerate(source.images):
        assert np.array_equal(
            source.read(index), pixels(entry["height"], entry["width"], entry["id"])[:, :, ::-1]
        )
    train = open_coco(root, "train")
    assert (train.split, train.coco["annotations"]) == ("train2017", [])
    assert train.image_ids[1] == "train2017/000000000002.png"


def test_only_published_counts_get_the_published_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_root(tmp_path / "coco", tiny())
    with pytest.raises(
        DataError,
        match=r"has 4 images of 3 categories instead of the 5,000 of 80 of COCO 2017.*as a file",
    ):
        open_coco(root, "val")
    with pytest.raises(DataError, match="instead of the 118,287"):
        open_coco(root, "train")
    monkeypatch.setattr(coco, "COUNTS", COUNTS)
    monkeypatch.setattr(coco, "CATEGORIES", 3)
    assert open_coco(root, "val").name == "COCO 2017"


def test_missing_files_of_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "COUNTS", COUNTS)
    monkeypatch.setattr(coco, "CATEGORIES", 3)
    with pytest.raises(
        DataError, match=r"There is no folder .*nowhere\. The folder of COCO 2017 is expected"
    ):
        open_coco(tmp_path / "nowhere", "val")
    (tmp_path / "coco").mkdir()
    with pytest.raises(
        DataError, match=r"no file .*instances_val2017.json and no folder .*val2017\."
    ):
        open_coco(tmp_path / "coco", "val")
    root = write_root(tmp_path / "coco", tiny())
    (root / "val2017" / "000000000003.png").unlink()
    with pytest.raises(
        DataError, match=r"names 1 image missing from .*val2017, such as '000000000003.png'"
    ):
        open_coco(root, "val")


def test_a_file_never_has_the_name_of_the_published_data(tmp_path: Path) -> None:
    path = write_json(tmp_path / "val2017/COCO 2017.json", tiny())
    write_images(tmp_path / "val2017", tiny())
    source = open_file(path)
    assert (source.name, source.split) == ("COCO 2017.json", "val2017")


@pytest.mark.parametrize(
    "folder",
    [
        "data/annotations/instances_val_b",
        "data/val_b",
        "data/val",
        "data/annotations/images",
        "data/annotations",
    ],
)
def test_images_beside_a_file(folder: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "data/annotations/instances_val_b.json", tiny())
    with pytest.raises(DataError) as caught:
        open_file(path)
    places = str(caught.value).partition(" was searched for in ")[2]
    assert [
        Path(place.strip(". ")).relative_to(tmp_path).as_posix() for place in places.split(",")
    ] == [
        "data/annotations/instances_val_b",
        "data/val_b",
        "data/val",
        "data/annotations/images",
        "data/annotations",
        "data",
    ]
    write_images(tmp_path / folder, tiny())
    source = open_file(path)
    name = Path(folder).name
    assert (source.name, source.split, source.image_ids[0]) == (
        "instances_val_b",
        name,
        f"{name}/000000000004.png",
    )
    assert source.root == (tmp_path / folder).parent
    assert source.read(1).shape == (64, 48, 3)


def test_reading_as_mmdet_does(tmp_path: Path) -> None:
    from mmcv.transforms import LoadImageFromFile

    rng = np.random.default_rng(0)
    files = {
        "a.jpg": Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)),
        "b.jpg": Image.fromarray(rng.integers(0, 256, (40, 60), dtype=np.uint8)),
        "c.png": Image.fromarray(rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)),
        "d.png": Image.fromarray(rng.integers(0, 65536, (40, 60), dtype=np.uint16)),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
    read = coco.ImageFiles([tmp_path / name for name in files], [(40, 60)] * 4, Path("x.json")).read
    for index, name in enumerate(files):
        expected = LoadImageFromFile().transform({"img_path": str(tmp_path / name)})["img"]
        found = read(index)
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("largest", [15, 255, 1023, 4095, 65535])
@pytest.mark.parametrize(("kind", "channels"), [("P5", 1), ("P6", 3)])
def test_portable_maps_are_scaled(kind: str, channels: int, largest: int, tmp_path: Path) -> None:
    values = pixels(40, 60, 0)[..., :channels] / 255
    stored = (values * largest).round().astype(">u2" if largest > 255 else np.uint8)
    path = tmp_path / "x.ppm"
    path.write_bytes(f"{kind}\n60 40\n{largest}\n".encode() + stored.tobytes())
    found = coco.ImageFiles([path], [(40, 60)], Path("x.json")).read(0)
    wanted = np.broadcast_to(stored * (255 / largest), (40, 60, 3))[..., ::-1]
    assert np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LAB", "CMYK", "L"])
def test_tiff_is_read_as_pillow_does(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(pixels(40, 60, 0)).convert(mode)
    if mode == "RGBA":
        image.putalpha(100)
    image.save(tmp_path / "x.tif")
    found = coco.ImageFiles([tmp_path / "x.tif"], [(40, 60)], Path("x.json")).read(0)
    assert np.array_equal(found[..., ::-1], np.asarray(image.convert("RGB")))
    if mode == "RGBA":
        assert np.array_equal(found[..., ::-1], pixels(40, 60, 0))


def test_images_of_another_size_and_damaged_ones(tmp_path: Path) -> None:
    content = tiny()
    write_images(tmp_path / "images", content)
    path = write_json(tmp_path / "x.json", content)
    target = tmp_path / "images" / "000000000002.png"
    Image.fromarray(pixels(48, 64, 0)).save(target)
    with pytest.raises(DataError, match=r"2.png is 64 x 48 pixels, but .*x.json says 48 x 64"):
        open_file(path).read(1)
    target.write_bytes(b"no image")
    with pytest.raises(DamagedImage, match="none of the formats"):
        open_file(path).read(1)


def test_truncated_jpeg_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels(200, 300, 0)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedImage, match="truncated"):
        coco.ImageFiles([path], [(200, 300)], Path("x.json")).read(0)


def test_head_and_description() -> None:
    source = in_memory(tiny())
    assert source.head(4) is source
    assert source.head(None) is source
    head = source.head(2)
    assert (head.split, head.image_ids) == ("val[:2]", source.image_ids[:2])
    assert {entry["id"] for entry in head.coco["annotations"]} == {5, 9, 0}
    assert np.array_equal(head.read(1), source.read(1))
    described = head.describe()
    assert (described.name, described.split, described.count, described.classes) == (
        "memory",
        "val[:2]",
        2,
        3,
    )
    assert described.fingerprint == head.fingerprint != source.fingerprint


def test_fingerprints() -> None:
    whole = in_memory(tiny()).fingerprint
    renumbered = tiny()
    for entry in renumbered["images"]:
        entry["id"] += 100
    for entry in renumbered["annotations"]:
        entry["image_id"] += 100
    assert in_memory(renumbered).fingerprint == whole
    changes: list[Change] = [
        first(bbox=[3.0, 4.0, 20.0, 30.5]),
        first(area=5),
        first(category_id=2),
        first(image_id=20),
        first(segmentation=box_polygon(3, 4, 20, 31)),
        first(iscrowd=1),
        lambda c: c["images"][3].update(width=51),
        lambda c: c["images"][3].update(file_name="x.png"),
        lambda c: c["categories"][0].update(name="cow"),
        lambda c: c["annotations"].pop(),
    ]
    found = {whole}
    for change in changes:
        content = copy.deepcopy(tiny())
        change(content)
        found.add(in_memory(content).fingerprint)
    assert len(found) == len(changes) + 1


def request(path: Path | None = None, **changes: Any) -> DataRequest:
    return DataRequest(path=path, **changes)


def test_parts_of_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "COUNTS", COUNTS)
    monkeypatch.setattr(coco, "CATEGORIES", 3)
    root = write_root(tmp_path / "coco", tiny())
    other = write_json(tmp_path / "more" / "other.json", tiny())
    write_images(tmp_path / "more" / "images", tiny())

    def opened(part: str, **changes: Any) -> DetectionSource:
        return open_source(loaded(), request(**changes), part)

    assert opened("val", path=root).split == "val2017"
    assert opened("train", path=root).split == "train2017"
    assert opened("train", path=root, calibration_data=other).name == "other"
    assert opened("val", path=root, calibration_data=other).split == "val2017"
    assert opened("train", path=other, calibration_data=root).split == "train2017"
    assert opened("train", path=other, calibration_data=other).coco["annotations"] == []
    assert len(opened("val", path=other).coco["annotations"]) == 5
    with pytest.raises(
        DataError, match=r"other.json lists no images to calibrate on: give --calibration-data"
    ):
        opened("train", path=other)
    with pytest.raises(DataError, match=r"tiny.tag needs data: give --data"):
        opened("val")
    with pytest.raises(DataError, match=r"There is no file .*none.json"):
        opened("val", path=tmp_path / "none.json")
