"""Small data sets in COCO's format, with all kinds of entries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as run_lengths
from torch import nn

from tasks.common.task import Evaluation, LoadedModel
from tasks.detection.annotations import Coco, checked
from tasks.detection.coco import DetectionSource
from tasks.detection.demo import coco_files
from tasks.detection.evaluate import detect, measure

#: Ids with gaps, not in order.
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 30, "name": "owl"}]
#: (height, width)
SIZES = ((60, 80), (64, 48), (33, 97), (50, 50))


def box_polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def ellipse(height: int, width: int, box: list[float]) -> np.ndarray:
    """(H, W) bool mask of the ellipse in a box."""
    x, y, w, h = box
    rows, columns = np.mgrid[:height, :width] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def encoded(mask: np.ndarray) -> dict[str, Any]:
    code = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def annotation(
    number: int, image: int, category: int, box: list[float], **changes: Any
) -> dict[str, Any]:
    found = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
    }
    return {**found, "segmentation": box_polygon(*box), **changes}


def tiny() -> dict[str, Any]:
    """Four images: two objects and a crowd; no object; one without size; one beyond the border."""
    images = [
        {
            "id": 10 * number,
            "file_name": f"{number:012d}.png",
            "height": h,
            "width": w,
            "licence": 1,
        }
        for number, (h, w) in zip((4, 2, 3, 1), SIZES, strict=True)
    ]
    crowd = {"size": [60, 80], "counts": [100, 300, 60 * 80 - 400]}
    annotations = [
        annotation(5, 40, 7, [3.0, 4.0, 20.0, 30.0], keypoints=[1]),
        annotation(
            9,
            40,
            30,
            [30.0, 10.0, 40.0, 40.0],
            segmentation=encoded(ellipse(60, 80, [30, 10, 40, 40])),
        ),
        annotation(0, 40, 7, [1.0, 40.0, 6.0, 60.0], iscrowd=1, segmentation=crowd),
        annotation(3, 30, 2, [5.0, 5.0, 0.0, 0.0]),
        annotation(4, 10, 2, [-5.0, 20.0, 100.0, 20.5]),
    ]
    return {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}


def pixels(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_images(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in content["images"]:
        Image.fromarray(pixels(entry["height"], entry["width"], entry["id"])).save(
            folder / entry["file_name"]
        )


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_root(root: Path, content: dict[str, Any]) -> Path:
    """Both parts in the layout of COCO 2017, with the same images."""
    for split in ("train2017", "val2017"):
        write_json(root / "annotations" / f"instances_{split}.json", content)
        write_images(root / split, content)
    return root


def in_memory(
    coco: Coco | dict[str, Any], read: Callable[[int], np.ndarray] | None = None
) -> DetectionSource:
    coco = checked(coco, "memory")

    def drawn(index: int) -> np.ndarray:
        entry = coco["images"][index]
        return pixels(entry["height"], entry["width"], entry["id"])

    ids = tuple(f"here/{entry['file_name']}" for entry in coco["images"])
    return DetectionSource("memory", "val", ids, coco, read or drawn)


def random_coco(
    images: int, seed: int, categories: int = 3, crowds: float = 0.1, size: int = 128
) -> dict[str, Any]:
    """Ellipses of all sizes, some of them crowd regions; zero to five per image."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(images) + 1
    entries = [
        {"id": int(n), "file_name": f"{n}.png", "height": size, "width": size + 16} for n in order
    ]
    annotations: list[dict[str, Any]] = []
    for entry in entries:
        for _ in range(int(rng.integers(0, 6))):
            w, h = np.exp(rng.uniform(np.log(8), np.log(size * 0.9), 2))
            box = [
                float(v) for v in (rng.uniform(0, size + 16 - w), rng.uniform(0, size - h), w, h)
            ]
            mask = ellipse(size, size + 16, box)
            crowd = bool(rng.random() < crowds)
            code = encoded(mask)
            if crowd:
                flat = np.concatenate([[0], mask.T.ravel().astype(int), [2]])
                changes = np.flatnonzero(np.diff(flat))
                runs = np.diff(np.concatenate([[0], changes]))
                code = {"size": [size, size + 16], "counts": runs.tolist()}
            number = len(annotations) + 1
            kind = int(rng.integers(categories)) + 1
            annotations.append(
                annotation(
                    number,
                    entry["id"],
                    kind,
                    box,
                    area=float(mask.sum()),
                    iscrowd=int(crowd),
                    segmentation=code,
                )
            )
    names = [{"id": number + 1, "name": f"kind {number}"} for number in range(categories)]
    return {"images": entries, "annotations": annotations, "categories": names}


class Instances:
    """Objects of an image with the fields of mmdet's ``InstanceData`` that an evaluation reads."""

    def __init__(
        self, bboxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor
    ) -> None:
        self.bboxes, self.scores, self.labels, self.masks = bboxes, scores, labels, masks


def guesses(
    coco: dict[str, Any], index: int, seed: int, spread: float = 0.08, wrong: float = 3.0
) -> Instances:
    """Detections near most objects of an image, and false ones; many scores are equal."""
    rng = np.random.default_rng([seed, index])
    entry = coco["images"][index]
    height, width = entry["height"], entry["width"]
    labels_of = {kind["id"]: label for label, kind in enumerate(coco["categories"])}
    boxes, scores, labels = [], [], []
    for item in coco["annotations"]:
        if item["image_id"] == entry["id"] and rng.random() < 0.85:
            box = np.array(item["bbox"]) * np.exp(rng.normal(0, spread, 4))
            boxes.append(box)
            scores.append(rng.beta(5, 2))
            labels.append(labels_of[item["category_id"]])
    for _ in range(rng.poisson(wrong)):
        w, h = np.exp(rng.uniform(np.log(8), np.log(min(width, height) * 0.9), 2))
        boxes.append(np.array([rng.uniform(0, width - w), rng.uniform(0, height - h), w, h]))
        scores.append(rng.beta(2, 4))
        labels.append(int(rng.integers(len(labels_of))))
    masks = [ellipse(height, width, box.tolist()) for box in boxes]
    corners = np.array(boxes).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    return Instances(
        torch.tensor(corners, dtype=torch.float32),
        torch.tensor(np.round(scores, 1), dtype=torch.float32).reshape(-1),
        torch.tensor(labels, dtype=torch.int64),
        torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, height, width)),
    )


def loaded(
    classes: int = 3,
    names: tuple[str, ...] | None = None,
    transform: Any = None,
    data: str | None = None,
) -> LoadedModel:
    model = nn.Identity()
    if names is not None:
        model.dataset_meta = {"classes": names}  # type: ignore[assignment]
    return LoadedModel(model, "tiny.tag", "nowhere", "0" * 64, classes, transform, transform, data)


def write_scenes(folder: Path, part: str, scenes: Any) -> Path:
    """Write scenes as files: ``annotations/instances_<part>.json`` and ``<part>/*.png``.

    Returns the file of the annotations.
    """
    path = folder / "annotations" / f"instances_{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = coco_files.annotations_of(scenes)
    path.write_text(json.dumps(content), encoding="utf-8")
    (folder / part).mkdir(exist_ok=True)
    for image, scene in zip(content["images"], scenes, strict=True):
        Image.fromarray(scene.pixels).save(folder / part / image["file_name"])
    return path


def evaluate_detector(
    predict: Any,
    source: DetectionSource,
    *given: Any,
    skip_corrupt: bool = False,
    workers: int = 0,
    keep: bool = False,
) -> Evaluation:
    """Detect, then measure."""
    return measure(source, detect(predict, source, *given, skip_corrupt, workers), keep)
