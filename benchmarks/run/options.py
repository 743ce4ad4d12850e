"""Request of a run, and the device and executor that it gets."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.grid.cell import Adapter, Cell, RunOptions, default_adapter
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import Grid
from benchmarks.published.table import PublishedTable
from benchmarks.run.executor import Executor
from benchmarks.run.local import LocalExecutor, default_jobs
from fimaq_core.errors import FimaqError


@dataclass(frozen=True)
class RunRequest:
    """Grid that a command runs, and the options of the command."""

    grid: Grid  #: of a profile or of a published table
    filters: Filters = field(default_factory=Filters)
    options: RunOptions = field(default_factory=RunOptions)
    adapter: Adapter = field(default_factory=default_adapter)
    table: PublishedTable | None = None  #: its layout replaces the tables of a profile
    report: bool = False  #: also write the HTML report

    @property
    def device(self) -> str:
        """Device of the command line, or else of the grid."""
        return self.options.device or self.grid.device

    @property
    def threads(self) -> int | None:
        """CPU threads per cell."""
        return self.options.threads or self.grid.threads

    @property
    def jobs(self) -> int:
        """Cells at a time on this machine."""
        jobs = self.options.jobs or self.grid.jobs
        return jobs or default_jobs(self.threads, self.device)

    def cells(self) -> list[Cell]:
        """Return the cells that the filters keep; raise FimaqError if there is none."""
        cells = expand(self.grid, self.filters, self.options)
        if not cells:
            raise FimaqError("The filters leave no cell: use fewer filters or other values.")
        return cells


def settled(request: RunRequest) -> RunRequest:
    """Return the request with the device of its cells; ``auto`` becomes ``cuda`` or ``cpu``.

    Starts Ray, or connects to Ray, if the cells run there.

    Raises:
        FimaqError: there is no such device, or no such cluster.
    """
    options, device = request.options, request.device
    if not re.fullmatch(r"cpu|auto|mps|cuda(:\d+)?", device):
        raise FimaqError(f"Unknown device '{device}': use cpu, cuda, cuda:N or auto.")
    if options.engine == "local":
        if options.ray_address:
            raise FimaqError("A Ray address needs the Ray engine: add --engine ray (ENGINE=ray).")
        device = _device(device)
    else:
        device = _ray_device(request, device)
    return replace(request, options=replace(options, device=device))


def _ray_device(request: RunRequest, device: str) -> str:
    from benchmarks.run.cluster import connect, nodes

    options = request.options
    if device == "mps" or ":" in device:
        advice = "Ray gives each cell a GPU of its own, so use cuda, cpu or auto."
        raise FimaqError(f"Device '{device}': {advice}")
    gpus = None
    if not options.ray_address:
        device = _device(device)
        gpus = 0
        if device == "cuda":
            import torch

            # Ray itself would count CUDA_VISIBLE_DEVICES=-1, which hides all GPUs, as one GPU.
            gpus = torch.cuda.device_count()
    # A cluster on this machine gets the cores that the run asks for, even if there are fewer.
    connect(options.ray_address, options.jobs and options.jobs * (request.threads or 1), gpus)
    if device == "auto":
        device = "cuda" if any(node.gpus for node in nodes()) else "cpu"
        print(f"Device: {device}.")
    return device


def make_executor(request: RunRequest, logs: Path, cells: int, imports: Sequence[str]) -> Executor:
    """Return the executor of a settled request for a number of cells.

    ``logs`` is the folder of its log files. ``imports`` are modules that local processes import
    before the cells start.
    """
    options, device = request.options, request.device
    if options.engine == "ray":
        from benchmarks.run.ray import RayExecutor

        gpus = options.gpus_per_cell if device == "cuda" else 0.0
        most = min(options.jobs or cells, cells)
        return RayExecutor(options.results / "runs", logs, request.threads, gpus, most)
    count = min(request.jobs, cells)
    slots = {f"worker {slot}": logs / f"worker-{slot}.log" for slot in range(1, count + 1)}
    return LocalExecutor(slots, request.threads, imports)


def _device(device: str) -> str:
    """Return the device, with ``auto`` resolved; raise FimaqError if PyTorch has no such GPU."""
    if device == "cpu":
        return device
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    there = torch.cuda.is_available()
    if device == "auto":
        note = f": no GPU is visible to PyTorch{limit}, and this grid takes very long without one"
        print("Device: cuda." if there else f"Device: cpu{note}.")
        return "cuda" if there else "cpu"
    if device.startswith("cuda") and not there:
        advice = "Use cpu, or install a driver and PyTorch with CUDA."
        raise FimaqError(f"Device '{device}': PyTorch sees no GPU here{limit}. {advice}")
    return device
