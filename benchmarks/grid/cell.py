"""Cells of grids, their options, and the functions of the tasks that the benchmarks call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from fimaq_core.errors import FimaqError
from fimaq_core.progress import OnProgress
from fimaq_core.recipe import OFF
from tasks.common import registry
from tasks.common.cell import identity
from tasks.common.record import NotMeasured, ResultRecord, bits_name, read_record
from tasks.common.request import CellRequest, Missing

#: Metric of each task that tables and progress show; the CSV files have all metrics.
MAIN_METRIC = {name: registry.main_metric(name) for name in registry.TASKS}
#: Point of cells that measure the export to ONNX of the cell without a point.
EXPORT = identity.ONNX


class CellName(NamedTuple):
    """Name that cells share if they differ only in the seed; fields as in :class:`Cell`."""

    section: str
    model: str
    scope: str
    method: str
    bits: str
    point: str


#: Identity of a cell in its grid: its name and seed.
Key = tuple[CellName, int | None]


@dataclass(frozen=True)
class Places:
    """Folders of data sets, for sections whose models have no data of their own."""

    imagenet: Path | None = None
    coco: Path | None = None
    flickr: Path | None = None

    def of(self, data: str) -> Path | None:
        """Return the folder of a section's ``data``; None for ``own``, and if none is given."""
        return getattr(self, data, None)


@dataclass(frozen=True)
class RunOptions:
    """Options of the command line; None takes the setting of the grid."""

    results: Path = Path("results")  #: folder of all files that a run writes
    data: Places = Places()
    weights: Path | None = None  #: folder with local checkpoints
    device: str | None = None
    threads: int | None = None  #: CPU threads per cell
    force: bool = False  #: remove earlier results of the cells first
    placement: Literal["device", "host", "disk"] | None = None
    engine: Literal["local", "ray"] = "local"  #: executor of the cells
    jobs: int | None = None  #: cells at a time
    ray_address: str = ""  #: ``host:port`` of a running Ray cluster; empty: a cluster of this run
    gpus_per_cell: float = 1.0  #: GPUs that Ray gives to a cell; 0.5: two cells share one
    #: Attempts in a row in which a cell's process may die without progress; 0: one attempt only.
    retries: int = 3


@dataclass(frozen=True)
class Cell:
    """One measurement: a model with a method, bit-widths and a seed.

    Full precision has 32 bits for weights and activations, no seed and no scope.

    Example:
        >>> cell = expand(load_grid("demo"), Filters(), RunOptions())[2]
        >>> cell.label
        'demo_vit rtn w4a4 seed 1'
    """

    section: str  #: label of the cell's section in the grid
    task: str
    model: str
    method: str
    w_bit: int
    a_bit: int
    seed: int | None
    request: CellRequest
    scope: str = ""  #: quantized part of the model; empty where the grid does not name it
    #: Axis point (``k=15``), or :data:`EXPORT`; empty for the grid's own settings.
    point: str = ""
    #: (axis, point) pairs of ablation tables; the grid's own settings may be on several axes.
    axis_points: tuple[tuple[str, str], ...] = ()
    made_by: str = ""  #: command that makes the cell's data and weights; empty: there is none
    home: str = ""  #: section of the cell whose quantized model is evaluated; empty: this cell's

    @cached_property
    def key(self) -> Key:
        """Identity of the cell in its grid."""
        return self.name, self.seed

    @cached_property
    def name(self) -> CellName:
        """Identity of the cell without its seed."""
        return CellName(self.section, self.model, self.scope, self.method, self.bits, self.point)

    @cached_property
    def bits(self) -> str:
        """Short name of the bit-widths: ``fp``, ``w4a4``."""
        return bits_name(self.w_bit, self.a_bit)

    @property
    def row(self) -> str:
        """Method with its point, as rows of tables are named: ``fimaq``, ``fimaq k=15``."""
        return f"{self.method} {self.point}".strip()

    @property
    def needs(self) -> tuple[Key, ...]:
        """Cells whose results this cell uses: full precision; an export's cell; that at home."""
        if self.request.recipe is None:
            return ()
        full = CellName(self.section, self.model, "", "fp", bits_name(OFF, OFF), "")
        exported = self.name._replace(point=""), self.seed
        if self.point == EXPORT:
            return (full, None), exported
        at_home = self.name._replace(section=self.home), self.seed
        return ((full, None), at_home) if self.home else ((full, None),)

    @property
    def mark(self) -> str:
        """Scope as a suffix of names, such as ``" [vision]"``; empty without scope."""
        return f" [{self.scope}]" if self.scope else ""

    @cached_property
    def subject(self) -> str:
        """Model and scope: methods are compared with each other on the same subject."""
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


@dataclass(frozen=True)
class Adapter:
    """Functions of the tasks that the benchmarks call; tests replace them."""

    #: Measures a cell and returns the path of its record. Other processes import it by its name.
    run_cell: Callable[[CellRequest, OnProgress], Path]
    #: Returns the folder of a cell without running anything.
    planned_folder: Callable[[CellRequest], Path]
    #: Returns missing data and weights of a cell.
    preflight: Callable[[CellRequest], list[Missing]]
    #: Names the results in the folder of an unfinished cell that its next run will reuse.
    cached: Callable[[CellRequest, Path], list[str]] = lambda request, folder: []
    #: Slow modules that a cell imports; processes can import them before the cell starts.
    imports: Callable[[CellRequest], Sequence[str]] = lambda request: []


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
    """Return the cell's folder; None if data or weights that decide its name are missing."""
    try:
        return adapter.planned_folder(cell.request)
    except FimaqError:
        return None


def finished(cell: Cell, adapter: Adapter) -> tuple[ResultRecord, Path] | None:
    """Return the cell's record and its folder; None if there is no record.

    Raises CheckpointError if there is a record, but it cannot be read or is of another cell.
    """
    folder = known_folder(cell, adapter)
    if folder is None:
        return None
    try:
        digest = identity.recipe_digest(cell.request)
        return read_record(folder / "result.json", digest), folder
    except NotMeasured:
        return None
