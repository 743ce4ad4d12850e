"""Preprocessing of images: the model's own, and fields given by a user. Imports nothing heavy."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, PositiveInt, ValidationError

from fimaq_core.documents import Strict
from fimaq_core.errors import RecipeError, first_problem

Share = Annotated[float, Field(gt=0, le=1)]
Side = Annotated[int, Field(ge=1, le=16384)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Mean = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(ge=1e-3, le=1)]
Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]


class Preprocessing(Strict):
    """Settings that turn an image into a model's input, named as in timm."""

    input_size: tuple[PositiveInt, PositiveInt, PositiveInt]  # (C, H, W)
    crop_pct: Share | None = None  # share of a resized image that is kept; None: no crop
    crop_mode: str  # timm: center, squash or border; open_clip: mode of resizing
    mean: tuple[FiniteFloat, ...]  # per channel, of values in 0..1
    std: tuple[Positive, ...]  # per channel
    interpolation: str  # of resizing

    def text(self) -> str:
        """Return the settings in one line."""
        crop = self.crop_mode
        if self.crop_pct is not None:
            crop = f"crop {self.crop_pct:g} ({self.crop_mode})"
        mean, std = (", ".join(f"{value:.6g}" for value in part) for part in (self.mean, self.std))
        size = " x ".join(map(str, self.input_size))
        return f"{size}, {self.interpolation}, {crop}, mean {mean}, std {std}"


class GivenPreprocessing(Strict):
    """Fields of :class:`Preprocessing` given by a user; None keeps the model's own value."""

    input_size: Annotated[list[Side], Field(min_length=2, max_length=3)] | None = None
    crop_pct: Share | None = None
    mean: Annotated[list[Mean], Field(min_length=1)] | None = None
    std: Annotated[list[Deviation], Field(min_length=1)] | None = None
    interpolation: Interpolation | None = None

    def fields(self) -> dict[str, Any]:
        """Return the given fields as JSON values."""
        return self.model_dump(mode="json", exclude_none=True)


#: Help texts of the options by field of :class:`GivenPreprocessing`.
HELP = {
    "input_size": "Size of input images: one number, H,W or C,H,W.  [as the model was built]",
    "crop_pct": "Kept share of the resized image, in 0..1.  [the model's]",
    "mean": "Mean of input images in 0..1: a number, or one per channel.  [the model's]",
    "std": "Standard deviation of input images: a number, or one per channel.  [the model's]",
    "interpolation": "Interpolation of resizing: bicubic, bilinear, lanczos ...  [the model's]",
}


def parse_preprocessing(texts: Mapping[str, str | None]) -> dict[str, Any]:
    """Return fields of :class:`GivenPreprocessing` from texts of options. Raises RecipeError."""
    content: dict[str, Any] = {name: text for name, text in texts.items() if text is not None}
    for name in ("input_size", "mean", "std"):
        if name in content:
            content[name] = re.split(r"\s*[\s,x]\s*", content[name].strip(" ()[]"))
    if len(content.get("input_size", ())) == 1:
        content["input_size"] *= 2
    try:
        return GivenPreprocessing.model_validate(content).fields()
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        advice = "Divide values of 0..255 by 255. " if field in ("mean", "std") else ""
        raise RecipeError(
            f"--{field.replace('_', '-')} {texts[field]!r} is not possible: "
            f"{first_problem(error).partition(': ')[2]}. {advice}Give: {HELP[field]}"
        ) from error


def replaced_fields(made: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return one sentence per ``given`` field that differs from the checkpoint's (``made``)."""
    return [
        f"--{name.replace('_', '-')} {_text(value)} replaces {_text(made.get(name))}, which the "
        "checkpoint was made with"
        for name, value in given.items()
        if value != made.get(name)
    ]


def _text(value: Any) -> str:
    if value is None:
        return "the model's own"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
