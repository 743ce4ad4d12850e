"""Grids as YAML files: what a profile may hold, and how one is read and checked."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from benchmarks.grid.cell import CellName
from fimaq_core.documents import Strict, read_yaml, validate
from fimaq_core.errors import FimaqError, suggest
from fimaq_core.recipe import METHODS, OFF, make_recipe
from tasks.common import registry

GRIDS = Path(__file__).parents[1] / "grids"
#: Name of full precision among the methods.
FP = "fp"
#: Recipe fields that a grid's own lists say for each cell, so that its overrides may not.
_NOT_OVERRIDABLE = ("method", "seed", "w_bits", "a_bits", "scope")


class GridError(FimaqError):
    """A grid, or a filter on it, that does not make sense."""


def parse_bits(text: str) -> tuple[int, int]:
    """Return weight and activation bits of a name such as ``w3a3``."""
    match = re.fullmatch(r"w(\d+)a(\d+)", text)
    if match is None:
        raise GridError(f"'{text}' is no bit-width: write such as w3a3 or w4a8.")
    bits = (int(match[1]), int(match[2]))
    for value in bits:
        if value != OFF and not 2 <= value <= 8:
            raise GridError(f"'{text}': {value} bits is outside 2 to 8 (or {OFF} for off).")
    if bits == (OFF, OFF):
        raise GridError(f"'{text}' is full precision: the method '{FP}', which needs no bits.")
    return bits


def known_method(name: str) -> str:
    """Return the name of a method; raise GridError if there is none of this name."""
    if name != FP and name not in METHODS:
        raise GridError(f"Unknown method '{name}'.{suggest(name, [FP, *METHODS])}")
    return name


def _bits(text: str) -> str:
    parse_bits(text)
    return text


def _point(name: str) -> str:
    if not re.fullmatch(r"[^\s,|=]+", name):
        words = "cannot name an axis or point: no blanks and none of , | = please"
        raise ValueError(f"'{name}' {words}")
    return name


def _fields(fields: dict[str, Any]) -> dict[str, Any]:
    for name in fields:
        if name in _NOT_OVERRIDABLE:
            words = "cannot be an override: the grid's own lists say it for each cell"
            raise ValueError(f"'{name}' {words}")
    return fields


Method = Annotated[str, AfterValidator(known_method)]
Bits = Annotated[str, AfterValidator(_bits)]
#: Recipe fields that change for every method alike.
Overrides = Annotated[dict[str, Any], AfterValidator(_fields)]
#: Name of an axis, or of a point of one.
Point = Annotated[str, AfterValidator(_point)]
Points = Annotated[dict[Point, Overrides], Field(min_length=1)]
#: Axis to point to the recipe fields that the point changes, in the order of the tables.
Axes = dict[Point, Points]


class TaskGrid(Strict):
    """One section of a grid: a task on a data set. A task may have several sections."""

    task: str | None = None  #: the task's name; None if the section's label is it
    dataset: str  #: name of the data set, as records state it
    #: ``own`` if the models bring their data along, else which folder must be given.
    data: Literal["own", "imagenet", "coco", "flickr"] = "own"
    evaluation: str | None = None  #: where the task has a choice; None: its usual one
    models: tuple[str, ...] = Field(min_length=1)
    available: tuple[str, ...] = ()  #: models that run when a filter asks for them
    methods: tuple[Method, ...] | None = Field(None, min_length=1)  #: instead of the grid's
    bits: tuple[Bits, ...] | None = Field(None, min_length=1)
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    overrides: Overrides = {}  #: beside the grid's; the same field counts here
    scopes: tuple[str, ...] = ()  #: one cell per scope; empty: the task's usual scope
    #: Where block inputs and Fisher information are cached; changes no result.
    placement: Literal["device", "host", "disk"] = "device"


class Extra(Strict):
    """Further cells: a small product of lists, in the scopes of the section ``task``."""

    task: str
    models: tuple[str, ...]
    methods: tuple[Method, ...]
    bits: tuple[Bits, ...]
    seeds: tuple[int, ...]


class Grid(Strict):
    """A profile. Its cells are the product of models, methods, bits, seeds and scopes.

    Full precision (``fp``) has neither bits nor seed nor scope. Methods that quantize nothing
    have no bits.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")  #: names the table files
    description: str = ""
    tasks: dict[str, TaskGrid] = Field(min_length=1)  #: the sections by their labels
    methods: tuple[Method, ...] = Field(min_length=1)
    bits: tuple[Bits, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    overrides: Overrides = {}
    variant: str | None = None  #: these settings in tables; None: released settings
    device: str = "cpu"  #: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``
    threads: int | None = Field(None, ge=1)  #: of a process; None: PyTorch's choice
    jobs: int | None = Field(None, ge=1)  #: processes at a time; None: by cores and threads
    extra: tuple[Extra, ...] = ()  #: further cells; they take no part in the axes
    axes: Axes = {}  #: for ablations: one at a time varies around the settings above
    next: tuple[str, ...] = ()  #: commands that a run prints at its end
    only: frozenset[CellName] | None = None  #: the cells, where they are no product of lists

    @model_validator(mode="after")
    def _makes_recipes(self) -> "Grid":
        """Check that every method makes a recipe in every section, at every point."""
        for extra in self.extra:
            if extra.task not in self.tasks:
                hint = suggest(extra.task, self.tasks)
                raise GridError(f"unknown task '{extra.task}' in extra.{hint}")
        points = [changes for axis in self.axes.values() for changes in axis.values()]
        for section in self.tasks:
            for method in self.methods_of(section):
                for changes in ({}, *points) if method != FP else ():
                    make_recipe(method, self.overrides_of(section), changes)
        return self

    def task_of(self, section: str) -> str:
        """Name of a section's task."""
        return self.tasks[section].task or section

    def methods_of(self, section: str) -> tuple[str, ...]:
        """Methods of a section, without those of its extra cells."""
        return self.tasks[section].methods or self.methods

    def overrides_of(self, section: str) -> dict[str, Any]:
        """Recipe fields changed in a section: by its task, the grid and the section itself."""
        usual = registry.defaults(self.task_of(section))
        return {**usual, **self.overrides, **self.tasks[section].overrides}


def load_grid(profile: str) -> Grid:
    """Read a profile: a name (``demo``, ``paper``) or the path of a YAML file.

    Raises:
        GridError: there is none, it is no YAML, or something in it does not fit.
    """
    path = Path(profile)
    if path.suffix not in (".yaml", ".yml"):
        path = GRIDS / f"{profile}.yaml"
        known = [file.stem for file in GRIDS.glob("*.yaml")]
        if profile not in known:
            hint = f"{suggest(profile, known)} A path that ends in .yaml works too."
            raise GridError(f"Unknown profile '{profile}'.{hint}")
    return parse_grid(read_yaml(path, "grid", GridError), str(path))


def parse_grid(content: dict[str, Any], where: str = "the grid") -> Grid:
    """Validate a grid's content. See :func:`load_grid`."""
    return validate(Grid, content, where, GridError)
