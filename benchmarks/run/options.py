"""Where cells run, as the command line says it: the executor, its options, the device."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.grid.cell import RunOptions
from benchmarks.run.executor import Executor
from fimaq_core.errors import FimaqError

#: Attempts in a row that may end with a dead process and get no further.
RETRIES = 3


@dataclass(frozen=True)
class ExecutorOptions:
    """The options of ``run`` about where cells run.

    Attributes:
        name: ``local`` or ``ray``.
        jobs: cells at a time. None: as the profile says, else as the machine or cluster allows.
        ray_address: ``host:port`` of a running Ray cluster; empty for one that ends with the run.
        gpus_per_cell: share of a GPU that a cell gets from Ray.
        retries: see `benchmarks.run.runner.Attempts`.
    """

    name: Literal["local", "ray"] = "local"
    jobs: int | None = None
    ray_address: str = ""
    gpus_per_cell: float = 1.0
    retries: int = RETRIES

    @property
    def flags(self) -> list[tuple[str, object]]:
        """The options that differ from the defaults, as a command line gives them."""
        given = [
            ("--engine", self.name, "local"),
            ("--ray-address", self.ray_address, ""),
            ("--jobs", self.jobs, None),
            ("--gpus-per-cell", f"{self.gpus_per_cell:g}", "1"),
            ("--retries", self.retries, RETRIES),
        ]
        return [(flag, value) for flag, value, usual in given if value != usual]


def settled(
    options: RunOptions, how: ExecutorOptions, device: str, threads: int | None
) -> RunOptions:  # fmt: skip
    """Return ``options`` with the device that cells run on.

    Args:
        options: of the run.
        how: of its executor. Ray is started or connected to here.
        device, threads: as the user or the profile says it.

    Raises:
        FimaqError: there is no such device, or no such cluster.
    """
    if not re.fullmatch(r"cpu|auto|mps|cuda(:\d+)?", device):
        raise FimaqError(f"Unknown device '{device}': use cpu, cuda, cuda:N or auto.")
    if how.name == "local":
        if how.ray_address:
            advice = "add --engine ray (ENGINE=ray)."
            raise FimaqError(f"A Ray address is of use to the Ray engine only: {advice}")
        return replace(options, device=_device(device))
    from benchmarks.run.ray import connect, nodes

    if device == "mps" or ":" in device:
        advice = "Ray gives each cell a GPU of its own, so say cuda, cpu or auto."
        raise FimaqError(f"Device '{device}': {advice}")
    gpus = None
    if not how.ray_address:
        device = _device(device)
        gpus = 0
        if device == "cuda":
            import torch

            # CUDA_VISIBLE_DEVICES may hide all GPUs by -1, which Ray would count as one.
            gpus = torch.cuda.device_count()
    # A cluster on this machine has as many cores as are asked for, whatever there are.
    connect(how.ray_address, how.jobs and how.jobs * (threads or 1), gpus)
    if device == "auto":
        device = "cuda" if any(node.gpus for node in nodes()) else "cpu"
        print(f"Device: {device}.")
    return replace(options, device=device)


def make_executor(
    options: RunOptions, how: ExecutorOptions, threads: int | None, jobs: int | None, logs: Path,
    cells: int, imports: Sequence[str],
) -> Executor:  # fmt: skip
    """Return the executor for so many ``cells``, which need the modules ``imports``.

    Args:
        options, how: of the run, settled, and of its executor.
        threads, jobs: CPU threads of a cell, and cells at a time as the profile says it.
        logs: folder for the output of cells.
    """
    device = str(options.device)
    if how.name == "ray":
        from benchmarks.run.ray import RayExecutor

        gpus = how.gpus_per_cell if device == "cuda" else 0.0
        most = min(how.jobs or cells, cells)
        return RayExecutor(options.results / "runs", logs, threads, gpus, most)
    from benchmarks.run.local import LocalExecutor, default_jobs

    count = min(how.jobs or jobs or default_jobs(threads, device), cells)
    slots = {f"worker {slot}": logs / f"worker-{slot}.log" for slot in range(1, count + 1)}
    return LocalExecutor(slots, threads, imports)


def _device(device: str) -> str:
    """Resolve ``auto`` and refuse a GPU that is not there. Only for runs: it imports torch."""
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
