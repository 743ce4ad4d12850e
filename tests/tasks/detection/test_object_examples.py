"""Examples of detection against the detector's predictions, outlines against masks, originals."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from coco_fakes import (
    CATEGORIES,
    Instances,
    annotation,
    ellipse,
    encoded,
    evaluate_detector,
    guesses,
    in_memory,
    random_coco,
    tiny,
    write_json,
    write_root,
)
from detection_runs import MODEL, cell, done, restored
from PIL import Image
from scipy.ndimage import binary_fill_holes

from fimaq_core.errors import DataError
from fimaq_core.progress import silent
from tasks.common import registry
from tasks.common.cell.prediction_samples import FOUND, TRUTHS, ObjectSample, read_examples
from tasks.common.request import DataRequest, ModelRequest
from tasks.detection.annotations import Detections
from tasks.detection.coco import open_demo, open_file
from tasks.detection.evaluate import coco_results
from tasks.detection.example_objects import detection_examples, outlines
from tasks.detection.originals import originals
from tasks.detection.task import TASK

SWIN = ModelRequest("mask_rcnn_swin_tiny")


def filled(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """(H, W) bool: pixels whose centres are inside one of the polygons."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        x, y = np.array(polygon[::2]), np.array(polygon[1::2])
        inside = np.zeros_like(mask)
        for x0, y0, x1, y1 in zip(x, y, np.roll(x, -1), np.roll(y, -1), strict=True):
            if y0 != y1:
                crosses = (y0 > rows) != (y1 > rows)
                inside ^= crosses & (columns < x0 + (rows - y0) / (y1 - y0) * (x1 - x0))
        mask |= inside
    return mask


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_outlines_of_masks() -> None:
    mask = np.zeros((40, 60), dtype=bool)
    mask[3:10, 5:25] = True
    (polygon,) = outlines(encoded(mask), 60, 40)
    assert sorted(zip(polygon[::2], polygon[1::2], strict=True)) == [
        (5, 3),
        (5, 10),
        (25, 3),
        (25, 10),
    ]
    mask[20:35, 30:58] = ellipse(15, 28, [0, 0, 28, 15])
    mask[5:8, 30:31] = True  # 3 pixels: too few
    mask[38:40, 0:2] = True  # 4 pixels
    found = outlines(encoded(mask), 60, 40)
    assert len(found) == 3
    assert max(found[-1]) <= 40
    mask[5:8, 30] = False
    assert overlap(filled(found, 40, 60), mask) > 0.95
    uncompressed = {"size": [40, 60], "counts": _runs(mask)}
    assert outlines(uncompressed, 60, 40) == found
    assert outlines(encoded(np.zeros((40, 60), dtype=bool)), 60, 40) == []
    ring = np.zeros((40, 60), dtype=bool)
    ring[2:30, 2:30] = True
    ring[8:20, 8:20] = False
    assert len(outlines(encoded(ring), 60, 40)) == 1


def _runs(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.T.ravel().astype(int)])
    changes = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def test_outlines_have_few_corners() -> None:
    rng = np.random.default_rng(0)
    noise = cv2.resize(rng.random((30, 40)), (640, 480), interpolation=cv2.INTER_CUBIC) > 0.7
    found = outlines(encoded(noise), 640, 480)
    assert 1 < len(found) <= 20
    assert all(6 <= len(polygon) <= 120 and len(polygon) % 2 == 0 for polygon in found)
    angles = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    radius = 100 + 20 * np.sin(40 * angles)
    star = (
        np.stack([150 + radius * np.cos(angles), 150 + radius * np.sin(angles)], 1).ravel().tolist()
    )
    (polygon,) = outlines([star], 300, 300)
    assert 6 <= len(polygon) <= 120
    assert overlap(filled([polygon], 300, 300), filled([star], 300, 300)) > 0.7


def test_outlines_of_polygons() -> None:
    box, dot = [5, 5, 25.5, 5, 25.5, 20, 5, 20], [1, 1, 2, 1, 2, 2]
    assert outlines([dot, box], 40, 30) == [box]
    assert outlines([[-5, -5, 1e300, -5, 1e300, 20, -5, 20]], 40, 30) == [
        [0, 0, 40, 0, 40, 20, 0, 20]
    ]


def test_truth_as_it_comes() -> None:
    """Without crowd regions; objects of no size have no outlines."""
    source = in_memory(tiny())
    examples = detection_examples(source, Detections([], [0, 1, 2, 3]))
    assert [entry["sample"] for entry in examples] == list(source.image_ids)
    assert [entry["size"] for entry in examples] == [[80, 60], [48, 64], [97, 33], [50, 50]]
    first, none, flat, beyond = (entry["truth"] for entry in examples)
    assert [item["name"] for item in first] == ["owl", "cat"]
    assert first[1] == {
        "name": "cat",
        "box": [3, 4, 20, 30],
        "polygons": [[3, 4, 23, 4, 23, 34, 3, 34]],
    }
    assert overlap(filled(first[0]["polygons"], 60, 80), ellipse(60, 80, [30, 10, 40, 40])) > 0.95
    assert none == []
    assert flat == [{"name": "dog", "box": [5, 5, 0, 0], "polygons": []}]
    assert beyond[0]["polygons"] == [[0, 20, 50, 20, 50, 40.5, 0, 40.5]]
    for entry in examples:
        ObjectSample.model_validate(entry)


def test_found_against_a_loop() -> None:
    source = in_memory(random_coco(30, 1))
    categories = [entry["id"] for entry in source.coco["categories"]]
    answers = {index: guesses(source.coco, index, 1, wrong=30.0) for index in range(30)}
    kept = [index for index in range(30) if index not in (0, 5, 6)]
    results = [
        row
        for index in kept
        for row in coco_results(answers[index], source.images[index], categories, "x")
    ]
    examples = detection_examples(source, Detections(results, kept))
    shown = [1, 3, 7, 8, 10, 13, 15, 18, 20, 23, 25, 28]
    assert [entry["sample"] for entry in examples] == [source.image_ids[index] for index in shown]
    for index, entry in zip(shown, examples, strict=True):
        found = answers[index]
        order = [
            n
            for n in sorted(range(len(found.scores)), key=lambda n: -float(found.scores[n]))
            if found.scores[n] >= 0.3
        ]
        assert [item["score"] for item in entry["found"]] == [
            float(found.scores[n]) for n in order[:20]
        ]
        assert [item["name"] for item in entry["found"]] == [
            f"kind {int(found.labels[n])}" for n in order[:20]
        ]
        for number, item in zip(order[:20], entry["found"], strict=True):
            x1, y1, x2, y2 = found.bboxes[number].tolist()
            assert item["box"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.011)
            mask = found.masks[number].numpy()
            if mask.sum() > 100:
                assert overlap(filled(item["polygons"], *mask.shape), mask) > 0.9
        own = [
            item
            for item in source.coco["annotations"]
            if item["image_id"] == source.images[index]["id"]
        ]
        assert len(entry["truth"]) == sum(not item["iscrowd"] for item in own)
        ObjectSample.model_validate(entry)
    counts = [len(entry["found"]) for entry in examples]
    assert max(counts) == FOUND > min(counts)


def test_crowded_images_are_kept_readable() -> None:
    content = tiny()
    content["annotations"] = [
        annotation(n, 10, 7, [1.0, 1.0, 1.0 + n % 40, 9.0]) for n in range(150)
    ]
    content["categories"] = [{**CATEGORIES[0], "name": "cat" * 1000}, *CATEGORIES[1:]]
    entry = detection_examples(in_memory(content), Detections([], [0, 1, 2, 3]))[3]
    assert len(entry["truth"]) == TRUTHS
    assert min(item["box"][2] for item in entry["truth"]) > 10
    ObjectSample.model_validate(entry)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("cells")
    return {method: done(cell(place, method)) for method in ("rtn", "repq")}


def test_every_cell_of_the_demo_shows_the_same_samples(cells: dict[str, Any]) -> None:
    files = {
        name: read_examples(found.folder, found.record.examples or "")
        for name, found in cells.items()
    }
    (whole,) = cells["rtn"].folder.parents[2].glob("fp/**/examples.json")
    files["fp"] = read_examples(whole.parent, whole.name)
    ids = list(open_demo("val").image_ids[:8])
    assert all([entry.sample for entry in file.samples] == ids for file in files.values())
    assert len({file.model_dump_json() for file in files.values()}) == 3
    assert all(file.samples[0].truth == files["fp"].samples[0].truth for file in files.values())


def test_found_is_what_the_detector_predicts(cells: dict[str, Any]) -> None:
    found, source = read_examples(cells["rtn"].folder, "examples.json"), open_demo("val")
    loaded, _, model = restored(cells["rtn"])
    seen = registry.originals(
        "detection", MODEL, DataRequest(), [entry.sample for entry in found.samples]
    )
    shares: list[float] = []
    for entry in found.samples:
        assert isinstance(entry, ObjectSample)
        picture = seen[entry.sample]
        assert (picture.mode, list(picture.size)) == ("RGB", entry.size)
        prepare: Any = loaded.eval_transform
        predicted = model.predict(
            *prepare(np.ascontiguousarray(np.asarray(picture)[:, :, ::-1]))
        ).pred_instances
        order = [
            n
            for n in predicted.scores.argsort(descending=True, stable=True).tolist()
            if predicted.scores[n] >= 0.3
        ]
        assert len(entry.found) == len(order)
        for number, item in zip(order, entry.found, strict=True):
            x1, y1, x2, y2 = predicted.bboxes[number].tolist()
            assert item.box == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.02)
            assert item.score == pytest.approx(float(predicted.scores[number]), abs=1e-6)
            assert item.name == source.coco["categories"][int(predicted.labels[number])]["name"]
            mask = predicted.masks[number].numpy()
            if mask.sum() > 30:
                grown = filled(item.polygons, *mask.shape)
                shares.append(overlap(grown, binary_fill_holes(mask)))
    assert len(shares) > 8
    assert np.mean(shares) > 0.95
    assert min(shares) > 0.75


def test_evaluations_are_the_same_with_examples() -> None:
    source = in_memory(random_coco(14, 3))

    def answer(index: int) -> Instances:
        return guesses(source.coco, index, 3)

    calls: list[int] = []

    def predict(image: torch.Tensor, meta: dict[str, Any]) -> Instances:
        calls.append(len(calls))
        return answer(calls[-1])

    def prepare(array: np.ndarray) -> tuple[torch.Tensor, dict[str, Any]]:
        return torch.zeros(1, 3, 4, 4), {}

    found = evaluate_detector(predict, source, prepare, torch.device("cpu"), silent, keep=True)
    assert len(calls) == 14
    assert len(found.examples) == 12
    again = evaluate_detector(
        lambda *_: answer(calls.pop(0)), source, prepare, torch.device("cpu"), silent, keep=True
    )
    assert found.files == again.files
    assert json.loads(json.dumps(found.examples)) == found.examples


def test_pictures_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_root(tmp_path / "data", tiny())
    path = root / "annotations" / "instances_val2017.json"
    source, data = open_file(path), DataRequest(path)
    ids = list(source.image_ids)
    assert ids[0] == "val2017/000000000004.png"
    found = registry.originals("detection", SWIN, data, ids[:2])
    assert list(found) == ids[:2]
    for name, image in found.items():
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(root / name)))
    monkeypatch.setattr("tasks.detection.coco.COUNTS", {"val": 4})
    monkeypatch.setattr("tasks.detection.coco.CATEGORIES", 3)
    assert np.array_equal(
        np.asarray(originals(SWIN, DataRequest(root), ids[3:])[ids[3]]),
        np.asarray(Image.open(root / ids[3])),
    )


def test_pictures_are_turned_as_files_say(tmp_path: Path) -> None:
    """Boxes refer to the turned image."""
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 20}],
        "categories": CATEGORIES,
        "annotations": [],
    }
    path = write_json(tmp_path / "x.json", content)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), (200, 10, 10)).save(tmp_path / "a.jpg", exif=exif)
    (image,) = originals(SWIN, DataRequest(path), [f"{tmp_path.name}/a.jpg"]).values()
    assert image.size == (20, 40)
    red, green, _ = image.getpixel((10, 10))  # type: ignore[misc]
    assert red > 150 > green


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "val2017/../../secret.png",
        "/{root}/secret.png",
        "val2017/9.png",
        "val2017",
        "",
    ],
)
def test_ids_do_not_lead_out_of_the_data(tmp_path: Path, name: str) -> None:
    root = write_root(tmp_path / "data", tiny())
    Image.new("RGB", (3, 3)).save(tmp_path / "secret.png")
    path = root / "annotations" / "instances_val2017.json"
    with pytest.raises(DataError, match="There is no sample"):
        originals(
            SWIN,
            DataRequest(path),
            ["val2017/000000000004.png", name.replace("/{root}", tmp_path.as_posix())],
        )


def test_missing_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="brings no data along"):
        TASK.originals(SWIN, DataRequest(), ["val2017/1.jpg"])
    with pytest.raises(DataError, match="There is no folder"):
        TASK.originals(SWIN, DataRequest(tmp_path / "nowhere"), ["val2017/1.jpg"])
    with pytest.raises(DataError, match="There is no file"):
        TASK.originals(SWIN, DataRequest(tmp_path / "nowhere.json"), ["val2017/1.jpg"])
    root = write_root(tmp_path / "data", tiny())
    (root / "val2017" / "000000000004.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="is damaged"):
        TASK.originals(
            SWIN,
            DataRequest(root / "annotations" / "instances_val2017.json"),
            ["val2017/000000000004.png"],
        )


def test_an_outline_of_very_many_points() -> None:
    """It is thinned out first: OpenCV would need time by the square of the number of points."""
    turns = np.linspace(0, 2 * np.pi, 40_000, endpoint=False)
    ring = np.stack([200 + 150 * np.cos(turns), 200 + 150 * np.sin(turns)], 1)
    (found,) = outlines([ring.ravel().tolist()], 400, 400)
    assert 20 < len(found) // 2 <= 60
    enclosed = cv2.contourArea(np.array(found, np.float32).reshape(-1, 2))
    assert abs(enclosed / (np.pi * 150**2) - 1) < 0.01
