"""Profiles: YAML files with a grid, how they are read and checked."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from benchmarks.grid.cell import CellName
from fimaq_core.documents import Strict, read_yaml, shown, validate
from fimaq_core.errors import FimaqError, RecipeError, suggest
from fimaq_core.export.recipes import check_exportable
from fimaq_core.recipe import METHODS, OFF, make_recipe
from tasks.common import registry

GRIDS = Path(__file__).parents[1] / "grids"
#: Method name of full precision.
FP = "fp"
#: Bound on the cells of a grid. The largest grid here has a few hundred.
_MOST_CELLS = 100_000
#: Key of an axis point for the data to calibrate on, as ``--calibration-data`` takes it.
CALIBRATION = "calibration_data"
#: Recipe fields that come from the lists of a grid, so overrides must not change them.
_NOT_OVERRIDABLE = ("method", "seed", "w_bits", "a_bits", "scope")


class GridError(FimaqError):
    """Grid or filter with a mistake."""


def parse_bits(text: str) -> tuple[int, int]:
    """Return weight and activation bits of a name such as ``w3a3``; raise GridError."""
    match = re.fullmatch(r"w([1-9][0-9]{0,2})a([1-9][0-9]{0,2})", text)
    if match is None:
        raise GridError(f"{shown(text)} is no bit-width: write such as w3a3 or w4a8.")
    bits = (int(match[1]), int(match[2]))
    for value in bits:
        if value != OFF and not 2 <= value <= 8:
            raise GridError(f"'{text}': {value} bits is outside 2 to 8 (or {OFF} for off).")
    if bits == (OFF, OFF):
        raise GridError(f"'{text}' is full precision: the method '{FP}', which needs no bits.")
    return bits


def known_method(name: str) -> str:
    """Return ``name`` if a method has this name; raise GridError otherwise."""
    if name != FP and name not in METHODS:
        raise GridError(f"Unknown method {shown(name)}.{suggest(name, [FP, *METHODS])}")
    return name


def _point(name: str) -> str:
    if not re.fullmatch(r"[^\s,|=]+", name):
        words = "cannot name an axis or point: leave out blanks and the characters , | ="
        raise ValueError(f"{shown(name)} {words}")
    return name


def _fields(fields: dict[str, Any]) -> dict[str, Any]:
    for name in fields:
        if name in _NOT_OVERRIDABLE:
            words = "cannot be an override: the grid's own lists give it to each cell"
            raise ValueError(f"{shown(name)} {words}")
    return fields


Method = Annotated[str, AfterValidator(known_method)]
Bits = Annotated[str, AfterValidator(lambda text: parse_bits(text) and text)]
#: Recipe fields that are changed for all methods.
Overrides = Annotated[dict[str, Any], AfterValidator(_fields)]
#: Name of an axis, or of a point on an axis.
Point = Annotated[str, AfterValidator(_point)]
Points = Annotated[dict[Point, Overrides], Field(min_length=1)]
#: Recipe fields that each point of each axis changes, in the order of the tables. A point may also
#: name other data to calibrate on.
Axes = dict[Point, Points]


class Prepared(Strict):
    """Folder that a command makes before a run: ``train/``, ``val/``, <model.tag>.safetensors."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")  #: of the folder in ``<results>/prepared``
    command: str  #: makes the folder; ``{folder}`` stands for its path


class TaskGrid(Strict):
    """Section of a grid: one task on one data set. A task may have several sections."""

    task: str | None = None  #: name of the task; None: the label of the section
    dataset: str  #: name of the data set in records
    #: Data folder that the user must give; ``own``: the models have their own data.
    data: Literal["own", "imagenet", "coco", "flickr"] = "own"
    prepared: Prepared | None = None  #: data and weights that a command makes, in place of ``data``
    evaluation: str | None = None  #: one of the task's evaluations; None: its default
    #: Evaluation elsewhere, as --dataset and --corrupt of the task take it.
    on: str | None = None
    corrupt: str | None = None
    home: str = ""  #: label of the section with the same models on their own data
    model_args: dict[str, Any] = {}  #: arguments of the models' constructors
    models: tuple[str, ...] = Field(min_length=1)
    available: tuple[str, ...] = ()  #: models that run when a filter asks for them
    #: These lists replace those of the grid.
    methods: tuple[Method, ...] | None = Field(None, min_length=1)
    bits: tuple[Bits, ...] | None = Field(None, min_length=1)
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    overrides: Overrides = {}  #: added to those of the grid, and stronger
    of_methods: dict[Method, Overrides] = {}  #: of single methods, added to both and stronger
    variant: str | None = None  #: name of the settings in records; None: that of the grid
    scopes: tuple[str, ...] = ()  #: one cell per scope; empty: the default scope of the task
    #: Methods whose cells are also measured as exports to ONNX, in the grid's own settings.
    export: tuple[Method, ...] = ()
    #: Where block inputs and Fisher information are cached; changes no result.
    placement: Literal["device", "host", "disk"] = "device"


class Extra(Strict):
    """Further cells: the product of these lists and the scopes of a section."""

    task: str  #: label of the section
    models: tuple[str, ...]
    methods: tuple[Method, ...]
    bits: tuple[Bits, ...]
    seeds: tuple[int, ...]


class Grid(Strict):
    """Content of a profile: its cells are all combinations of the lists below and of scopes.

    Full precision (``fp``) has neither bits nor seed nor scope. Methods that quantize nothing
    ignore the bits.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")  #: also the name of the table files
    description: str = ""
    tasks: dict[str, TaskGrid] = Field(min_length=1)  #: sections by label
    methods: tuple[Method, ...] = Field(min_length=1)
    bits: tuple[Bits, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    overrides: Overrides = {}
    variant: str | None = None  #: name of the settings in tables; None: the released settings
    device: str = "cpu"  #: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``
    threads: int | None = Field(None, ge=1, le=4096)  #: of a cell on CPUs; None: PyTorch's
    jobs: int | None = Field(None, ge=1, le=4096)  #: cells at a time; None: by cores and threads
    extra: tuple[Extra, ...] = ()  #: further cells, without axis points
    #: Ablations: each point changes the settings above on one axis. A method whose recipe does not
    #: allow a point has no cell there.
    axes: Axes = {}
    #: Layout of the tables. ``frontier``: one table of all sections with means over models and
    #: differences, also of a part of the cells.
    table: Literal["sections", "frontier"] = "sections"
    next: tuple[str, ...] = ()  #: advice that a run prints at its end
    only: frozenset[CellName] | None = None  #: cells of a published table; None: all cells

    @model_validator(mode="after")
    def _makes_recipes(self) -> "Grid":
        """Check that every method makes a recipe in every section and at every axis point."""
        for extra in self.extra:
            if extra.task not in self.tasks:
                hint = suggest(extra.task, self.tasks)
                raise GridError(f"unknown task {shown(extra.task)} in extra.{hint}")
        if (count := sum(map(self._cells, self.tasks))) > _MOST_CELLS:
            raise GridError(f"{count:,} cells are more than {_MOST_CELLS:,}: make several grids")
        points = [changes for axis in self.axes.values() for changes in axis.values()]
        for section in self.tasks:
            methods = [method for method in self.methods_of(section) if method != FP]
            own = self.overrides_of(section)
            for method in {*methods, *self.tasks[section].of_methods}:
                make_recipe(method, self.overrides_of(section, method))
            for changes in points if methods else ():
                errors = [error for name in methods if (error := _refusal(name, own, changes))]
                if len(errors) == len(methods):
                    raise errors[0]
            self._check_exports(section)
        return self

    def _check_exports(self, section: str) -> None:
        """Check that a section has the methods that it exports, with quantizers of integers."""
        known = {
            method for extra in self.extra if extra.task == section for method in extra.methods
        }
        known |= set(self.methods_of(section))
        for method in self.tasks[section].export:
            if method not in known - {FP}:
                words = f"cannot be exported in {shown(section)}: no quantized cell there has it"
                raise GridError(f"The method {shown(method)} {words}.")
            check_exportable(make_recipe(method, self.overrides_of(section, method)))

    def _cells(self, section: str) -> int:
        """Return the number of cells of a section at most, with those that a filter may add."""
        part, points = self.tasks[section], sum(map(len, self.axes.values()))
        lists = (self.methods_of(section), part.bits or self.bits, part.seeds or self.seeds)
        count = (len(part.models) + len(part.available)) * math.prod(map(len, lists))
        own = [extra for extra in self.extra if extra.task == section]
        further = (math.prod(map(len, (x.models, x.methods, x.bits, x.seeds))) for x in own)
        exports = 1 + bool(part.export)
        return (count * (exports + points) + exports * sum(further)) * max(1, len(part.scopes))

    def without_exports(self) -> "Grid":
        """Return the grid without the cells that measure exports."""
        tasks = {name: part.model_copy(update={"export": ()}) for name, part in self.tasks.items()}
        return self.model_copy(update={"tasks": tasks})

    def at_home(self) -> "Grid":
        """Return the grid without the sections that evaluate models of other sections."""
        tasks = {name: part for name, part in self.tasks.items() if not part.home}
        extra = tuple(one for one in self.extra if one.task in tasks)
        return self.model_copy(update={"tasks": tasks, "extra": extra})

    def task_of(self, section: str) -> str:
        """Return the name of a section's task."""
        return self.tasks[section].task or section

    def methods_of(self, section: str) -> tuple[str, ...]:
        """Return the methods of a section, without those of extra cells."""
        return self.tasks[section].methods or self.methods

    def overrides_of(self, section: str, method: str = FP) -> dict[str, Any]:
        """Return the recipe fields that task, grid and section change for a method."""
        usual, part = registry.defaults(self.task_of(section)), self.tasks[section]
        return {**usual, **self.overrides, **part.overrides, **part.of_methods.get(method, {})}


def point_recipe(changes: Overrides) -> dict[str, Any]:
    """Return the recipe fields of an axis point. Raises GridError: its data is no text."""
    if not isinstance(changes.get(CALIBRATION, ""), str):
        words = "name a folder, or demo:<kind> for a demo model"
        raise GridError(f"{CALIBRATION} is {shown(changes[CALIBRATION])}: {words}.")
    return {name: value for name, value in changes.items() if name != CALIBRATION}


def _refusal(method: str, own: Overrides, point: Overrides) -> RecipeError | None:
    """Return the error of a recipe with these changes; None if there is none."""
    try:
        make_recipe(method, own, point_recipe(point))
    except RecipeError as error:
        return error
    return None


def load_grid(profile: str) -> Grid:
    """Read the profile with this name (``demo``, ``paper``), or the profile in a YAML file.

    Raises:
        GridError: there is no such profile, it is not YAML, or a key or value in it is wrong.
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
    """Return the grid with this content; raise GridError like :func:`load_grid`."""
    return validate(Grid, content, where, GridError)
