"""Grids: which cells a profile has. A grid is a YAML file; filters narrow or widen it; it expands to cells."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.axes import Axes, GridError, check_axes, check_names, check_overrides, parse_axes, with_points
from benchmarks.cells import Cell, Key, RunOptions, make_cell
from fimaq_core.errors import suggest
from fimaq_core.recipe import METHODS, OFF, make_recipe

GRIDS = Path(__file__).parent / "grids"
FP = "fp"

T = TypeVar("T")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskGrid(_Strict):
    """One task's part of a grid.

    Attributes:
        dataset: name of the data set, as its records will state it.
        data: ``own`` if the models bring their data along, ``folder`` if a path must be given.
        models: run by default.
        available: run when a filter asks for them.
    """

    dataset: str
    data: str = Field("own", pattern="^(own|folder)$")
    models: tuple[str, ...] = Field(min_length=1)
    available: tuple[str, ...] = ()


class Extra(_Strict):
    """Further cells beside the product of the grid's lists: a small product of their own."""

    task: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    bits: tuple[str, ...]
    seeds: tuple[int, ...]


class Grid(_Strict):
    """A profile.

    Attributes:
        name: names the table files.
        tasks, methods, bits, seeds: the cells are the product of these; ``fp`` has neither bits nor seed, and methods
            that quantize nothing (see :func:`changes_model_only`) have no bits.
        overrides: recipe fields changed for every method alike.
        axes: axis to point to recipe fields, for ablations: one axis at a time varies around the settings above.
        variant: name of these settings in tables; None leaves it to the record (released settings).
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        threads: CPU threads of a process; None leaves PyTorch's choice.
        jobs: processes at a time; None derives it from cores and threads.
        extra: further cells; they take no part in the axes.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    description: str = ""
    tasks: dict[str, TaskGrid] = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1)
    bits: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    overrides: dict[str, Any] = {}
    variant: str | None = None
    device: str = "cpu"
    threads: int | None = Field(None, ge=1)
    jobs: int | None = Field(None, ge=1)
    extra: tuple[Extra, ...] = ()
    axes: Axes = {}


@dataclass(frozen=True)
class Filters:
    """What a run is narrowed to; None leaves the grid's own list."""

    tasks: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    bits: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    axes: tuple[str, ...] | None = None

    @property
    def active(self) -> bool:
        """Whether anything is filtered."""
        return any(value is not None for value in (self.tasks, self.models, self.methods, self.bits, self.seeds, self.axes))


def load_grid(profile: str) -> Grid:
    """Read a profile: a name (``demo``, ``paper``) or the path of a YAML file.

    Raises:
        GridError: no such profile or file, not YAML, an unknown key (with a suggestion), or a bad value.
    """
    if profile.endswith((".yaml", ".yml")):
        path = Path(profile)
    else:
        path = GRIDS / f"{profile}.yaml"
        known = [file.stem for file in GRIDS.glob("*.yaml")]
        if profile not in known:
            raise GridError(f"Unknown profile '{profile}'.{suggest(profile, known)} A path that ends in .yaml works too.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GridError(f"Cannot read the grid {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GridError(f"The grid {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise GridError(f"The grid {path} must hold 'key: value' lines.")
    return parse_grid(content, str(path))


def parse_grid(content: dict[str, Any], where: str = "the grid") -> Grid:
    """Validate a grid's content. See :func:`load_grid`."""
    check_names(content.get("axes"), where)
    try:
        grid = Grid.model_validate(content)
    except ValidationError as error:
        raise GridError(f"{where}: " + " ".join(_problem(item) for item in error.errors())) from error
    for method in (*grid.methods, *(name for extra in grid.extra for name in extra.methods)):
        _known_method(method)
    for bits in (*grid.bits, *(name for extra in grid.extra for name in extra.bits)):
        parse_bits(bits)
    for extra in grid.extra:
        if extra.task not in grid.tasks:
            raise GridError(f"{where}: unknown task '{extra.task}' in extra.{suggest(extra.task, grid.tasks)}")
    check_overrides(grid.overrides, where)
    quantizing = [method for method in grid.methods if method != FP]
    for method in quantizing:
        make_recipe(method, grid.overrides)
    check_axes(grid.axes, quantizing, grid.overrides, where)
    return grid


def _problem(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{place}: {item['msg']} (given: {item['input']!r})."
    parts: dict[str, type[BaseModel]] = {"tasks": TaskGrid, "extra": Extra}
    owner = parts[str(item["loc"][0])] if len(item["loc"]) > 1 else Grid
    return f"Unknown key '{place}'.{suggest(str(item['loc'][-1]), owner.model_fields)}"


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
        raise GridError(f"'{text}' is full precision: that is the method '{FP}', which needs no bits.")
    return bits


def changes_model_only(method: str) -> bool:
    """Whether a method fixes its bits at 32/32: it measures a changed full-precision model, once for all bits."""
    settings = METHODS.get(method, {})
    return settings.get("w_bits") == OFF and settings.get("a_bits") == OFF


def _known_method(name: str) -> None:
    if name != FP and name not in METHODS:
        raise GridError(f"Unknown method '{name}'.{suggest(name, [FP, *METHODS])}")


def parse_filters(
    grid: Grid, tasks: str = "", models: str = "", methods: str = "", bits: str = "", seeds: str = "", axes: str = ""
) -> Filters:
    """Turn comma lists into filters on ``grid``; an empty text leaves that side unfiltered.

    Raises:
        GridError: a value that does not exist, with a suggestion.
    """
    wanted_tasks, wanted_models = _split(tasks), _split(models)
    known = [name for part in grid.tasks.values() for name in (*part.models, *part.available)]
    for what, wanted, names in (("task", wanted_tasks, list(grid.tasks)), ("model", wanted_models, known)):
        for name in wanted or ():
            if name not in names:
                raise GridError(f"Unknown {what} '{name}' in profile '{grid.name}'.{suggest(name, names)}")
    wanted_methods, wanted_bits, wanted_seeds = _split(methods), _split(bits), _split(seeds)
    for name in wanted_methods or ():
        _known_method(name)
    for name in wanted_bits or ():
        parse_bits(name)
    for name in wanted_seeds or ():
        if not re.fullmatch(r"\d+", name):
            raise GridError(f"'{name}' is no seed: seeds are whole numbers from 0.")
    numbers = None if wanted_seeds is None else tuple(int(name) for name in wanted_seeds)
    wanted_axes = _split(axes)
    parse_axes(wanted_axes or (), grid.axes, grid.name)
    return Filters(wanted_tasks, wanted_models, wanted_methods, wanted_bits, numbers, wanted_axes)


def _split(text: str) -> tuple[str, ...] | None:
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    return parts or None


def chosen_axes(grid: Grid, filters: Filters) -> Axes:
    """Return the axes of a grid that a filter leaves."""
    return {name: points for name, points in grid.axes.items() if filters.axes is None or name in filters.axes}


def expand(grid: Grid, filters: Filters, options: RunOptions) -> list[Cell]:
    """Return the cells: per model full precision first, then by bits, seed and method, each with its axis points.

    A filter replaces the grid's list where it is given, so it may also name values the grid does not run by default.
    Extra cells run if no filter excludes them. Methods that quantize nothing have one cell a seed, whatever the bits.
    """
    cells: dict[Key, Cell] = {}

    def add(task: str, model: str, methods: tuple[str, ...], bits: tuple[str, ...], seeds: tuple[int, ...], axes: Axes) -> None:
        if FP in methods:
            cell = make_cell(grid, task, model, None, options)
            cells.setdefault(cell.key, cell)
        for width, seed, method in itertools.product(bits or (None,), seeds, [name for name in methods if name != FP]):
            if changes_model_only(method):
                w_bits, a_bits = OFF, OFF
            elif width is not None:
                w_bits, a_bits = parse_bits(width)
            else:
                continue
            own = {"w_bits": w_bits, "a_bits": a_bits, "seed": seed}
            base = make_cell(grid, task, model, make_recipe(method, grid.overrides, own), options)
            if base.key not in cells:
                cells.update((cell.key, cell) for cell in with_points(base, axes, grid.overrides))

    for task, part in grid.tasks.items():
        if filters.tasks is not None and task not in filters.tasks:
            continue
        here = (*part.models, *part.available)
        for model in part.models if filters.models is None else [name for name in here if name in filters.models]:
            add(task, model, filters.methods or grid.methods, filters.bits or grid.bits, filters.seeds or grid.seeds,
                chosen_axes(grid, filters))  # fmt: skip
            for extra in grid.extra:
                if extra.task == task and model in extra.models:
                    add(task, model, _keep(extra.methods, filters.methods), _keep(extra.bits, filters.bits),
                        _keep(extra.seeds, filters.seeds), {})  # fmt: skip
    return list(cells.values())


def _keep(values: tuple[T, ...], wanted: tuple[T, ...] | None) -> tuple[T, ...]:
    return values if wanted is None else tuple(value for value in values if value in wanted)
