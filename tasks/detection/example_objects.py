"""Detected and true objects of a few images, as outlines in pixels of the original image."""

import itertools
from typing import Any

import numpy as np

from tasks.common.cell.prediction_samples import FOUND, LEAST_SCORE, TRUTHS, Spread, shortened
from tasks.detection.annotations import Detections, Entry, area_of
from tasks.detection.coco import DetectionSource

_CORNERS = 60  # highest number per outline
_OUTLINES = 20  # highest number per object
_LEAST_AREA = 4  # of an outline, in pixels
_POINTS = 5000  # highest number that is simplified: OpenCV may need time by the square of it
#: Distance in pixels by which simplifying may move an outline, and the factor by which it grows
#: while there are too many corners. With half a pixel, thin strokes would lose a tenth of their
#: area.
_DISTANCE, _GROWTH = 0.3, 1.15


def detection_examples(source: DetectionSource, detections: Detections) -> list[dict[str, Any]]:
    """Collect objects of up to 12 images that ``Spread`` chooses.

    ``found`` are the 20 detections of highest score, at least 0.3; ``truth`` are the 100 largest
    annotated objects without crowd regions.
    """
    spread = Spread(len(source.image_ids))
    shown = [detections.kept[index] for index in spread.take(detections.kept)]
    found: dict[int, list[Entry]] = {source.images[position]["id"]: [] for position in shown}
    truth: dict[int, list[Entry]] = {number: [] for number in found}
    for entry in detections.results:
        if entry["image_id"] in found and entry["score"] >= LEAST_SCORE:
            found[entry["image_id"]].append(entry)
    for entry in source.coco["annotations"]:
        if entry["image_id"] in truth and not entry["iscrowd"]:
            truth[entry["image_id"]].append(entry)
    names = {entry["id"]: shortened(entry["name"]) for entry in source.coco["categories"]}
    examples = []
    for position in shown:
        image = source.images[position]
        size, objects = (image["width"], image["height"]), truth[image["id"]]
        best = sorted(found[image["id"]], key=lambda entry: -entry["score"])[:FOUND]
        areas = [-area_of(entry, image) for entry in objects]
        largest = [objects[place] for place in np.argsort(areas, kind="stable")[:TRUTHS]]
        examples.append(
            {
                "sample": source.image_ids[position],
                "size": list(size),
                "truth": [_object(one, names, size) for one in largest],
                "found": [{**_object(one, names, size), "score": one["score"]} for one in best],
            }
        )
    return examples


def _object(entry: Entry, names: dict[int, str], size: tuple[int, int]) -> dict[str, Any]:
    box = [round(float(value), 2) for value in entry["bbox"]]
    polygons = outlines(entry["segmentation"], *size) if "segmentation" in entry else []
    return {"name": names[entry["category_id"]], "box": box, "polygons": polygons}


def outlines(
    segmentation: list[list[float]] | dict[str, Any], width: int, height: int
) -> list[list[float]]:
    """Make outlines x0, y0, x1, y1, ... of a mask in COCO's format, largest first.

    There are at most 20; each has at most 60 corners and encloses at least 4 pixels.
    """
    import cv2  # only needed for the few images that are shown

    if isinstance(segmentation, list):
        # Clipping leaves the visible part; float32 could not hold very large numbers.
        corners = [np.asarray(polygon).reshape(-1, 2) for polygon in segmentation]
        rings = [ring.clip(0, (width, height)).astype(np.float32) for ring in corners]
    else:
        rings = _traced(segmentation, width, height)
    large = [ring for ring in rings if len(ring) > 2 and cv2.contourArea(ring) >= _LEAST_AREA]
    large.sort(key=lambda ring: -cv2.contourArea(ring))
    simple = (ring for ring in map(_simplified, large) if len(ring) > 2)
    kept = itertools.islice(simple, _OUTLINES)
    return [[round(float(value), 2) for value in ring.ravel()] for ring in kept]


def _traced(code: dict[str, Any], width: int, height: int) -> list[np.ndarray]:
    """Trace the outer borders (n, 2) of the regions of a mask, along the edges of pixels."""
    import cv2
    from pycocotools import mask as run_lengths

    if not isinstance(code["counts"], str | bytes):
        code = run_lengths.frPyObjects(code, height, width)
    mask = run_lengths.decode(code)
    x, y, w, h = (int(value) for value in run_lengths.toBbox(code))
    # OpenCV traces the centres of border pixels, which cuts half a pixel from each side. If each
    # pixel is doubled first, the traced centres 2i and 2j + 1 stand for the edges i and j + 1.
    doubled = mask[y : y + h, x : x + w].repeat(2, axis=0).repeat(2, axis=1)
    if not doubled.size:
        return []
    found, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((border.reshape(-1, 2) + 1) // 2 + (x, y)).astype(np.float32) for border in found]


def _simplified(ring: np.ndarray) -> np.ndarray:
    """Reduce an outline to at most 60 corners (n, 2)."""
    import cv2

    while len(ring) > _POINTS:
        ring = np.ascontiguousarray(ring[::2])
    distance = _DISTANCE
    while len(simple := cv2.approxPolyDP(ring, distance, True)) > _CORNERS:
        distance *= _GROWTH
    return np.asarray(simple).reshape(-1, 2)
