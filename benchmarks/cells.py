"""A cell of a grid, and the functions of a task adapter that the harness needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from fimaq_core.errors import FimaqError
from fimaq_core.progress import Report
from fimaq_core.recipe import OFF, Recipe
from tasks.common.record import ResultRecord, bits_name, read_record
from tasks.common.request import CellRequest, DataRequest, Missing, ModelRequest

if TYPE_CHECKING:
    from benchmarks.schema import Grid

#: The metric that a task's tables and progress show; the CSV has all.
MAIN_METRIC = {"classification": "top1", "retrieval": "R@1", "detection": "AP_box"}

Key = tuple[str, str, str, str, int, int, int | None, str]


class CellName(NamedTuple):
    """Identity of a grid's cells that differ in nothing but the seed; see :class:`Cell`."""

    section: str
    model: str
    scope: str
    method: str
    bits: str
    point: str


@dataclass(frozen=True)
class Places:
    """Folders of data sets, for sections whose models do not bring their data along."""

    imagenet: Path | None = None
    coco: Path | None = None
    flickr: Path | None = None

    def of(self, data: str) -> Path | None:
        """The folder that a section asks for by name; None for ``own``, or where it was not given."""
        return getattr(self, data) if data != "own" else None


@dataclass(frozen=True)
class RunOptions:
    """What the command line says beside the grid.

    Attributes:
        results: root of everything a run writes.
        data: folders of data sets.
        weights: folder with local checkpoints.
        device: replaces the grid's device; None keeps it.
        threads: replaces the grid's threads; None keeps them.
        force: remove what is there of the cells before they are measured.
        placement: replaces the sections' placement of what blocks take in and give; None keeps it.
        rehearsal: whether cells are rehearsed, see :mod:`benchmarks.rehearsal`.
    """

    results: Path = Path("results")
    data: Places = Places()
    weights: Path | None = None
    device: str | None = None
    threads: int | None = None
    force: bool = False
    placement: Literal["device", "host", "disk"] | None = None
    rehearsal: bool = False


@dataclass(frozen=True)
class Cell:
    """One measurement: a model, a method, bits and a seed. Full precision has 32/32 bits, no seed and no scope.

    Attributes:
        section: label of its section in the grid.
        scope: what of the model is quantized, as the grid says it; empty where it does not.
        point: name of the axis point (``k=15``) in a grid with axes; empty for the grid's own settings.
        places: (axis, point) of every place it takes in the tables of axes: the grid's own settings may lie on several.
    """

    section: str
    task: str
    model: str
    method: str
    w_bit: int
    a_bit: int
    seed: int | None
    request: CellRequest
    scope: str = ""
    point: str = ""
    places: tuple[tuple[str, str], ...] = ()

    @cached_property
    def key(self) -> Key:
        """Identity of the cell within its grid."""
        return (self.section, self.model, self.scope, self.method, self.w_bit, self.a_bit, self.seed, self.point)

    @property
    def name(self) -> CellName:
        """Identity of the cell without its seed."""
        return CellName(self.section, self.model, self.scope, self.method, self.bits, self.point)

    @cached_property
    def bits(self) -> str:
        """Short name of the bit-widths."""
        return bits_name(self.w_bit, self.a_bit)

    @property
    def mark(self) -> str:
        """The scope as names end with it, ``" [vision]"``; empty without one."""
        return f" [{self.scope}]" if self.scope else ""

    @cached_property
    def subject(self) -> str:
        """The model and what of it is quantized: what methods are compared on."""
        return f"{self.model}{self.mark}"

    @property
    def label(self) -> str:
        """Name for people."""
        place = "" if self.section == self.task else f"{self.section} "
        if self.request.recipe is None:
            return f"{place}{self.model} {self.method}"
        point = f" {self.point}" if self.point else ""
        return f"{place}{self.subject} {self.method} {self.bits}{point} seed {self.seed}"


def _nothing(*_: object) -> list[str]:
    return []


@dataclass(frozen=True)
class Adapter:
    """What the harness asks of the tasks; tests put their own in.

    Attributes:
        run_cell: measures one cell and returns the path of its record. Must be importable by name (worker processes).
        planned_folder: the cell's folder, without running anything.
        preflight: what the cell needs and is not there.
        cached: what an unfinished cell with this folder would find done, for people.
        imports: heavy modules that measuring the cell imports: a host imports them once for all its cells.
    """

    run_cell: Callable[[CellRequest, Report], Path]
    planned_folder: Callable[[CellRequest], Path]
    preflight: Callable[[CellRequest], list[Missing]]
    cached: Callable[[CellRequest, Path], list[str]] = _nothing
    imports: Callable[[CellRequest], Sequence[str]] = _nothing


def default_adapter() -> Adapter:
    """Return the real one. Each part imports what it needs when called: most commands run nothing."""
    return Adapter(_run_cell, _planned_folder, _preflight, _cached, _imports)


def _run_cell(request: CellRequest, report: Report) -> Path:
    from tasks.common.run import run_cell

    return run_cell(request, report)


def _planned_folder(request: CellRequest) -> Path:
    from tasks.common.plan import planned_folder

    return planned_folder(request)


def _preflight(request: CellRequest) -> list[Missing]:
    from tasks.common.plan import preflight

    return preflight(request)


def _cached(request: CellRequest, folder: Path) -> list[str]:
    from tasks.common.plan import cached

    return cached(request, folder)


def _imports(request: CellRequest) -> Sequence[str]:
    return ("torch", "tasks.common.run", f"tasks.{request.task}.task")


def make_cell(grid: Grid, section: str, model: str, recipe: Recipe | None, options: RunOptions) -> Cell:
    """Return the cell of ``model`` with ``recipe`` (None: full precision) under the settings of the grid and its section."""
    part, task = grid.tasks[section], grid.task_of(section)
    request = CellRequest(
        task=task,
        model=ModelRequest(name=model, weights_folder=options.weights),
        data=DataRequest(path=options.data.of(part.data), evaluation=part.evaluation),
        recipe=recipe,
        variant=None if recipe is None else grid.variant,
        results=options.results / "runs",
        device=options.device or grid.device,
        threads=options.threads or grid.threads,
        placement=options.placement or part.placement,
    )
    if recipe is None:
        return Cell(section, task, model, "fp", OFF, OFF, None, request)
    bits = recipe.w_bits, recipe.a_bits
    return Cell(section, task, model, recipe.method, *bits, recipe.seed, request, scope=recipe.scope or "")


def make_point(base: Cell, axis: str, point: str, recipe: Recipe) -> Cell:
    """Return the cell beside ``base`` with the ``recipe`` of a point of an axis; its variant names both."""
    from tasks.common.plan import variant_name

    name = f"{axis}={point}"
    assert base.request.recipe is not None
    # The scope comes last in a variant's name, and once.
    settings = replace(base.request, recipe=base.request.recipe.model_copy(update={"scope": None}))
    request = replace(base.request, recipe=recipe, variant=f"{variant_name(settings)} {name}")
    return replace(base, request=request, point=name, places=((axis, point),))


def finished(cell: Cell, adapter: Adapter) -> tuple[ResultRecord, Path] | None:
    """Return the cell's record and its folder, or None if there is no record that can be read.

    Where not even the cell's identity can be known yet (data or weights are missing), it is not finished either.
    """
    folder = known_folder(cell, adapter)
    record = None if folder is None else record_in(folder)
    return None if folder is None or record is None else (record, folder)


def known_folder(cell: Cell, adapter: Adapter) -> Path | None:
    """Return the cell's folder; None while its identity cannot be known."""
    try:
        return adapter.planned_folder(cell.request)
    except FimaqError:
        return None


def record_in(folder: Path) -> ResultRecord | None:
    """Return the record in a cell's folder; None if there is none that can be read."""
    path = folder / "result.json"
    try:
        return read_record(path) if path.is_file() else None
    except FimaqError:
        return None


def finished_record(cell: Cell, adapter: Adapter) -> ResultRecord | None:
    """Return the cell's record, or None; see :func:`finished`."""
    found = finished(cell, adapter)
    return None if found is None else found[0]
