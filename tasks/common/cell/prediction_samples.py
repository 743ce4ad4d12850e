"""A model's answers for a few samples, kept beside the record: which samples, and the file's form."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from fimaq_core.documents import Strict
from fimaq_core.errors import CheckpointError, first_problem

EXAMPLES_FILE = "examples.json"
#: Samples that an evaluation keeps, and answers of each.
SAMPLES, ANSWERS = 12, 3
#: Objects of an image in the file: found, from this score on, and true ones.
FOUND, LEAST_SCORE, TRUTHS = 20, 0.3, 100
#: Captions of an image in the file, and characters of a text.
CAPTIONS, CHARACTERS = 10, 1000
#: What a file that comes from elsewhere may hold.
_BYTES, _SAMPLES = 5 * 10**6, 64


class Spread:
    """Chooses up to :data:`SAMPLES` of ``count`` samples, evenly spaced.

    The set (damaged samples included) is cut into as many strips, and the first sample of each that
    comes is chosen. That depends on positions alone, so every model is shown with the same samples.
    """

    def __init__(self, count: int) -> None:
        self.count, self.strips = count, min(count, SAMPLES)
        self.filled: set[int] = set()

    def take(self, positions: Iterable[int]) -> list[int]:
        """Which of ``positions`` (rising from call to call) are chosen, as indices into these."""
        chosen = []
        for index, position in enumerate(positions):
            strip = position * self.strips // self.count
            if strip not in self.filled:
                self.filled.add(strip)
                chosen.append(index)
        return chosen


def leaders(scores: np.ndarray, correct: np.ndarray) -> list[int]:
    """Indices of the highest :data:`ANSWERS` of ``scores`` (n,), the highest first.

    Of equal scores, ``correct`` ones (n,) come last: ties count against the model, as in its metrics.
    """
    return [int(index) for index in np.lexsort((correct, -scores))[:ANSWERS]]


def shortened(text: str) -> str:
    """``text``, cut off where it is longer than what a file may hold."""
    return text if len(text) <= CHARACTERS else f"{text[: CHARACTERS - 1]}…"


class _Exact(Strict, strict=True, allow_inf_nan=False):
    """Strict also in types: the file may come from elsewhere."""


_Text = Annotated[str, Field(max_length=CHARACTERS)]
_Id = Annotated[str, Field(min_length=1, max_length=4096)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Side = Annotated[int, Field(ge=1, le=100_000)]
#: x and y in turn, of at least three corners.
_Polygon = Annotated[list[float], Field(min_length=6, max_length=1000)]


class ClassAnswer(_Exact):
    """A class and its softmax probability."""

    name: _Text
    share: _Share


class ClassSample(_Exact):
    """A classified image: the name of its class, and the most probable ones."""

    sample: _Id
    truth: _Text
    top: list[ClassAnswer] = Field(max_length=ANSWERS)


class CaptionAnswer(_Exact):
    """A caption, its cosine similarity to the image, and whether it is one of the image's own."""

    caption: _Text
    score: float
    correct: bool


class CaptionSample(_Exact):
    """An image that captions were looked for to: its own captions, and the most similar of all."""

    sample: _Id
    truth: list[_Text] = Field(max_length=CAPTIONS)
    top: list[CaptionAnswer] = Field(max_length=ANSWERS)


class TrueObject(_Exact):
    """An annotated object in pixels: box x, y, width, height; outlines x0, y0, x1, y1, ..."""

    name: _Text
    box: list[float] = Field(min_length=4, max_length=4)
    polygons: list[_Polygon] = Field(max_length=100)


class FoundObject(TrueObject):
    """Likewise a detection, with its score."""

    score: _Share


class ObjectSample(_Exact):
    """An image of ``size`` (width, height) with its objects and what was found."""

    sample: _Id
    size: list[_Side] = Field(min_length=2, max_length=2)
    truth: list[TrueObject] = Field(max_length=TRUTHS)
    found: list[FoundObject] = Field(max_length=FOUND)


Samples = list[ClassSample] | list[CaptionSample] | list[ObjectSample]


class ExampleFile(_Exact):
    """Content of ``examples.json``."""

    task: _Text
    samples: Annotated[Samples, Field(max_length=_SAMPLES)]


def example_file(task: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written for :attr:`~tasks.common.task.Evaluation.examples`."""
    return {"task": task, "samples": samples}


def read_examples(folder: Path, name: str) -> ExampleFile:
    """Read the examples ``name`` (as the record calls them) in ``folder``; neither is trusted.

    Raises:
        CheckpointError: missing, not in that folder, larger than any that is written, or not valid.
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
            f"The examples {path} have more than {_BYTES // 10**6} MB, which none that are written have: {advice}"
        )
    try:
        return ExampleFile.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(
            f"The examples {path} are not valid: {first_problem(error)} ({advice})"
        ) from error
