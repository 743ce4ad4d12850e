"""Making the engine that a run asks for, and settling what depends on it."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import RunOptions
from benchmarks.engines.base import Engine
from benchmarks.engines.options import EngineOptions
from benchmarks.runner import MakeEngine
from fimaq_core.errors import FimaqError


def settled(options: RunOptions, how: EngineOptions, device: str, threads: int | None) -> RunOptions:
    """Return ``options`` with the device that cells run on, and with paths that hold wherever they run.

    Args:
        options: of the run.
        how: of its engine. Ray is started or connected to here.
        device, threads: as the user or the profile says it.

    Raises:
        FimaqError: there is no such device, or no such cluster.
    """
    if not re.fullmatch(r"cpu|auto|mps|cuda(:\d+)?", device):
        raise FimaqError(f"Unknown device '{device}': use cpu, cuda, cuda:N or auto.")
    if how.name == "local":
        if how.ray_address:
            raise FimaqError("A Ray address is of use to the Ray engine only: add --engine ray (ENGINE=ray).")
        return dataclasses.replace(options, device=_device(device))
    from benchmarks.engines.ray_cluster import connect, cuda_in_cluster

    if device == "mps" or ":" in device:
        raise FimaqError(f"Device '{device}': Ray gives each cell a GPU of its own, so say cuda, cpu or auto.")
    gpus = None
    if not how.ray_address:
        device = _device(device)
        gpus = _visible_gpus() if device == "cuda" else 0
    # A cluster of this machine's own has as many cores as are asked for, whatever there are.
    connect(how.ray_address, None if how.jobs is None else how.jobs * (threads or 1), gpus)
    if device == "auto":
        device = "cuda" if cuda_in_cluster() else "cpu"
        print(f"Device: {device}.")
    data = {place.name: getattr(options.data, place.name) for place in dataclasses.fields(options.data)}
    return dataclasses.replace(
        options,
        device=device,
        results=options.results.absolute(),
        weights=None if options.weights is None else options.weights.absolute(),
        data=type(options.data)(**{name: None if path is None else path.absolute() for name, path in data.items()}),
    )


def engine_maker(options: RunOptions, how: EngineOptions, threads: int | None, jobs: int | None, logs: Path) -> MakeEngine:
    """Return what makes the engine.

    Args:
        options: settled.
        how: of the engine.
        threads: CPU threads of a cell; None leaves the libraries' choice.
        jobs: cells at a time, as the profile says; None if it does not.
        logs: folder for what cells print.
    """
    device = str(options.device)

    def make(cells: int, imports: Sequence[str]) -> Engine:
        if how.name == "ray":
            from benchmarks.engines.ray_engine import RayEngine

            most = min(how.jobs or cells, cells)
            return RayEngine(device, threads, options.results / "runs", logs, imports, how.gpus_per_cell, most)
        from benchmarks.engines.local import LocalEngine, default_jobs

        return LocalEngine(min(how.jobs or jobs or default_jobs(threads, device), cells), threads, logs, imports)

    return make


def _device(device: str) -> str:
    """Resolve ``auto`` and refuse a GPU that is not there. Only for runs: it costs the import of torch."""
    if device == "cpu":
        return device
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    if device == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
        note = f": no GPU is visible to PyTorch{limit}, and this grid takes very long without one"
        print(f"Device: {chosen}{'' if chosen == 'cuda' else note}.")
        return chosen
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise FimaqError(
            f"Device '{device}': PyTorch sees no GPU here{limit}. Use cpu, or install a driver and PyTorch with CUDA."
        )
    return device


def _visible_gpus() -> int:
    """Number of GPUs that PyTorch can use here.

    ``CUDA_VISIBLE_DEVICES`` may hide some of them, or all of them by -1, which Ray would count as one.
    """
    import torch

    return torch.cuda.device_count()
