"""Annotations in COCO's format, checked entry by entry and reduced to what is used.

All that pycocotools takes is taken (boxes beyond the image, of no size, images without annotations,
crowd regions, ids with gaps); what would make it fail, or miscount in silence, is refused.
"""

import math
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from fimaq_core.errors import DataError
from tasks.common.data.files import parse_json, read_text, state_of

Entry = dict[str, Any]
#: ``images``, ``annotations`` and ``categories`` with the keys that :func:`checked` names, in the file's order.
Coco = dict[str, list[Entry]]


@dataclass(frozen=True)
class Detections:
    """Objects found, in COCO's format of results, in the images with the indices ``kept``."""

    results: list[Entry]
    kept: list[int]
    notes: Sequence[str] = ()


def read_annotations(path: Path, annotated: bool = True) -> Coco:
    """Content of a file, ``annotated`` or images only; read once, so not to be changed."""
    return _read(path, annotated, state_of(path))


@lru_cache(maxsize=4)
def _read(path: Path, annotated: bool, state: tuple[int, int]) -> Coco:
    # The polygons of train2017 take gigabytes as Python lists, and calibration does not use them.
    def without_polygons(item: Entry) -> Entry:
        item.pop("segmentation", None)
        return item

    content = parse_json(read_text(path), str(path), None if annotated else without_polygons)
    return checked(content, str(path), annotated)


def checked(content: object, where: str, annotated: bool = True) -> Coco:
    """Check annotations that come from ``where`` and return a copy with all that is used of them.

    An area of 0 for a box of some size and an empty segmentation are left out. File names become
    normalised paths, relative without ``..`` or absolute. Raises DataError that names the entry.
    """
    found: Coco = content if isinstance(content, dict) else {}
    for name in ("images", "annotations", "categories"):
        listed = found.get(name)
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise DataError(
                f"{where} has no list {name!r} of objects: it is not a file of COCO's format."
            )

    def spots(what: str) -> Iterator[tuple[Entry, str]]:
        for number, entry in enumerate(found["categories" if what == "category" else f"{what}s"]):
            yield entry, f"{where}, {what} {number} (counted from 0)"

    images = [_image(entry, spot) for entry, spot in spots("image")]
    _distinct(images, ("id", "file_name"), f"{where} lists images")
    categories = [_category(entry, spot) for entry, spot in spots("category")]
    _distinct(categories, ("id", "name"), f"{where} lists categories")
    if not images or not categories:
        raise DataError(f"{where} lists no {'categories' if images else 'images'}.")
    if not annotated:
        return {"images": images, "annotations": [], "categories": categories}
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in images}
    kinds = {entry["id"] for entry in categories}
    numbered = enumerate(found["annotations"])
    annotations = [_annotation(entry, number, where, sizes, kinds) for number, entry in numbered]
    _distinct(annotations, ("id",), f"{where} lists annotations")
    return {"images": images, "annotations": annotations, "categories": categories}


def _image(entry: Entry, spot: str) -> Entry:
    found = {name: _whole(entry, name, spot) for name in ("id", "width", "height")}
    if found["width"] < 1 or found["height"] < 1:
        raise DataError(f"{spot}: its size is {found['width']} x {found['height']}.")
    # Plain string work: a path object for each of COCO's images takes seconds.
    name = entry.get("file_name")
    text = name.replace("\\", "/") if isinstance(name, str) else ""
    path = posixpath.normpath(text)
    if path in (".", "/") or ".." in text.split("/"):
        raise DataError(
            f"{spot}: {name!r} is not the path of an image below the folder of the data."
        )
    return {**found, "file_name": path}


def _annotation(
    entry: Entry, number: int, where: str, sizes: dict[int, tuple[int, int]], kinds: set[int]
) -> Entry:
    spot = f"{where}, annotation {entry.get('id', f'{number} (counted from 0)')}"
    found = {name: _whole(entry, name, spot) for name in ("id", "image_id", "category_id")}
    if found["image_id"] not in sizes:
        raise DataError(f"{spot}: there is no image with the id {found['image_id']}.")
    spot = f"{spot} of the image {found['image_id']}"
    if found["category_id"] not in kinds:
        raise DataError(f"{spot}: there is no category with the id {found['category_id']}.")
    box, area, crowd, mask = (
        entry.get(name) for name in ("bbox", "area", "iscrowd", "segmentation")
    )
    if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)) or min(box[2:]) < 0:
        raise DataError(f"{spot}: bbox is {box!r}; x, y, width and height are expected.")
    if area is not None and not _finite(area):
        raise DataError(
            f"{spot}: area is {area!r}; the area of the object in pixels is expected: sizes are told by it."
        )
    if crowd not in (None, 0, 1):
        raise DataError(f"{spot}: iscrowd is {crowd!r} instead of 0 or 1.")
    kept = {**found, "bbox": box, "iscrowd": int(crowd or 0)}
    # Some tools write 0 where they do not know the area.
    if area is not None and (area > 0 or (area == 0 and 0 in box[2:])):
        kept["area"] = area
    if isinstance(mask, list):
        mask = [polygon for polygon in mask if polygon != []]
    elif isinstance(mask, dict) and mask.get("counts") in ([], ""):
        mask = None
    # Many files without masks have empty ones.
    if mask not in (None, [], {}, ""):
        _check_mask(mask, sizes[found["image_id"]], spot)
        kept["segmentation"] = mask
    return kept


def area_of(entry: Entry, image: Entry) -> float:
    """Area of a checked annotation of ``image`` in pixels: as given, else of its mask or box."""
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


def _check_mask(mask: object, size: tuple[int, int], spot: str) -> None:
    """Refuse all but polygons, or run lengths of an image of ``size`` (height, width)."""

    def refuse(why: str) -> NoReturn:
        raise DataError(
            f"{spot}: its segmentation {why}. Polygons or run lengths are expected, or none for box AP only."
        )

    if isinstance(mask, list):
        if not all(isinstance(polygon, list) and all(map(_finite, polygon)) for polygon in mask):
            refuse("is no list of polygons, each a list of numbers")
        # pycocotools takes a first polygon of four numbers for a box, and tells the kind of all from the first.
        if len(mask[0]) < 6 or any(len(polygon) < 2 or len(polygon) % 2 for polygon in mask):
            refuse("holds a polygon that is not at least three pairs x, y")
        return
    if not isinstance(mask, dict) or mask.get("size") != list(size):
        refuse(f"is not of the image's size (height, width) {list(size)}")
    counts = mask.get("counts")
    if isinstance(counts, str):
        total = _decoded_total(counts)
    else:
        whole = isinstance(counts, list) and all(
            type(count) is int and count >= 0 for count in counts
        )
        total = sum(counts) if whole and isinstance(counts, list) else None
    if total != size[0] * size[1]:
        refuse(
            f"has run lengths that are damaged or do not cover the image ({total} of {size[0] * size[1]} pixels)"
        )


def _decoded_total(text: str) -> int | None:
    """Sum of compressed run lengths; None if they are damaged.

    A character holds five bits of a number, least first, and whether more follow; the last one's
    fifth bit is the sign. From the fourth number on they are differences to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if value < 0:
            return None
        counts.append(value)
        value = shift = 0
    return None if shift else sum(counts)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(entry: Entry, name: str, spot: str) -> int:
    value = entry.get(name)
    if not _finite(value) or value != int(value):  # type: ignore[arg-type, operator, call-overload]
        raise DataError(f"{spot}: {name} is {value!r}; a whole number is expected.")
    return int(value)  # type: ignore[call-overload]


def _category(entry: Entry, spot: str) -> Entry:
    number, name = _whole(entry, "id", spot), entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{spot}: its name is {name!r}.")
    return {"id": number, "name": name}


def _distinct(entries: Sequence[Entry], keys: Iterable[str], what: str) -> None:
    for key in keys:
        seen: set[Any] = set()
        values = [entry[key] for entry in entries]
        twice = [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]
        if twice:
            raise DataError(f"{what} with the same {key}: {twice[0]!r} ({len(twice)} in all).")
