"""Device, software, stage times and peak memory of a run."""

import contextlib
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

import fimaq_core
from fimaq_core.errors import RecipeError
from tasks.common.cell.machine import processor
from tasks.common.record import Environment

_LIBS = "torch", "torchvision", "timm", "open_clip_torch", "transformers", "numpy", "safetensors"


def resolve_device(name: str) -> torch.device:
    """Return the device called ``name``; never falls back to another one. Raises RecipeError."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"Unknown device '{name}': give cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"Device '{name}' is not supported: give cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RecipeError(f"Device '{name}' is not available (CUDA devices: {count}). Use cpu.")
    return device


def describe(device: torch.device) -> Environment:
    """Return versions, git revision and device of this process."""
    versions = {"python": platform.python_version(), "fimaq": fimaq_core.__version__}
    for package in _LIBS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    cuda, limit = device.type == "cuda", os.environ.get("ONEDNN_MAX_CPU_ISA")
    capability = torch.backends.cpu.get_cpu_capability()  # of PyTorch's CPU kernels
    return Environment(
        versions=versions,
        git_revision=_git_revision(),
        device=torch.cuda.get_device_name(device) if cuda else f"{device.type} {processor()}",
        instructions=capability + (f", oneDNN up to {limit}" if limit else ""),
        threads=torch.get_num_threads(),
    )


def _git_revision() -> str:
    """Return the commit, plus ``+changes`` if files differ; ``unknown`` without a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    root = Path(__file__).resolve().parents[3]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


class StageClock:
    """Measures time and peak memory of consecutive stages on ``device``.

    Example::

        clock = StageClock(torch.device("cpu"))
        model = load()
        clock.lap("load")  # clock.seconds["load"], clock.memory["load"]
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}  # wall-clock time by stage; repeated stages add up
        self.memory: dict[str, int] = {}  # peak bytes by stage; the largest of repeated stages
        reset_peak_memory(device)
        self._start = time.monotonic()

    def lap(self, stage: str) -> None:
        """End the present stage, named ``stage``, and start the next one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - self._start
        self.memory[stage] = max(self.memory.get(stage, 0), peak_memory(self._device))
        reset_peak_memory(self._device)
        self._start = time.monotonic()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak for :func:`peak_memory`; on the CPU this works on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # only Linux has the file; some containers forbid writing
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Return the peak (bytes) since :func:`reset_peak_memory`.

    On CUDA this is the memory of tensors, on the CPU that of the process. If the system cannot
    reset the peak, it is the peak since the process began.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a child inherits its parent's
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Return the resident memory (bytes) of this process now."""
    return int(psutil.Process().memory_info().rss)
