"""Objects found in a few images and the true ones, as outlines in pixels of the original image."""

from typing import Any

import numpy as np

from tasks.common.cell.prediction_samples import FOUND, LEAST_SCORE, TRUTHS, Spread, shortened
from tasks.detection.annotations import Detections, Entry, area_of
from tasks.detection.coco import DetectionSource

#: Corners of an outline at most, outlines of an object at most, and pixels that one must enclose.
_CORNERS, _OUTLINES, _LEAST_AREA = 60, 20, 4
#: Distance in pixels that simplifying may move an outline by at first, and by how much it grows until corners are few enough.
#: Thin strokes lose a tenth of their area at half a pixel.
_DISTANCE, _GROWTH = 0.3, 1.15


def detection_examples(source: DetectionSource, detections: Detections) -> list[dict[str, Any]]:
    """Objects of up to 12 images, see :class:`tasks.common.cell.prediction_samples.Spread`.

    ``found`` are the 20 detections of highest score, from 0.3 on; ``truth`` the annotated objects
    without crowd regions, of more than 100 the largest.
    """
    shown = [
        detections.kept[index] for index in Spread(len(source.image_ids)).take(detections.kept)
    ]
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
        size = image["width"], image["height"]
        best = sorted(found[image["id"]], key=lambda entry: -entry["score"])[:FOUND]
        areas = [-area_of(entry, image) for entry in truth[image["id"]]]
        largest = [truth[image["id"]][place] for place in np.argsort(areas, kind="stable")[:TRUTHS]]
        examples.append(
            {
                "sample": source.image_ids[position],
                "size": list(size),
                "truth": [_object(entry, names, size) for entry in largest],
                "found": [
                    {**_object(entry, names, size), "score": entry["score"]} for entry in best
                ],
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
    """Outlines x0, y0, x1, y1, ... of a mask in COCO's format, the largest first.

    Each has at most 60 corners and encloses at least 4 pixels; of more than 20 the largest are
    kept.
    """
    import cv2  # as pycocotools, needed for images that are looked at only

    if isinstance(segmentation, list):
        # Only what is in the image is seen; and numbers that are too large for single precision would not be numbers.
        corners = [
            np.asarray(polygon).reshape(-1, 2).clip(0, (width, height)) for polygon in segmentation
        ]
        rings = [ring.astype(np.float32) for ring in corners]
    else:
        rings = _traced(segmentation, width, height)
    simple = [(float(cv2.contourArea(ring)), _simplified(ring)) for ring in rings if len(ring) > 2]
    large = [(area, ring) for area, ring in simple if area >= _LEAST_AREA and len(ring) > 2]
    kept = sorted(large, key=lambda pair: -pair[0])
    return [[round(float(value), 2) for value in ring.ravel()] for _, ring in kept[:_OUTLINES]]


def _traced(code: dict[str, Any], width: int, height: int) -> list[np.ndarray]:
    """Outer borders (n, 2) of the regions of a mask, along the edges of pixels."""
    import cv2
    from pycocotools import mask as run_lengths

    packed = (
        code
        if isinstance(code["counts"], str | bytes)
        else run_lengths.frPyObjects(code, height, width)
    )
    mask = run_lengths.decode(packed)
    x, y, w, h = (int(value) for value in run_lengths.toBbox(packed))
    # OpenCV goes through the centres of border pixels, which takes half a pixel off every side: half of a thin stroke. With
    # every pixel doubled, centres 2i and 2j + 1 are the edges i and j + 1.
    doubled = mask[y : y + h, x : x + w].repeat(2, axis=0).repeat(2, axis=1)
    if not doubled.size:
        return []
    found, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((border.reshape(-1, 2) + 1) // 2 + (x, y)).astype(np.float32) for border in found]


def _simplified(ring: np.ndarray) -> np.ndarray:
    """Fewer corners (n, 2)."""
    import cv2

    distance = _DISTANCE
    while len(simple := cv2.approxPolyDP(ring, distance, True)) > _CORNERS:
        distance *= _GROWTH
    return np.asarray(simple).reshape(-1, 2)
