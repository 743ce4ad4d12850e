"""Calibration images of all tasks: the first readable images in an order, or a given list."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fimaq_core import documents
from fimaq_core.documents import shown
from fimaq_core.errors import DataError
from tasks.common.data.files import MOST_BYTES, composed, parse_json
from tasks.common.data.images import Images, seeded_item


class Taken(NamedTuple):
    """Calibration images after their transforms."""

    images: list[Any]  # each (C, H, W) float32, of any size
    positions: list[int]  # position of each image in the data
    skipped: list[str]  # ids of damaged images


def take(images: Images, order: Iterable[int], wanted: int, seed: int) -> Taken:
    """Take the first ``wanted`` readable images in ``order`` (positions), transformed by ``seed``.

    Raises DataError: there are fewer images, or a damaged image is not skipped.
    """
    if len(images) < wanted:
        raise DataError(
            f"{wanted} calibration images are asked for, but there are {len(images)}: "
            "lower --calibration-images or give more images."
        )
    found = Taken([], [], [])
    for index in map(int, order):
        if len(found.images) == wanted:
            return found
        item = seeded_item(images, index, seed)
        if item is None:
            found.skipped.append(images.ids[index])
        else:
            found.images.append(item)
            found.positions.append(index)
    if (count := len(found.images)) < wanted:
        damaged = f"{len(found.skipped)} are damaged"
        raise DataError(f"Only {count} of {wanted} calibration images could be read; {damaged}.")
    return found


def positions_of(names: Sequence[str], ids: Sequence[str], path: Path, what: str) -> list[int]:
    """Return the position in ``ids`` of each image in ``names``, the content of the list ``path``.

    A name may have another Unicode form than the id. ``what`` is the data set, for messages.
    Raises DataError: an image is not in the data, or more than once in the list.
    """
    own = {name: place for place, name in enumerate(ids)}
    positions = {composed(name): place for name, place in own.items()} | own
    found = {name: positions.get(name, positions.get(composed(name))) for name in names}
    unknown = [name for name in names if found[name] is None]
    if unknown:
        raise DataError(
            f"The calibration list {path} names {len(unknown)} images that are not in {what}, such "
            f"as {shown(unknown[0])} (ids in the data are such as {ids[0]!r})."
        )
    chosen = [position for name in names if (position := found[name]) is not None]
    twice = [ids[position] for position, count in Counter(chosen).items() if count > 1]
    if twice:
        several = f"{len(twice)} images more than once, such as {twice[0]!r}"
        raise DataError(f"The calibration list {path} names {several}.")
    return chosen


class Listed(NamedTuple):
    """Content of a calibration list."""

    ids: list[str]  # ids or paths of the images
    calibration: dict[str, Any] | None  # this entry of a result record; None for a text file


def read_list(path: Path) -> Listed:
    """Read a calibration list: a text file with one id or path per line, or a result record.

    Raises DataError: the file cannot be read, or is a JSON object without calibration ids.
    """
    text = documents.read_text(path, DataError, "calibration list", MOST_BYTES)
    if not text.lstrip().startswith("{"):
        return Listed([line.strip() for line in text.splitlines() if line.strip()], None)
    calibration = parse_json(text, f"The calibration list {path}").get("calibration")
    ids = calibration.get("ids") if isinstance(calibration, dict) else None
    if isinstance(ids, list) and all(isinstance(name, str) for name in ids):
        return Listed(ids, calibration)
    raise DataError(f"{path} is not a result record with calibration ids.")
