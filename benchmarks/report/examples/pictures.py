"""Pictures of samples, once each, small, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.cells import Cell
from benchmarks.report.examples.boards import Told
from benchmarks.report.gather import Gathered, Problem
from benchmarks.report.views import Picture
from fimaq_core.errors import FimaqError
from tasks.common.examples import ObjectSample

if TYPE_CHECKING:
    from PIL.Image import Image

#: Longest side in pixels: of pictures with objects drawn over them, and of others.
_LARGE, _SMALL = 480, 176

#: Up to this side pixels are worth seeing one by one, and nothing is lost by keeping them.
_TINY = 96

#: Fetches the original pictures of a cell's samples.
Fetch = Callable[[Cell, Sequence[str]], Mapping[str, "Image"]]


def fetch(cell: Cell, ids: Sequence[str]) -> Mapping[str, Image]:
    """The pictures of samples from the cell's own task. Raises DataError."""
    from tasks.common import registry

    return registry.pictures(cell.task, cell.request.model, cell.request.data, list(ids))


def make_pictures(told: Sequence[Told], get: Fetch, gathered: Gathered) -> dict[tuple[str, str], Picture]:
    """The pictures of all samples, by data set's fingerprint and sample. Where data are not there, that is a problem to list."""
    wanted: dict[str, tuple[Told, dict[str, None]]] = {}
    for one in told:
        wanted.setdefault(one.item.record.dataset.fingerprint, (one, {}))[1].update(dict.fromkeys(one.samples))
    pictures: dict[tuple[str, str], Picture] = {}
    for fingerprint, (one, ids) in wanted.items():
        images = _images(one.item.cell, list(ids), get, f"pictures of {one.item.record.dataset.name}", gathered)
        large = any(isinstance(sample, ObjectSample) for sample in one.samples.values())
        for sample in ids:
            if sample in images:
                pictures[fingerprint, sample] = picture(f"i{len(pictures)}", images[sample], _LARGE if large else _SMALL)
    return pictures


def _images(cell: Cell, ids: Sequence[str], get: Fetch, name: str, gathered: Gathered) -> Mapping[str, Image]:
    """The pictures that can be had; one unknown sample must not take those of all others away."""
    try:
        return get(cell, ids)
    except FimaqError as error:
        messages = {str(error)}
    found: dict[str, Image] = {}
    for sample in ids if len(ids) > 1 else ():
        try:
            found |= get(cell, [sample])
        except FimaqError as error:
            messages.add(str(error))
    # Where none is there, the messages differ in samples only: one says it all.
    gathered.problems.extend(Problem(name, message) for message in sorted(messages)[: None if found else 1])
    return found


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
