"""Prediction samples: a model's answers to a few samples, kept in the cell's ``examples.json``."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from fimaq_core.documents import Strict
from fimaq_core.errors import CheckpointError, first_problem

EXAMPLES_FILE = "examples.json"
#: Samples that an evaluation keeps (at most `_READABLE`), and answers per sample.
SAMPLES, ANSWERS = 12, 3
#: Per image in the file: most detections, their lowest score, and most annotated objects.
FOUND, LEAST_SCORE, TRUTHS = 20, 0.3, 100
#: Most captions per image in the file, and most characters per text.
CAPTIONS, CHARACTERS = 10, 1000
#: Limits on a file that is read, since it may come from other people: bytes and samples.
_BYTES, _READABLE = 5 * 10**6, 64


class Spread:
    """Chooses up to :data:`SAMPLES` of ``count`` samples, evenly spaced.

    The samples, damaged ones included, are cut into equal strips. The first readable sample of each
    strip is chosen. Only positions count, so all models show the same samples.

    Example::

        Spread(1200).take([0, 1, 100])  # [0, 2]: the first samples of two strips
    """

    def __init__(self, count: int) -> None:
        self.count, self.strips = count, min(count, SAMPLES)
        self.filled: set[int] = set()

    def take(self, positions: Iterable[int]) -> list[int]:
        """Return the chosen indices into ``positions``, which rise from call to call."""
        chosen = []
        for index, position in enumerate(positions):
            strip = position * self.strips // self.count
            if strip not in self.filled:
                self.filled.add(strip)
                chosen.append(index)
        return chosen


def leaders(scores: np.ndarray, correct: np.ndarray) -> list[int]:
    """Return the indices of the :data:`ANSWERS` highest ``scores`` (n,), the highest first.

    Among equal scores, ``correct`` (n,) ones come last, since ties count against the model.
    """
    return [int(index) for index in np.lexsort((correct, -scores))[:ANSWERS]]


def shortened(text: str) -> str:
    """Return ``text``, cut to :data:`CHARACTERS`."""
    return text if len(text) <= CHARACTERS else f"{text[: CHARACTERS - 1]}…"


class _Exact(Strict, strict=True, allow_inf_nan=False):
    """Base of all parts of the file. Types must match exactly: the file is not trusted."""


_Text = Annotated[str, Field(max_length=CHARACTERS)]
_Id = Annotated[str, Field(min_length=1, max_length=4096)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Side = Annotated[int, Field(ge=1, le=100_000)]
_Polygon = Annotated[list[float], Field(min_length=6, max_length=1000)]  # x0, y0, x1, y1, ...


class ClassAnswer(_Exact):
    """A class and its softmax probability."""

    name: _Text
    share: _Share


class ClassSample(_Exact):
    """A classified image: its true class, and the most probable classes."""

    sample: _Id
    truth: _Text
    top: list[ClassAnswer] = Field(max_length=ANSWERS)


class CaptionAnswer(_Exact):
    """A caption, its cosine similarity to the image, and True if it is the image's own."""

    caption: _Text
    score: float
    correct: bool


class CaptionSample(_Exact):
    """An image as query: its own captions, and the most similar captions of all images."""

    sample: _Id
    truth: list[_Text] = Field(max_length=CAPTIONS)
    top: list[CaptionAnswer] = Field(max_length=ANSWERS)


class TrueObject(_Exact):
    """An annotated object in pixels: box (x, y, width, height) and outlines."""

    name: _Text
    box: list[float] = Field(min_length=4, max_length=4)
    polygons: list[_Polygon] = Field(max_length=100)


class FoundObject(TrueObject):
    """A detected object with its score."""

    score: _Share


class ObjectSample(_Exact):
    """An image of ``size`` (width, height) with its annotated and detected objects."""

    sample: _Id
    size: list[_Side] = Field(min_length=2, max_length=2)
    truth: list[TrueObject] = Field(max_length=TRUTHS)
    found: list[FoundObject] = Field(max_length=FOUND)


Samples = list[ClassSample] | list[CaptionSample] | list[ObjectSample]


class ExampleFile(_Exact):
    """Content of ``examples.json``."""

    task: _Text
    samples: Annotated[Samples, Field(max_length=_READABLE)]


def read_examples(folder: Path, name: str) -> ExampleFile:
    """Read the prediction samples of a record: file ``name`` in ``folder``; both are not trusted.

    Raises CheckpointError if the file is missing, elsewhere, too large or not valid.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"The record in {folder} names {name!r} as its examples, which is no file beside it."
        )
    path = folder / name
    advice = "remove it and measure that cell again (--force) to have its examples."
    try:
        if not path.is_file():
            raise CheckpointError(f"There is no file {path} with examples, which its record names.")
        with path.open("rb") as file:
            content = file.read(_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"Cannot read the examples {path}: {error.strerror}.") from error
    if len(content) > _BYTES:
        raise CheckpointError(
            f"The examples {path} exceed {_BYTES // 10**6} MB, which no run writes: {advice}"
        )
    try:
        return ExampleFile.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(
            f"The examples {path} are not valid: {first_problem(error)} ({advice})"
        ) from error
