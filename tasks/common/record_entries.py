"""Entries of result records, with bounds that keep out numbers and texts that no run writes."""

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from fimaq_core.documents import Strict

#: Name of a file beside the record, without a folder: records of other people are not trusted.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}$")]
Text = Annotated[str, Field(max_length=10_000)]
Bits = Literal[2, 3, 4, 5, 6, 7, 8, 32]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Bytes = Annotated[int, Field(ge=0, le=2**60)]
Seconds = Annotated[FiniteFloat, Field(ge=0, le=1e10)]
Amount = Annotated[FiniteFloat, Field(ge=0, le=1e12)]
Figure = Annotated[FiniteFloat, Field(ge=0, le=1e39)]  # any number of float32
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Metric(Strict):
    """A value in percent, or a rank from 1, and its standard error over the samples."""

    value: Amount
    stderr: Amount


class SignedMetric(Strict):
    """A value in a unit of its own, which may be negative, and its standard error."""

    value: FiniteFloat
    stderr: Amount


class Weights(Strict):
    """Origin of the float weights."""

    tag: Text
    source: Text
    sha256: Text
    entry: Text | None = None  # loaded entry of the file; None if it has none, or in old records
    entries: list[Text] = []  # all entries of the file that hold weights

    def notes(self) -> list[str]:
        """Return one line with the loaded entry if the file has several, else no line."""
        if len(self.entries) < 2:
            return []
        return [f"weights: entry '{self.entry}' of {', '.join(self.entries)} (--weights-entry)"]


class Dataset(Strict):
    """The evaluated samples. None means "not recorded" or "does not apply"."""

    name: Text
    split: Text
    count: Count  # images
    classes: Count
    fingerprint: Text
    captions: Count | None = None
    truncated_captions: Count | None = None  # cut off at the model's context length
    exif: Literal["apply", "ignore"] | None = None  # the user's choice; None: by annotated sizes
    oriented_images: Count | None = None  # images with an EXIF orientation tag
    # Source of the class names: weights file or demo, COCO 2017, or the order of annotations.
    class_names_from: Literal["model", "published", "annotations"] | None = None
    # Category of each class of the detector; None for a class without category in the data.
    class_categories: tuple[Text | None, ...] | None = None
    class_order: Text | None = None  # of class folders, see tasks.common.data.class_order
    left_out: Count | None = None  # files that are neither hidden nor images


class Calibration(Strict):
    """The calibration images: ids in order, their transform, and their captions if any.

    ``dataset`` and ``split`` name the part of a data set that holds the images. They are None in
    records before version 4. For listed files that are in no opened data set, ``dataset`` is None
    and ``split`` is the folder below the data folder that holds all files, if there is one.
    """

    ids: list[Text]
    transform: Text
    fingerprint: Text
    captions: list[Text] | None = None
    truncated_captions: Count | None = None
    batch: Count | None = None  # samples that the divergence compares; None if it compares none
    dataset: Text | None = None
    split: Text | None = None
    listed: bool | None = None  # True: the user listed the images; None in old records


class LayerEntry(Strict):
    """A quantized layer. ``input_*`` describes a product's first operand, ``other_*`` its second.

    ``*_quantizer`` is the kind of quantizer, ``none`` if off. Old records lack the last 4 fields.
    """

    name: Text
    kind: Text
    weight_bits: Bits
    input_bits: Bits
    weight_ranges: Text
    input_ranges: Text
    weight_quantizer: Text = "uniform"
    input_quantizer: Text = "uniform"
    other_bits: Bits | None = None
    other_quantizer: Text | None = None


class ModuleMap(Strict):
    """All quantized layers, and all modules left in full precision."""

    quantized: list[LayerEntry]
    full_precision: list[Text]


class Environment(Strict):
    """Machine and software of a measurement."""

    versions: dict[Text, Text]
    git_revision: Text
    device: Text
    instructions: Text = ""  # of the CPU; empty in old records
    threads: Count


class Exported(Strict):
    """ONNX file whose outputs were measured; multiply-adds (``macs``) are those of one sample."""

    sha256: Sha256
    bytes: Bytes
    float_bytes: Bytes | None = None  # of the same export in full precision; None if not made
    weights: Literal["int8", "packed"]  # packed: weights of 2 to 4 bits in 2 to 4 bits
    signed: bool  # True: zero points of activations are 0
    integer_macs: Count  # in integer operators of the runtime
    quantized_macs: Count  # of layers with two quantized operands, which integers can compute
    macs: Count  # of all quantizable layers
    # Time of the full-precision export divided by the time of this file; None if not measured.
    speed: Amount | None = None
    runtime: Text  # name and version


class BlockFigures(Strict):
    """Quality of a reconstructed block.

    ``error`` is ``||q - f||² / ||f||²`` over all calibration images: ``q`` is the block's output
    in the quantized model, with the errors of all earlier blocks, and ``f`` its output in full
    precision. ``fisher`` is the mean diagonal Fisher weight of the loss; None if the loss has none.
    """

    error: Figure
    fisher: Figure | None = None
