"""Facts that an exported ONNX file holds about itself, as JSON in its metadata."""

from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from fimaq_core.documents import Strict

#: Key of the facts in the metadata of an ONNX file.
KEY = "fimaq"

_Text = Annotated[str, Field(max_length=1000)]
_Count = Annotated[int, Field(ge=0, le=2**60)]
_Figure = Annotated[FiniteFloat, Field(ge=0, le=1e12)]
_Sha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class LayerFacts(Strict):
    """Layer that multiplies, and its multiply-adds for one sample."""

    name: _Text
    kind: Literal["linear", "convolution", "product"]
    macs: _Count
    quantized: bool  # True if both operands are quantized, so that integers can compute it


class CheckFacts(Strict):
    """Result of the check at the end of an export."""

    bytes: _Count  # of this file, without the check
    float_bytes: _Count | None  # of the same export in full precision; None if not measured
    samples: _Count  # calibration samples that were compared
    agreement: _Figure  # percentage of samples with the same answer as the simulated model
    codes: _Count  # activation codes that were compared
    ties: _Count  # codes that differ by one step, next to a rounding tie
    speed: _Figure | None  # time of the full-precision export divided by the time of this file
    batch: _Count  # samples per run when the speed was measured
    threads: _Count
    processor: _Text
    runtime: _Text  # name and version


class OnnxFacts(Strict):
    """Everything that a user of an exported file needs to know."""

    format: Literal[1] = 1
    task: _Text = ""
    model: _Text  # name to build the float model with
    model_args: dict[_Text, Any] = {}
    tag: _Text = ""
    weights_sha256: _Sha256
    recipe: dict[_Text, Any]
    recipe_digest: _Sha256
    part: Literal["", "vision", "text", "detector"] = ""  # part of the model in the file
    preprocessing: dict[_Text, Any] | None = None
    class_names: list[_Text] | None = None
    normalised: bool = True  # False: the graph takes uint8 images (n, H, W, C) and normalises them
    packed: bool = False  # True: weights of 2 to 4 bits lie in 2 to 4 bits
    signed: bool = False  # True: zero points of activations are 0
    layers: list[LayerFacts]
    extra: dict[_Text, Any] = {}  # facts of one task
    check: CheckFacts | None = None
