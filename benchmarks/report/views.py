"""Parts of the page beside tables and charts, as plain data: provenance, module maps, example predictions."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """A line of a provenance: one value for all seeds, or one a seed."""

    name: str
    values: Sequence[str]
    code: bool = False

    @property
    def shared(self) -> bool:
        """Whether all seeds have the same."""
        return len(set(self.values)) == 1


@dataclass(frozen=True)
class Origin:
    """Where a number is from: the provenance of a group.

    Attributes:
        id: of its place on the page.
        seeds: what its columns are called.
        metrics: a row a metric: name, mean ± sd, and value ± standard error of each seed with the CSV's decimals.
        facts: by heading.
        recipe: all settings but the seed, a line each; empty for full precision.
        notes: of the records.
    """

    id: str
    title: str
    score: str
    subject: str
    model: str
    method: str
    bits: str
    seeds: Sequence[str]
    metrics: Sequence[tuple[str, str, Sequence[str]]]
    facts: Sequence[tuple[str, Sequence[Fact]]]
    recipe: str
    notes: Sequence[str]


@dataclass(frozen=True)
class ModuleMapView:
    """A module map that some cells share.

    Attributes:
        used_by: methods, and bits where not all have it.
        summary: how many layers of which kind.
        rows: a row a layer.
        full_precision: what stays in full precision.
    """

    subject: str
    model: str
    used_by: Sequence[str]
    summary: str
    rows: Sequence[Sequence[str]]
    full_precision: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """What a model said of a sample. ``right`` None: cannot be told."""

    text: str
    detail: str = ""
    right: bool | None = None
    rest: Sequence[str] = ()


@dataclass(frozen=True)
class Object:
    """An object drawn over a picture: box (x, y, w, h) and outlines as SVG points, in the picture's pixels.

    ``place`` is where its label begins (x, base line); None where it would cover another's.
    """

    label: str
    colour: int
    box: tuple[float, float, float, float]
    outlines: Sequence[str]
    place: tuple[float, float] | None


@dataclass(frozen=True)
class Drawing:
    """Objects over a picture, what is seen in words, and the size of labels in the picture's pixels."""

    objects: Sequence[Object]
    alt: str
    letters: float


@dataclass(frozen=True)
class ExampleRow:
    """A sample: its picture, the truth, and what each column says of it (None: not there)."""

    sample: str
    picture: str
    width: int
    height: int
    truth: Sequence[str]
    truth_drawing: Drawing | None
    cells: Sequence[Answer | Drawing | None]


@dataclass(frozen=True)
class Board:
    """Example predictions of a subject at some bits, methods side by side."""

    subject: str
    model: str
    bits: str
    kind: str
    methods: Sequence[str]
    rows: Sequence[ExampleRow]
    agreement: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A picture that boards show by its id."""

    id: str
    uri: str
    width: int
    height: int
    crisp: bool
