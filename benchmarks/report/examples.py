"""Example predictions: read from beside records, methods side by side, objects drawn over their pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cells import Cell
from benchmarks.report.charts import COLOURS, px
from benchmarks.report.gather import Gathered, inside
from benchmarks.report.groups import Column, Group, columns_of, find
from benchmarks.results.scores import FULL, Measured
from fimaq_core.errors import CheckpointError, FimaqError
from tasks.common.examples import CaptionSample, ClassSample, FoundObject, ObjectSample, TrueObject, read_examples

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels of the longest side: of pictures with objects drawn over them, of others, and of those kept pixel by pixel.
_LARGE, _SMALL, _TINY = 480, 176, 96
#: Pixels of the page: longer side of a drawing, and size of its letters; the width of a letter as a share of its size.
SIDE, _LETTERS, _LETTER = 190, 10, 0.62
#: How far an outline may be off, as a share of a picture's longer side and in its pixels: more is not seen.
_OFF, _OFF_PIXELS = 1 / 500, 0.75

#: Fetches the original pictures of a cell's samples.
Fetch = Callable[[Cell, Sequence[str]], Mapping[str, "Image"]]
#: Pictures on the page by data set's fingerprint and sample.
Pictures = dict[tuple[str, str], dict[str, Any]]
Sample = ClassSample | CaptionSample | ObjectSample
_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Told:
    """The examples of a cell, by sample."""

    item: Measured
    samples: dict[str, Sample]


def read_all(groups: Sequence[Group], gathered: Gathered) -> dict[str, Told]:
    """Return the examples of each group's first seed that has some, by the group's id; unreadable files become problems."""
    found: dict[str, Told] = {}
    for group in groups:
        for item in group.items:
            name = item.record.examples
            if group.id in found or item.folder is None or name is None:
                continue
            try:
                samples = _read(item.folder, name)
            except FimaqError as error:
                gathered.add_problem(f"{gathered.relative(item.folder)}/{name}", error)
            else:
                found[group.id] = Told(item, {sample.sample: sample for sample in samples})
    return found


def _read(folder: Path, name: str) -> Sequence[Sample]:
    if inside(folder, name) is None:
        raise CheckpointError("It leads out of the record's own folder, so it is not read.")
    return read_examples(folder, name).samples


def fetch(cell: Cell, ids: Sequence[str]) -> Mapping[str, Image]:
    """Return the pictures of samples from the cell's own task. Raises DataError."""
    from tasks.common import registry

    return registry.pictures(cell.task, cell.request.model, cell.request.data, list(ids))


def make_pictures(told: Sequence[Told], get: Fetch, gathered: Gathered) -> Pictures:
    """Return the pictures of all samples, once each. Where data are not there, that is a problem to list."""
    wanted: dict[str, tuple[Told, dict[str, None]]] = {}
    for one in told:
        wanted.setdefault(one.item.record.dataset.fingerprint, (one, {}))[1].update(dict.fromkeys(one.samples))
    pictures: Pictures = {}
    for fingerprint, (one, ids) in wanted.items():
        images = _images(one.item, list(ids), get, gathered)
        large = any(isinstance(sample, ObjectSample) for sample in one.samples.values())
        for sample in ids:
            if sample in images:
                pictures[fingerprint, sample] = picture(f"i{len(pictures)}", images[sample], _LARGE if large else _SMALL)
    return pictures


def _images(item: Measured, ids: Sequence[str], get: Fetch, gathered: Gathered) -> Mapping[str, Image]:
    """Return the pictures that can be had; one unknown sample must not take those of all others away."""
    found: dict[str, Image] = {}
    messages = {}
    try:
        return get(item.cell, ids)
    except FimaqError as error:
        messages[str(error)] = error
    for sample in ids if len(ids) > 1 else ():
        try:
            found |= get(item.cell, [sample])
        except FimaqError as error:
            messages[str(error)] = error
    # Where none is there, the messages differ in samples only: one says it all.
    for message in sorted(messages)[: None if found else 1]:
        gathered.add_problem(f"pictures of {item.record.dataset.name}", messages[message])
    return found


def picture(id: str, image: Image, side: int) -> dict[str, Any]:
    """Return an image as a data URI, no larger than ``side``; JPEG, or PNG where it is tiny. Its size stays the original's."""
    width, height = image.size
    small, content = image.convert("RGB"), io.BytesIO()
    tiny = max(width, height) <= _TINY
    if tiny:
        small.save(content, "PNG", optimize=True)
    else:
        small.thumbnail((side, side))
        small.save(content, "JPEG", quality=82, optimize=True)
    uri = f"data:image/{'png' if tiny else 'jpeg'};base64,{base64.b64encode(content.getvalue()).decode()}"
    return {"id": id, "uri": uri, "width": width, "height": height, "tiny": tiny}


def make_boards(groups: Sequence[Group], told: Mapping[str, Told], pictures: Pictures) -> list[dict[str, Any]]:
    """Return a board per subject and bits where a quantized cell has examples: full precision first, then the methods."""
    samples = [sample for one in told.values() for sample in one.samples.values() if isinstance(sample, ObjectSample)]
    names = sorted({found.name for sample in samples for found in [*sample.truth, *sample.found]})
    colours = {name: index % COLOURS for index, name in enumerate(names)}
    boards = []
    for column in columns_of([group.cell for group in groups]):
        here = find(groups, column)
        columns = {
            name: told[group.id] for name, group in here.items() if group.id in told and (name == "fp" or group.cell.bits != FULL)
        }
        if any(name != "fp" for name in columns):
            boards.append(_board(column, columns, pictures, colours))
    return boards


def _board(column: Column, told: Mapping[str, Told], pictures: Pictures, colours: Mapping[str, int]) -> dict[str, Any]:
    rows, same = [], dict.fromkeys(told, 0)
    methods, columns = list(told), list(told.values())
    fingerprint = columns[0].item.record.dataset.fingerprint
    kinds = {type(sample) for one in columns for sample in one.samples.values()}
    for name in dict.fromkeys(name for one in columns for name in one.samples):
        found = [one.samples.get(name) for one in columns]
        first = next(sample for sample in found if sample is not None)
        cells = [_cell(sample, colours) if isinstance(sample, type(first)) else None for sample in found]
        for method, cell in zip(methods, cells, strict=True):
            same[method] += bool(cell and cells[0] and cell.get("text", "") == cells[0].get("text"))
        row = {"sample": name, "picture": pictures.get((fingerprint, name)), "cells": cells, "truth": [], "drawing": None}
        if isinstance(first, ObjectSample):
            row["drawing"] = drawing(first, first.truth, colours, "truth")
        else:
            row["truth"] = [first.truth] if isinstance(first, ClassSample) else first.truth
        rows.append(row)
    kind = "detection" if ObjectSample in kinds else "retrieval" if CaptionSample in kinds else "classification"
    agreement = ["", *(f"{same[method]} of {len(rows)}" for method in methods[1:])]
    agree = methods[0] == "fp" and kind != "detection"
    return {"column": column, "kind": kind, "methods": methods, "rows": rows, "agreement": agreement if agree else []}


def _cell(sample: Sample, colours: Mapping[str, int]) -> dict[str, Any] | None:
    """Return what a model said of a sample: a drawing, or an answer with the runners-up; None where it said nothing."""
    if isinstance(sample, ObjectSample):
        return drawing(sample, sample.found, colours, "found")
    if not sample.top:
        return None
    if isinstance(sample, CaptionSample):
        first, *others = sample.top
        rest = [f"{'right' if one.correct else 'wrong'}: {one.caption} ({one.score:.2f})" for one in others]
        return {"text": first.caption, "detail": f"{first.score:.2f}", "right": first.correct, "rest": rest}
    shares = [(one.name, f"{100 * one.share:.0f} %") for one in sample.top]
    name, share = shares[0]
    return {"text": name, "detail": share, "right": name == sample.truth, "rest": [" ".join(one) for one in shares[1:]]}


def drawing(sample: ObjectSample, objects: Sequence[TrueObject], colours: Mapping[str, int], word: str) -> dict[str, Any]:
    """Return ``objects`` over the picture of ``sample``; of found ones the surest stand on top and have their labels first.

    Args:
        sample: says how large the picture is.
        objects: true or found.
        colours: of classes.
        word: what they are, for the text alternative.
    """
    longest = max(sample.size)
    letters = longest * _LETTERS / SIDE
    taken: list[_Box] = []
    drawn = []
    for one in sorted(objects, key=lambda one: one.score if isinstance(one, FoundObject) else 0.0, reverse=True):
        label = f"{one.name} {100 * one.score:.0f}%" if isinstance(one, FoundObject) else one.name
        x, y, width, height = one.box
        box = (x, y, max(width, 0.0), max(height, 0.0))
        outlines = [points for polygon in one.polygons if (points := outline(polygon, longest))]
        place = _place(label, box, letters, sample.size, taken)
        drawn.append({"label": label, "colour": colours[one.name], "box": box, "outlines": outlines, "place": place})
    named = ", ".join(one["label"] for one in drawn) or "nothing"
    return {"objects": drawn[::-1], "alt": f"{word}: {named}", "letters": letters, "size": sample.size}


def _place(label: str, box: _Box, letters: float, size: Sequence[int], taken: list[_Box]) -> tuple[float, float] | None:
    """Return where a label fits in the picture: above its box, below, or just inside; add it to those ``taken``."""
    width = letters * _LETTER * len(label)
    left = min(max(box[0], 0.0), max(0.0, size[0] - width))
    for base in (box[1] - 0.2 * letters, box[1] + box[3] + 0.9 * letters, box[1] + letters):
        top, bottom = base - 0.85 * letters, base + 0.1 * letters
        free = all(left >= b[2] or b[0] >= left + width or top >= b[3] or b[1] >= bottom for b in taken)
        if free and top >= 0 and bottom <= size[1]:
            taken.append((left, top, left + width, bottom))
            return left, base
    return None


def outline(polygon: Sequence[float], side: int) -> str:
    """Return an outline as SVG points, rounded and without points that do not show; ``side`` is the picture's longer one."""
    import cv2
    import numpy as np

    points = np.array(polygon[: len(polygon) // 2 * 2], dtype=np.float32).reshape(-1, 1, 2)
    fewer = cv2.approxPolyDP(points, max(side * _OFF, _OFF_PIXELS), True).reshape(-1, 2)
    return " ".join(f"{px(float(x))},{px(float(y))}" for x, y in fewer) if len(fewer) >= 3 else ""
