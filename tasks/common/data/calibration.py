"""Calibration samples as every task takes them: in a given order until there are enough, or from a list."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fimaq_core.errors import DataError
from tasks.common.data.files import composed
from tasks.common.data.images import Images, seeded_item


@dataclass(frozen=True)
class Drawn:
    """Transformed images.

    Attributes:
        images: (n, C, H, W) float32.
        positions: of each in what was drawn from.
        skipped: ids of damaged images that were left out.
        notes: see :meth:`tasks.common.data.images.Images.notes`.
    """

    images: Tensor
    positions: list[int]
    skipped: list[str]
    notes: list[str]


def draw(images: Images, order: Iterable[int], wanted: int, seed: int) -> Drawn:
    """Take the first ``wanted`` readable images in ``order``, each with its random transforms seeded on its own.

    Raises:
        DataError: fewer images than wanted, or a damaged one that is not to be skipped.
    """
    chosen, positions, skipped = take(images, order, wanted, seed)
    return Drawn(torch.stack(chosen), positions, skipped, images.notes())


def take(
    images: Images, order: Iterable[int], wanted: int, seed: int
) -> tuple[list[Any], list[int], list[str]]:
    """What :func:`draw` stacks, for samples that cannot be: transformed images, positions, ids of those skipped."""
    if len(images) < wanted:
        raise DataError(
            f"{wanted} calibration images are asked for, but there are {len(images)}: lower --calibration-images or give more."
        )
    chosen: list[Any] = []
    positions: list[int] = []
    skipped: list[str] = []
    for index in order:
        if len(chosen) == wanted:
            break
        item = seeded_item(images, int(index), seed)
        if item is None:
            skipped.append(images.ids[index])
            continue
        chosen.append(item)
        positions.append(int(index))
    if len(chosen) < wanted:
        raise DataError(
            f"Only {len(chosen)} of {wanted} calibration images could be read; {len(skipped)} are damaged."
        )
    return chosen, positions, skipped


def positions_of(names: Sequence[str], ids: Sequence[str], path: Path, what: str) -> list[int]:
    """Return where the images ``names`` of the calibration list ``path`` are among ``ids``.

    Args:
        ids: of the data, distinct.
        what: the data are, for people.

    Raises:
        DataError: an image that is not there, or twice in the list.
    """
    positions = id_positions(ids)
    found = [positions.get(name, positions.get(composed(name))) for name in names]
    unknown = [name for name, position in zip(names, found, strict=True) if position is None]
    if unknown:
        raise DataError(
            f"The calibration list {path} names {len(unknown)} images that are not in {what}, such as {unknown[0]!r} (ids there "
            f"are such as {ids[0]!r})."
        )
    chosen = [position for position in found if position is not None]
    twice = [ids[position] for position, count in Counter(chosen).items() if count > 1]
    if twice:
        raise DataError(
            f"The calibration list {path} names {len(twice)} images more than once, such as {twice[0]!r}."
        )
    return chosen


def id_positions(ids: Sequence[str]) -> dict[str, int]:
    """Position of each id, by its name and by the composed form of its name."""
    own = {name: place for place, name in enumerate(ids)}
    return {composed(name): place for name, place in own.items()} | own


@dataclass(frozen=True)
class Listed:
    """Content of a calibration list.

    Attributes:
        ids: of the images, or their paths.
        calibration: the entry of a result record; None for a text file.
    """

    ids: list[str]
    calibration: dict[str, Any] | None


def read_list(path: Path) -> Listed:
    """Read a calibration list: a text file with an id or path a line, or a result record.

    Raises:
        DataError: it cannot be read, or is a JSON object without calibration ids.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the calibration list {path}: {error}.") from error
    if not text.lstrip().startswith("{"):
        return Listed([line.strip() for line in text.splitlines() if line.strip()], None)
    try:
        calibration = json.loads(text)["calibration"]
        ids = calibration["ids"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a result record with calibration ids.") from error
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise DataError(f"{path} is not a result record with calibration ids.")
    return Listed(ids, calibration)
