"""A cell of a grid, and the functions of the tasks that the benchmarks call."""

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

#: The metric that tables and progress show for each task; the CSV files have all metrics.
MAIN_METRIC = {"classification": "top1", "retrieval": "R@1", "detection": "AP_box"}

Key = tuple[str, str, str, str, int, int, int | None, str]


class CellName(NamedTuple):
    """Identity in the grid of all cells that differ only in the seed; see :class:`Cell`."""

    section: str
    model: str
    scope: str
    method: str
    bits: str
    point: str


@dataclass(frozen=True)
class Places:
    """Folders of data sets, for sections whose models have no data of their own."""

    imagenet: Path | None = None
    coco: Path | None = None
    flickr: Path | None = None

    def of(self, data: str) -> Path | None:
        """Return the folder that a section names; None for ``own``, and if it is not given."""
        return getattr(self, data) if data != "own" else None


@dataclass(frozen=True)
class RunOptions:
    """Settings of the command line; None takes the setting of the grid."""

    results: Path = Path("results")  #: root of all files that a run writes
    data: Places = Places()
    weights: Path | None = None  #: folder with local checkpoints
    device: str | None = None
    threads: int | None = None  #: CPU threads per cell
    force: bool = False  #: remove earlier results of the cells first
    placement: Literal["device", "host", "disk"] | None = None
    engine: Literal["local", "ray"] = "local"  #: executor of the cells
    jobs: int | None = None  #: cells at a time
    ray_address: str = ""  #: ``host:port`` of a running Ray cluster; empty: a cluster of this run
    gpus_per_cell: float = 1.0  #: share of a GPU that Ray gives to a cell
    retries: int = 3  #: attempts in a row that may end with a dead process and no progress


@dataclass(frozen=True)
class Cell:
    """Measurement of a model with a method, bits and a seed.

    Full precision has 32/32 bits, no seed and no scope.

    Example:
        >>> cell = expand(load_grid("demo"), Filters(), RunOptions())[2]
        >>> cell.label
        'demo_vit rtn w4a4 seed 1'
    """

    section: str  #: label of its section in the grid
    task: str
    model: str
    method: str
    w_bit: int
    a_bit: int
    seed: int | None
    request: CellRequest
    scope: str = ""  #: quantized part of the model; empty where the grid does not name it
    point: str = ""  #: axis point (``k=15``); empty for the grid's own settings
    #: (axis, point) pairs of the cell in tables of axes; the own settings may lie on several axes.
    places: tuple[tuple[str, str], ...] = ()

    @cached_property
    def key(self) -> Key:
        """Identity of the cell in its grid."""
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
        """End of names that states the scope, such as ``" [vision]"``; empty without scope."""
        return f" [{self.scope}]" if self.scope else ""

    @cached_property
    def subject(self) -> str:
        """The model with its scope: methods are compared on the same subject."""
        return f"{self.model}{self.mark}"

    @property
    def label(self) -> str:
        """Name in messages."""
        place = "" if self.section == self.task else f"{self.section} "
        if self.request.recipe is None:
            return f"{place}{self.model} {self.method}"
        point = f" {self.point}" if self.point else ""
        return f"{place}{self.subject} {self.method} {self.bits}{point} seed {self.seed}"


def _run_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    from tasks.common.cell.run import run_cell  # imports PyTorch

    return run_cell(request, on_progress)


def _nothing(*_: object) -> list[str]:
    return []


@dataclass(frozen=True)
class Adapter:
    """Functions of the tasks that the benchmarks call; tests put in their own."""

    #: Measures a cell and returns the path of its record. Processes import it by its name.
    run_cell: Callable[[CellRequest, OnProgress], Path]
    #: Returns the folder of a cell without running anything.
    planned_folder: Callable[[CellRequest], Path]
    #: Returns missing data and weights of a cell.
    preflight: Callable[[CellRequest], list[Missing]]
    #: Describes the finished work of an unfinished cell with this folder.
    cached: Callable[[CellRequest, Path], list[str]] = _nothing
    #: Heavy modules that a cell imports; a process may import them beforehand.
    imports: Callable[[CellRequest], Sequence[str]] = _nothing


def default_adapter() -> Adapter:
    """Return the adapter of the real tasks."""
    return Adapter(
        _run_cell,
        identity.planned_folder,
        identity.preflight,
        identity.cached,
        lambda request: ("torch", "tasks.common.cell.run", f"tasks.{request.task}.task"),
    )


def known_folder(cell: Cell, adapter: Adapter) -> Path | None:
    """Return the cell's folder; None while data or weights for its identity are missing."""
    try:
        return adapter.planned_folder(cell.request)
    except FimaqError:
        return None


def finished(cell: Cell, adapter: Adapter) -> tuple[ResultRecord, Path] | None:
    """Return the cell's record and its folder; None if there is no readable record."""
    folder = known_folder(cell, adapter)
    if folder is None or not (folder / "result.json").is_file():
        return None
    try:
        return read_record(folder / "result.json"), folder
    except FimaqError:
        return None
