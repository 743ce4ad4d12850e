"""Pictures of samples, once each, small, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.cells import Cell
from benchmarks.report.examples.boards import Told
from benchmarks.report.gather import Gathered, Problem
from benchmarks.report.model import Picture
from fimaq_core.errors import FimaqError

if TYPE_CHECKING:
    from PIL.Image import Image

#: Longest side in pixels: of pictures with objects drawn over them, and of others.
_LARGE, _SMALL = 480, 176

#: Up to this side pixels are worth seeing one by one, and nothing is lost by keeping them.
_TINY = 96

#: Fetches the original pictures of a cell's samples.
Fetch = Callable[[Cell, Sequence[str]], Mapping[str, "Image"]]


def fetch(cell: Cell, ids: Sequence[str]) -> Mapping[str, Image]:
    """The pictures of samples from the cell's own task; none where the task offers none. Raises DataError."""
    from tasks.common.registry import get_task

    offered = getattr(get_task(cell.task), "pictures", None)
    found: Mapping[str, Image] = {} if offered is None else offered(cell.request.model, cell.request.data, list(ids))
    return found


def make_pictures(told: Sequence[Told], get: Fetch, gathered: Gathered) -> dict[tuple[str, str], Picture]:
    """The pictures of all samples, by data set's fingerprint and sample. Where data are not there, that is a problem to list."""
    wanted: dict[str, tuple[Told, dict[str, None]]] = {}
    for one in told:
        wanted.setdefault(one.item.record.dataset.fingerprint, (one, {}))[1].update(dict.fromkeys(one.samples))
    pictures: dict[tuple[str, str], Picture] = {}
    for fingerprint, (one, ids) in wanted.items():
        try:
            images = get(one.item.cell, list(ids))
        except FimaqError as error:
            gathered.problems.append(Problem(f"pictures of {one.item.record.dataset.name}", str(error)))
            continue
        large = any(hasattr(sample, "size") for sample in one.samples.values())
        for sample in ids:
            if sample in images:
                pictures[fingerprint, sample] = picture(f"i{len(pictures)}", images[sample], _LARGE if large else _SMALL)
    return pictures


def picture(id: str, image: Image, side: int) -> Picture:
    """An image as a data URI, no larger than ``side``; JPEG, or PNG where it is tiny. Its size stays the original's."""
    width, height = image.size
    small = image.convert("RGB")
    tiny = max(width, height) <= _TINY
    if not tiny:
        small.thumbnail((side, side))
    content = io.BytesIO()
    if tiny:
        small.save(content, "PNG", optimize=True)
    else:
        small.save(content, "JPEG", quality=82, optimize=True)
    kind = "png" if tiny else "jpeg"
    return Picture(id, f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}", width, height, tiny)
