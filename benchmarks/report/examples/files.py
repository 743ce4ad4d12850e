"""Files of example predictions, validated: they lie beside records, which may come from anywhere."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from benchmarks.report.gather import inside
from fimaq_core.errors import CheckpointError

#: Bytes; a file of twelve samples has some thousands.
_LARGEST = 8_000_000

Word = Annotated[str, Field(max_length=2000)]
Polygon = Annotated[list[FiniteFloat], Field(min_length=6, max_length=20_000)]


class _Entry(BaseModel):
    """Unknown keys are left alone: later versions may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Guess(_Entry):
    """A class and its share of the softmax."""

    name: Word
    share: FiniteFloat


class Classified(_Entry):
    """A sample of classification, or of zero-shot classification."""

    sample: Word
    truth: Word
    top: list[Guess] = Field(min_length=1, max_length=10)


class Caption(_Entry):
    """A retrieved caption with its score."""

    caption: Word
    score: FiniteFloat
    correct: bool


class Retrieved(_Entry):
    """An image with its captions, and those retrieved for it."""

    sample: Word
    truth: list[Word] = Field(max_length=20)
    top: list[Caption] = Field(min_length=1, max_length=10)


class Found(_Entry):
    """An object: its box as x, y, width, height and the outlines of its mask, in pixels; of the truth without a score."""

    name: Word
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    polygons: list[Polygon] = Field([], max_length=100)
    score: FiniteFloat | None = None


class Detected(_Entry):
    """A picture with the objects in it, and those that were found."""

    sample: Word
    size: tuple[Annotated[int, Field(gt=0, lt=100_000)], Annotated[int, Field(gt=0, lt=100_000)]]
    truth: list[Found] = Field(max_length=200)
    found: list[Found] = Field(max_length=200)


Sample = Detected | Retrieved | Classified

_SAMPLES: TypeAdapter[list[Sample]] = TypeAdapter(Annotated[list[Sample], Field(max_length=100)])


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore")

    samples: list[Any]


def read_examples(folder: Path, name: str) -> list[Sample]:
    """Read the file of examples called ``name`` in a record's folder.

    Raises:
        CheckpointError: it is elsewhere, missing, too large or not what it should be.
    """
    path = inside(folder, name)
    if path is None:
        raise CheckpointError(f"'{name}' is no file in the record's own folder: it is not read.")
    try:
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"Larger than {_LARGEST // 1_000_000} MB, which no file of examples is.")
        content = _File.model_validate_json(path.read_bytes())
        return _SAMPLES.validate_python(content.samples)
    except OSError as error:
        raise CheckpointError(f"Cannot read it: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"Not valid: {where}: {first['msg']}. Measure the cell again, with --force.") from error
