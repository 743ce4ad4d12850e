"""Example predictions of all methods side by side; detected objects are drawn over pictures."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.grid.cell import Cell
from benchmarks.report.charts import COLOURS, px
from benchmarks.report.gather import Gathered
from benchmarks.report.groups import Group, find
from benchmarks.results.scores import FULL, Measured, columns_of
from fimaq_core.errors import CheckpointError, FimaqError
from tasks.common import registry
from tasks.common.cell.prediction_samples import (
    CaptionSample,
    ClassSample,
    FoundObject,
    ObjectSample,
    TrueObject,
    read_examples,
)

if TYPE_CHECKING:
    from PIL.Image import Image

#: Longer side in pixels: of pictures with objects, of other pictures, of pictures kept unchanged.
_LARGE, _SMALL, _TINY = 480, 176, 96
#: Pixels of a drawing's longer side, size of its letters in pixels, their width / their size.
_SIDE, _LETTERS, _LETTER = 190, 10, 0.62
#: Tolerance of outlines: as a share of the picture's longer side, and in pixels; the larger counts.
_TOLERANCE, _TOLERANCE_PIXELS = 1 / 500, 0.75

#: Fetches the original pictures of a cell's samples.
Fetch = Callable[[Cell, Sequence[str]], Mapping[str, "Image"]]
Dict = dict[str, Any]
#: Pictures on the page, by fingerprint of the data set and name of the sample.
Pictures = dict[tuple[str, str], Dict]
Sample = ClassSample | CaptionSample | ObjectSample
_Box = tuple[float, float, float, float]


class Examples(NamedTuple):
    """Example predictions of one cell."""

    item: Measured  #: the cell
    samples: dict[str, Sample]  #: by name


def read_all(groups: Sequence[Group], gathered: Gathered) -> dict[str, Examples]:
    """Return the examples by group id, each from the group's first seed that has examples."""
    found: dict[str, Examples] = {}
    for group in groups:
        for item in group.items:
            name, folder = item.record.examples, item.folder
            if group.id in found or folder is None or name is None:
                continue
            try:
                if (folder / name).is_symlink():
                    raise CheckpointError("It is a link, so it is not read.")
                if samples := read_examples(folder, name).samples:
                    found[group.id] = Examples(item, {one.sample: one for one in samples})
            except FimaqError as error:
                gathered.add_problem(f"{gathered.relative(folder)}/{name}", error)
    return found


def fetch(cell: Cell, ids: Sequence[str]) -> Mapping[str, "Image"]:
    """Return the pictures of a cell's samples, by name; raise DataError if the data are missing."""
    return registry.originals(cell.task, cell.request.model, cell.request.data, list(ids))


def make_pictures(examples: Mapping[str, Examples], get: Fetch, gathered: Gathered) -> Pictures:
    """Return the pictures of all samples, each once; missing data are noted in ``gathered``."""
    wanted: dict[str, tuple[Examples, dict[str, Sample]]] = {}
    for one in examples.values():
        fingerprint = one.item.record.dataset.fingerprint
        wanted.setdefault(fingerprint, (one, {}))[1].update(one.samples)
    pictures: Pictures = {}
    for fingerprint, (one, samples) in wanted.items():
        for name, image in _images(one, list(samples), get, gathered).items():
            side = _LARGE if isinstance(samples[name], ObjectSample) else _SMALL
            pictures[fingerprint, name] = picture(image, side) | {"id": f"i{len(pictures)}"}
    return pictures


def _images(
    one: Examples, ids: Sequence[str], get: Fetch, gathered: Gathered
) -> Mapping[str, "Image"]:
    """Return the images of the known samples; each unknown sample is noted in ``gathered``."""
    found: dict[str, Image] = {}
    errors: dict[str, FimaqError] = {}
    for some in [ids, *([name] for name in ids)]:  # all at once, else one by one
        try:
            found |= get(one.item.cell, some)
        except FimaqError as error:
            errors[str(error)] = error
        if len(found) == len(ids):
            return found
    # If no sample is known, the messages differ by sample only: one is enough.
    for message in sorted(errors)[: None if found else 1]:
        gathered.add_problem(f"pictures of {one.item.record.dataset.name}", errors[message])
    return found


def picture(image: "Image", side: int) -> Dict:
    """Return an image, reduced to the longer side ``side``, as data URI with its original size."""
    width, height = image.size
    small, content = image.convert("RGB"), io.BytesIO()
    tiny = max(width, height) <= _TINY
    if tiny:
        small.save(content, "PNG", optimize=True)
    else:
        small.thumbnail((side, side))
        small.save(content, "JPEG", quality=82, optimize=True)
    data = base64.b64encode(content.getvalue()).decode()
    uri = f"data:image/{'png' if tiny else 'jpeg'};base64,{data}"
    return {"uri": uri, "width": width, "height": height, "tiny": tiny}


def make_boards(
    groups: Sequence[Group], examples: Mapping[str, Examples], pictures: Pictures
) -> list[Dict]:
    """Return one board of answers per subject and bits: full precision first, then the methods."""
    every = [examples[group.id].samples.values() for group in groups if group.id in examples]
    objects = [one for samples in every for one in samples if isinstance(one, ObjectSample)]
    names = sorted({found.name for one in objects for found in (*one.truth, *one.found)})
    colours = {name: index % COLOURS for index, name in enumerate(names)}
    boards = []
    for column in columns_of([group.cell for group in groups]):
        columns = {
            name: examples[group.id]
            for name, group in find(groups, column).items()
            if group.id in examples and (name == "fp" or group.cell.bits != FULL)
        }
        if any(name != "fp" for name in columns):
            boards.append({"column": column} | _board(columns, pictures, colours))
    return boards


def _board(columns: Mapping[str, Examples], pictures: Pictures, colours: Mapping[str, int]) -> Dict:
    """Return one row of answers per sample, and how often answers equal full precision's."""
    rows, methods, every = [], list(columns), list(columns.values())
    fingerprint = every[0].item.record.dataset.fingerprint
    same = [0] * len(every)
    for name in dict.fromkeys(name for one in every for name in one.samples):
        found = [one.samples.get(name) for one in every]
        first = next(sample for sample in found if sample is not None)
        cells = [_cell(one, colours) if isinstance(one, type(first)) else None for one in found]
        answers = [cell.get("text") if cell else None for cell in cells]
        for index, answer in enumerate(answers):
            same[index] += answer is not None and answer == answers[0]
        row: Dict = {"sample": name, "picture": pictures.get((fingerprint, name)), "cells": cells}
        if isinstance(first, ObjectSample):
            row["drawing"] = drawing(first, first.truth, colours, "truth")
        else:
            row["truth"] = [first.truth] if isinstance(first, ClassSample) else first.truth
        rows.append(row)
    agree = methods[0] == "fp" and not isinstance(first, ObjectSample)
    counts = ["", *(f"{count} of {len(rows)}" for count in same[1:])] if agree else []
    kind = type(first).__name__.removesuffix("Sample").lower()
    return {"kind": kind, "methods": methods, "rows": rows, "agreement": counts}


def _cell(sample: Sample, colours: Mapping[str, int]) -> Dict | None:
    """Return the drawing of a model's objects, or its first answer with its next answers."""
    if isinstance(sample, ObjectSample):
        return drawing(sample, sample.found, colours, "found")
    if not sample.top:
        return None
    if isinstance(sample, CaptionSample):
        first, *others = sample.top
        words = [(one, "right" if one.correct else "wrong") for one in others]
        rest = [f"{word}: {one.caption} ({one.score:.2f})" for one, word in words]
        answer, detail, right = first.caption, f"{first.score:.2f}", first.correct
    else:
        guess, *more = [(one.name, f"{100 * one.share:.0f} %") for one in sample.top]
        answer, detail = guess
        rest, right = [" ".join(one) for one in more], answer == sample.truth
    return {"text": answer, "detail": detail, "right": right, "rest": rest}


def drawing(
    sample: ObjectSample, objects: Sequence[TrueObject], colours: Mapping[str, int], word: str
) -> Dict:
    """Return ``objects`` to draw over the picture of ``sample``, the most certain one on top.

    ``word`` begins the drawing's description: ``truth`` or ``found``.
    """
    longest = max(sample.size)
    letters = longest * _LETTERS / _SIDE
    taken: list[_Box] = []
    drawn = []
    for one in sorted(objects, key=lambda one: -getattr(one, "score", 0.0)):
        label = f"{one.name} {100 * one.score:.0f}%" if isinstance(one, FoundObject) else one.name
        x, y, width, height = one.box
        box = (x, y, max(width, 0.0), max(height, 0.0))
        outlines = [points for polygon in one.polygons if (points := outline(polygon, longest))]
        place = _place(label, box, letters, sample.size, taken)
        about = {"label": label, "colour": colours[one.name], "box": box}
        drawn.append(about | {"outlines": outlines, "place": place})
    alt = f"{word}: {', '.join(str(one['label']) for one in drawn) or 'nothing'}"
    return {"objects": drawn[::-1], "alt": alt, "letters": letters, "size": sample.size}


def _place(
    label: str, box: _Box, letters: float, size: Sequence[int], taken: list[_Box]
) -> tuple[float, float] | None:
    """Return the first free place of a label: above, below or inside its box; note it in ``taken``.

    ``letters`` is the size of letters, ``size`` the picture's (width, height). None: no free place.
    """
    width = letters * _LETTER * len(label)
    left = min(max(box[0], 0.0), max(0.0, size[0] - width))
    right = left + width
    for base in (box[1] - 0.2 * letters, box[1] + box[3] + 0.9 * letters, box[1] + letters):
        top, bottom = base - 0.85 * letters, base + 0.1 * letters
        apart = [left >= b[2] or b[0] >= right or top >= b[3] or b[1] >= bottom for b in taken]
        if all(apart) and top >= 0 and bottom <= size[1]:
            taken.append((left, top, right, bottom))
            return left, base
    return None


def outline(polygon: Sequence[float], side: int) -> str:
    """Return an outline as SVG points, without points that make no visible difference.

    Without these points, the steps along single pixels of a mask disappear. ``side`` is the
    picture's longer side.
    """
    import cv2
    import numpy as np

    points = np.array(polygon[: len(polygon) // 2 * 2], dtype=np.float32).reshape(-1, 1, 2)
    fewer = cv2.approxPolyDP(points, max(side * _TOLERANCE, _TOLERANCE_PIXELS), True).reshape(-1, 2)
    corners = [f"{px(float(x))},{px(float(y))}" for x, y in fewer]
    return " ".join(corners) if len(corners) >= 3 else ""
