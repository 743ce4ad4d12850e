"""A cell of a grid, and the functions of a task adapter that the harness needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from fimaq_core.errors import FimaqError
from fimaq_core.progress import OnProgress
from tasks.common.cell import identity
from tasks.common.record import ResultRecord, bits_name, read_record
from tasks.common.request import CellRequest, Missing

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
        """The folder that a section asks for by name; None for ``own``, or if not given."""
        return getattr(self, data) if data != "own" else None


@dataclass(frozen=True)
class RunOptions:
    """Settings of the command line. None keeps the grid's."""

    results: Path = Path("results")  #: root of everything that a run writes
    data: Places = Places()
    weights: Path | None = None  #: folder with local checkpoints
    device: str | None = None
    threads: int | None = None
    force: bool = False  #: remove what is there of the cells before they are measured
    placement: Literal["device", "host", "disk"] | None = None
    rehearsal: bool = False  #: cells are rehearsed, see :mod:`benchmarks.rehearsal`


@dataclass(frozen=True)
class Cell:
    """One measurement: a model, a method, bits and a seed.

    Full precision has 32/32 bits, no seed and no scope.
    """

    section: str  #: label of its section in the grid
    task: str
    model: str
    method: str
    w_bit: int
    a_bit: int
    seed: int | None
    request: CellRequest
    scope: str = ""  #: what of the model is quantized; empty where the grid does not say it
    point: str = ""  #: axis point (``k=15``); empty for the grid's own settings
    #: (axis, point) of its places in the tables of axes: the own settings may lie on several.
    places: tuple[tuple[str, str], ...] = ()

    @cached_property
    def key(self) -> Key:
        """Identity of the cell within its grid."""
        bits = self.w_bit, self.a_bit
        return self.section, self.model, self.scope, self.method, *bits, self.seed, self.point

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
    """Functions of the tasks that the harness calls; tests put their own in."""

    #: Measures a cell and returns the path of its record. Importable by name in processes.
    run_cell: Callable[[CellRequest, OnProgress], Path]
    planned_folder: Callable[[CellRequest], Path]  #: of a cell, without running anything
    preflight: Callable[[CellRequest], list[Missing]]  #: what the cell needs and is not there
    #: Describes, for people, what is done of an unfinished cell with this folder.
    cached: Callable[[CellRequest, Path], list[str]] = _nothing
    #: Heavy modules that measuring the cell imports: a process may import them beforehand.
    imports: Callable[[CellRequest], Sequence[str]] = _nothing


def default_adapter() -> Adapter:
    """Return the real one."""
    return Adapter(
        _run_cell, identity.planned_folder, identity.preflight, identity.cached, _imports
    )


def _run_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    from tasks.common.cell.run import run_cell  # imports PyTorch

    return run_cell(request, on_progress)


def _imports(request: CellRequest) -> Sequence[str]:
    return ("torch", "tasks.common.cell.run", f"tasks.{request.task}.task")


def finished(cell: Cell, adapter: Adapter) -> tuple[ResultRecord, Path] | None:
    """Return the cell's record and its folder, or None if there is no record that can be read.

    A cell whose data or weights are missing, so that its folder is not known, is not finished.
    """
    folder = known_folder(cell, adapter)
    record = folder and record_in(folder)
    return (record, folder) if folder and record else None


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
