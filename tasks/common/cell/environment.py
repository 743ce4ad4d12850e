"""Facts about where a run happens, and what it takes."""

import contextlib
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fimaq_core
from fimaq_core.errors import RecipeError
from tasks.common.cell.machine import processor
from tasks.common.record import Environment

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "transformers",
    "numpy",
    "safetensors",
)


def resolve_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        RecipeError: no such device here. Nothing falls back to another device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"Unknown device '{name}': give cpu, cuda or cuda:N.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise RecipeError(
                f"Device '{name}' is not available: PyTorch sees {count} CUDA device(s). Use --device cpu."
            )
    elif device.type != "cpu":
        raise RecipeError(
            f"Device '{name}' is not supported: give cpu, cuda or cuda:N (range search needs float64)."
        )
    return device


def describe(device: torch.device) -> Environment:
    """Versions, git revision and device of this process."""
    versions = {"python": platform.python_version(), "fimaq": fimaq_core.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {processor()}"
    )
    return Environment(
        versions=versions,
        git_revision=git_revision(),
        device=name,
        instructions=instructions(),
        threads=torch.get_num_threads(),
    )


def instructions() -> str:
    """Return the instruction set of PyTorch's CPU kernels, and oneDNN's limit where one is set."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return torch.backends.cpu.get_cpu_capability() + (f", oneDNN up to {limit}" if limit else "")


def git_revision() -> str:
    """Return the checkout's commit, with ``+changes`` where files differ; ``unknown`` without one."""
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
    """Measures stages that follow each other on ``device``, from its making on.

    Attributes:
        seconds: wall-clock time by stage; of those that ran several times the sum.
        memory: peak bytes by stage (:func:`peak_memory`); of those that ran several times the largest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.restart()

    def restart(self) -> None:
        """Leave out what has happened since the last stage ended."""
        reset_peak_memory(self._device)
        self._start = time.monotonic()

    def lap(self, stage: str) -> None:
        """End ``stage``: it is what happened since the one before it ended."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - self._start
        self.memory[stage] = max(self.memory.get(stage, 0), peak_memory(self._device))
        self.restart()


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` count from now on; on the CPU only where the system can (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(
        OSError
    ):  # no such file outside of Linux; some sandboxes refuse to write it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Return peak bytes since :func:`reset_peak_memory`: of tensors on CUDA, of the process on the CPU.

    Where the system cannot reset it, that is the peak of the process so far.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM") or _rusage()  # in the latter a new process has what its parent had


def resident_memory() -> int:
    """Bytes of memory that this process has now; its peak where the system does not tell."""
    return _status("VmRSS") or _rusage()


def _rusage() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _status(key: str) -> int:
    """A number of bytes in Linux's account of this process; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
