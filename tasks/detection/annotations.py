"""Annotations in COCO's format, checked entry by entry and reduced to the keys that are used.

The check accepts what pycocotools accepts: boxes beyond the image or of no size, images without
annotations, crowd regions, ids with gaps. It refuses what would make pycocotools fail, count
wrongly without a message, or take memory and time out of proportion: its native code trusts what
it gets.
"""

import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fimaq_core.documents import shown
from fimaq_core.errors import DataError
from tasks.common.data.files import CONTROL, parse_json, read_text, state_of
from tasks.common.data.images import MOST_PIXELS

#: Largest coordinate or side of an object, as a multiple of the longer side of its image.
_REACH = 10
_FAR = f"which is more than {_REACH} times the side of the image away from it"
_NUMBERS = {int, float}
#: Largest area that pycocotools counts: it leaves larger objects out without a message.
_MOST_AREA = 10**10
#: Bounds on the mask of an object. pycocotools walks along outlines in steps of a fifth of a pixel.
_MOST_POLYGONS, _MOST_NUMBERS, _MOST_LENGTH, _MOST_RUNS = 10**4, 2 * 10**5, 2 * 10**6, 10**6
#: Bits before the last character of a compressed run length: a run of all pixels has 27 bits.
_MOST_SHIFT = 30

Entry = dict[str, Any]
#: ``images``, ``annotations`` and ``categories``, reduced by :func:`checked`, in the file's order.
Coco = dict[str, list[Entry]]


@dataclass(frozen=True)
class Detections:
    """Detected objects in the evaluated images."""

    results: list[Entry]  # in COCO's format of results
    kept: list[int]  # positions of the evaluated images
    notes: Sequence[str] = ()


def read_annotations(path: Path, annotated: bool = True) -> Coco:
    """Read and check a file, without annotations unless ``annotated``. Do not change the result.

    The result is cached.
    """
    return _read(path, annotated, state_of(path))


@lru_cache(maxsize=4)
def _read(path: Path, annotated: bool, state: tuple[int, int]) -> Coco:
    def without_polygons(item: Entry) -> Entry:
        item.pop("segmentation", None)
        return item

    # Calibration needs no polygons, and those of train2017 take gigabytes as Python lists.
    content = parse_json(read_text(path), str(path), None if annotated else without_polygons)
    return checked(content, str(path), annotated)


def checked(content: object, where: str, annotated: bool = True) -> Coco:
    """Check the content of the file ``where``; return a copy with the keys that are used.

    The copy has no empty segmentations, and no areas of 0 unless the box has no size. File names
    become normalised paths: relative without ``..``, or absolute. Raises DataError that names the
    entry.
    """
    found: Coco = content if isinstance(content, dict) else {}
    for name in ("images", "annotations", "categories"):
        listed = found.get(name)
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise DataError(
                f"{where} has no list {name!r} of objects: it is not a file in COCO's format."
            )
    images = [
        _image(entry, f"{where}, image {number} (counted from 0)")
        for number, entry in enumerate(found["images"])
    ]
    categories = [
        _category(entry, f"{where}, category {number} (counted from 0)")
        for number, entry in enumerate(found["categories"])
    ]
    named = {"images": (images, "file_name"), "categories": (categories, "name")}
    for what, (entries, name) in named.items():
        _check_distinct(entries, ("id", name), f"{where} lists {what}")
        if not entries:
            raise DataError(f"{where} lists no {what}.")
    annotations = []
    if annotated:
        sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in images}
        known = {entry["id"] for entry in categories}
        for number, entry in enumerate(found["annotations"]):
            name = shown(entry["id"]) if "id" in entry else f"{number} (counted from 0)"
            spot = f"{where}, annotation {name}"
            annotations.append(_annotation(entry, spot, sizes, known))
        _check_distinct(annotations, ("id",), f"{where} lists annotations")
    return {"images": images, "annotations": annotations, "categories": categories}


def _image(entry: Entry, spot: str) -> Entry:
    found = {name: _whole(entry, name, spot) for name in ("id", "width", "height")}
    if min(found["width"], found["height"]) < 1 or found["width"] * found["height"] > MOST_PIXELS:
        size = f"{found['width']} x {found['height']}"
        raise DataError(f"{spot}: its size is {size}, not 1 to {MOST_PIXELS:,} pixels.")
    # String operations only: a path object per image of COCO takes seconds.
    name = entry.get("file_name")
    text = name.replace("\\", "/") if isinstance(name, str) else ""
    path = posixpath.normpath(text)
    if path in (".", "/") or ".." in text.split("/") or CONTROL.search(path) is not None:
        raise DataError(
            f"{spot}: {shown(name)} is not the path of an image below the folder of the data."
        )
    return {**found, "file_name": path}


def _category(entry: Entry, spot: str) -> Entry:
    number, name = _whole(entry, "id", spot), entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{spot}: its name is {shown(name)}.")
    return {"id": number, "name": name}


def _annotation(
    entry: Entry, spot: str, sizes: dict[int, tuple[int, int]], categories: set[int]
) -> Entry:
    found = {name: _whole(entry, name, spot) for name in ("id", "image_id", "category_id")}
    if found["image_id"] not in sizes:
        raise DataError(f"{spot}: there is no image with the id {found['image_id']}.")
    spot = f"{spot} of the image {found['image_id']}"
    if found["category_id"] not in categories:
        raise DataError(f"{spot}: there is no category with the id {found['category_id']}.")
    box, area, crowd = entry.get("bbox"), entry.get("area"), entry.get("iscrowd")
    size = sizes[found["image_id"]]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)) or min(box[2:]) < 0:
        raise DataError(f"{spot}: bbox is {shown(box)}; x, y, width and height are expected.")
    if max(map(abs, box)) > _REACH * max(size):
        raise DataError(f"{spot}: bbox is {box}, {_FAR}.")
    if area is not None and not (_finite(area) and area <= _MOST_AREA):
        raise DataError(f"{spot}: area is {shown(area)}; the object's area in pixels is expected.")
    if crowd not in (None, 0, 1):
        raise DataError(f"{spot}: iscrowd is {shown(crowd)} instead of 0 or 1.")
    kept = {**found, "bbox": box, "iscrowd": int(crowd or 0)}
    # Some tools write 0 for an unknown area.
    if area is not None and (area > 0 or (area == 0 and 0 in box[2:])):
        kept["area"] = area
    mask = entry.get("segmentation")
    if isinstance(mask, list):
        mask = [polygon for polygon in mask if polygon != []]
    elif isinstance(mask, dict) and mask.get("counts") in ([], ""):
        mask = None
    if mask not in (None, [], {}, ""):  # some tools write an empty mask for none
        problem = _mask_problem(mask, size)
        if problem is not None:
            raise DataError(
                f"{spot}: its segmentation {problem}. Polygons or run lengths are expected, or "
                "none for box AP only."
            )
        kept["segmentation"] = mask
    return kept


def _mask_problem(mask: object, size: tuple[int, int]) -> str | None:
    """Describe what is wrong with a mask of an image of ``size`` (height, width), or None."""
    if isinstance(mask, list):
        if not all(isinstance(one, list) and _NUMBERS.issuperset(map(type, one)) for one in mask):
            return "is no list of polygons, each a list of numbers"
        # If the first polygon has four numbers, pycocotools takes all polygons for boxes.
        if len(mask[0]) < 6 or any(len(polygon) < 2 or len(polygon) % 2 for polygon in mask):
            return "holds a polygon that is not at least three pairs x, y"
        if len(mask) > _MOST_POLYGONS or sum(map(len, mask)) > _MOST_NUMBERS:
            return f"has more than {_MOST_POLYGONS:,} polygons or {_MOST_NUMBERS:,} numbers"
        if max(max(map(max, mask)), -min(map(min, mask))) > _REACH * max(size):
            return f"holds a point {_FAR}"
        rough = sum(len(polygon) * (max(polygon) - min(polygon)) for polygon in mask)
        if rough > _MOST_LENGTH and sum(map(_length, mask)) > _MOST_LENGTH:
            return f"has outlines of more than {_MOST_LENGTH:,} pixels in length"
        return None
    if not isinstance(mask, dict) or mask.get("size") != list(size):
        return f"is not of the image's size (height, width) {list(size)}"
    counts, total, pixels = mask.get("counts"), None, size[0] * size[1]
    if isinstance(counts, str | list) and len(counts) > _MOST_RUNS:
        return f"has more than {_MOST_RUNS:,} run lengths"
    if isinstance(counts, str):
        total = _decoded_total(counts)
    elif isinstance(counts, list) and {*map(type, counts)} == {int} and min(counts) >= 0:
        total = sum(counts)
    if total == pixels and {*map(type, mask["size"])} == {int}:
        return None
    covered = f"{total} of {pixels} pixels"
    return f"has run lengths that are damaged or do not cover the image ({covered})"


def _length(polygon: list[float]) -> float:
    """Return the length of an outline in pixels, along the longer of the two axes."""
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def _decoded_total(text: str) -> int | None:
    """Sum compressed run lengths; None if they are damaged.

    Each character holds five bits of a number, lowest bits first, and a flag for more characters.
    The fifth bit of the last character is the sign. From the fourth number on, the text holds the
    difference to the number two places before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > _MOST_SHIFT:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if not 0 <= value <= MOST_PIXELS:
            return None
        counts.append(value)
        value = shift = 0
    return None if shift else sum(counts)


def area_of(entry: Entry, image: Entry) -> float:
    """Return the area in pixels of a checked annotation: as given, else of its mask or box."""
    if "area" in entry:
        return float(entry["area"])
    _, _, width, height = entry["bbox"]
    mask = entry.get("segmentation")
    if mask is None:
        return float(width * height)
    from pycocotools import mask as run_lengths

    if isinstance(mask, dict) and isinstance(mask["counts"], str):
        return float(run_lengths.area(mask))
    codes = run_lengths.frPyObjects(mask, image["height"], image["width"])
    return float(run_lengths.area(run_lengths.merge(codes) if isinstance(mask, list) else codes))


def _finite(value: object) -> bool:
    return type(value) in _NUMBERS and abs(value) < 2**63  # type: ignore[operator]


def _whole(entry: Entry, name: str, spot: str) -> int:
    value = entry.get(name)
    if not _finite(value) or value != int(value):  # type: ignore[arg-type, operator, call-overload]
        raise DataError(f"{spot}: {name} is {shown(value)}; a whole number is expected.")
    return int(value)  # type: ignore[call-overload]


def _check_distinct(entries: Sequence[Entry], keys: Sequence[str], what: str) -> None:
    for key in keys:
        counts = Counter(entry[key] for entry in entries)
        twice = [value for value, count in counts.items() if count > 1]
        if twice:
            raise DataError(f"{what} with the same {key}: {shown(twice[0])} ({len(twice)} in all).")
