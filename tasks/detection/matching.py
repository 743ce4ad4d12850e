"""Detections matched with annotated objects, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.detection.annotations import Entry, area_of
from tasks.detection.coco import DetectionSource
from tasks.detection.precision import Matches

#: pycocotools' names of what is compared, by the ending of metrics.
KINDS = {"box": "bbox", "mask": "segm"}
#: Detections of an image and category at most; mmdet's own limit is as many of an image.
MAX_DETECTIONS = 100


@dataclass(frozen=True)
class Detections:
    """Objects found, in COCO's format of results, in the images with the indices ``kept``.

    ``notes``: see :meth:`tasks.common.images.Images.notes`.
    """

    results: list[Entry]
    kept: list[int]
    notes: Sequence[str] = ()


def match(source: DetectionSource, detections: Detections, kind: str) -> dict[str, list[Matches]]:
    """Match detections with objects by pycocotools; ``kind`` is ``bbox`` or ``segm``.

    Images are numbered as in ``detections.kept``. Returns by range of sizes (pycocotools' names)
    one entry per category.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = _objects(source, detections), _found(source, detections, kind)
        evaluation = COCOeval(truth, found, kind)
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
    params, images = evaluation.params, [source.images[index]["id"] for index in detections.kept]
    # pycocotools has them by rising id, which decides between equal scores.
    place = {image: position for position, image in enumerate(images)}
    entries = iter(evaluation.evalImgs)
    by_id = {
        (category, size): [(place[image], next(entries)) for image in params.imgIds]
        for category in params.catIds
        for size in params.areaRngLbl
    }
    levels = len(params.iouThrs)
    return {size: [_gathered(by_id[category, size], levels) for category in params.catIds] for size in params.areaRngLbl}


def _gathered(found: list[tuple[int, Entry | None]], levels: int) -> Matches:
    """Matches of one category and range of sizes, from pycocotools' entries by image."""
    truths = np.zeros(len(found), dtype=np.int64)
    images, scores = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    matched, ignored = [np.zeros((levels, 0), dtype=bool)], [np.zeros((levels, 0), dtype=bool)]
    for image, entry in found:
        if entry is not None:
            truths[image] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
            images.append(np.full(len(entry["dtScores"]), image))
            scores.append(np.asarray(entry["dtScores"], dtype=np.float64))
            matched.append(entry["dtMatches"] != 0)
            ignored.append(np.asarray(entry["dtIgnore"], dtype=bool))
    return Matches.of(np.concatenate(images), np.concatenate(scores), np.hstack(matched), np.hstack(ignored), truths)


def _objects(source: DetectionSource, detections: Detections) -> Any:
    """Annotations of these images as pycocotools takes, and changes, them."""
    kept = {source.images[index]["id"]: source.images[index] for index in detections.kept}
    annotations = [entry for entry in source.coco["annotations"] if entry["image_id"] in kept]
    # It takes an object with the id 0 for none.
    numbered = [
        {**entry, "id": number, "area": area_of(entry, kept[entry["image_id"]])} for number, entry in enumerate(annotations, 1)
    ]
    return _index(source, detections, numbered)


def _found(source: DetectionSource, detections: Detections, kind: str) -> Any:
    """Detections as pycocotools' ``loadRes`` makes them; masks have their own area, as in mmdet."""
    from pycocotools import mask as run_lengths

    annotations = []
    for number, entry in enumerate(detections.results, 1):
        _, _, width, height = entry["bbox"]
        area = width * height if kind == "bbox" else run_lengths.area(entry["segmentation"])
        annotations.append({**entry, "id": number, "iscrowd": 0, "area": area})
    return _index(source, detections, annotations)


def _index(source: DetectionSource, detections: Detections, annotations: list[Entry]) -> Any:
    from pycocotools.coco import COCO

    found, images = COCO(), [source.images[index] for index in detections.kept]
    found.dataset = {"images": images, "annotations": annotations, "categories": source.coco["categories"]}
    found.createIndex()
    return found
