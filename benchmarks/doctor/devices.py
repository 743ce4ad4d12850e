"""PyTorch, GPUs, processor and memory, limits of a container, and programs that some parts use."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from benchmarks.doctor.findings import Finding, size_text
from benchmarks.doctor.packages import SETUP

_PROBE = Path(__file__).with_name("torch_probe.py")
#: Where limits of this process's group are, and who has which.
CGROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: From here on cgroup v1 means no limit.
_UNLIMITED = 2**60


def torch_facts(seconds: float = 180.0) -> tuple[dict[str, Any] | None, str]:
    """Return what PyTorch says, and why it says nothing; it is asked in another process, since it may crash while it loads."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE.read_text(encoding="utf-8")], capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"no answer within {seconds:.0f} s"
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found, ""
    except (IndexError, json.JSONDecodeError):
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"its process ended with {done.returncode}"


def torch_findings(facts: Mapping[str, Any] | None, problem: str) -> Iterator[Finding]:
    """Say what PyTorch sees."""
    if facts is None:
        yield Finding("torch", "problem", f"PyTorch does not load: {problem}", SETUP)
        return
    build = facts["cuda_build"]
    text = f"PyTorch {facts['version']}, {f'built for CUDA {build}' if build else 'built without CUDA'}"
    yield Finding("torch", "ok", text, data=facts)
    driver = _driver()
    for index, device in enumerate(facts["devices"]):
        free = "nothing" if device["free"] is None else size_text(device["free"])
        words = [
            f"cuda:{index}: {device['name']}, {size_text(device['memory'])} ({free} free)",
            f"capability {device['capability']}",
            *([f"driver {driver}"] if driver else []),
        ]
        data, text = {**device, "index": index, "driver": driver}, ", ".join(words)
        if has_kernels(facts["architectures"], device["capability"]):
            yield Finding("gpu", "ok", text, data=data)
        else:
            text += f"; this PyTorch has kernels for {', '.join(facts['architectures'])} only"
            yield Finding("gpu", "note", text, "install a PyTorch that is built for it", data)
    if not facts["devices"]:
        if driver is None:
            yield Finding("gpu", "ok", "no CUDA device", data={"driver": None})
        else:
            why = f"built for CUDA {build}, which needs a newer driver" if build else "built without CUDA"
            text = f"the driver {driver} is there, but PyTorch sees no GPU: is it {why}, or is the device hidden?"
            yield Finding("gpu", "note", text, "update the driver, or look at CUDA_VISIBLE_DEVICES", {"driver": driver})


def has_kernels(architectures: Sequence[str], capability: str) -> bool:
    """Whether a build has kernels for a GPU: machine code of its generation up to its version, or PTX of any before it.

    Args:
        architectures: such as ``sm_90`` and ``compute_120``; empty where nothing is known.
        capability: such as ``9.0``.
    """
    major, minor = map(int, capability.split("."))
    for name in architectures:
        kind, _, digits = name.partition("_")
        version = int("".join(filter(str.isdigit, digits)) or 0)
        own = divmod(version, 10)
        if own <= (major, minor) and (kind == "compute" or own[0] == major):
            return True
    return not architectures


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def machine_findings(facts: Mapping[str, Any] | None, proc: Path = OWN_GROUP, groups: Path = CGROUPS) -> Iterator[Finding]:
    """Examine processor, memory and limits."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    level = facts["cpu_capability"] if facts else None
    data: dict[str, Any] = {"processor": _processor(), "cores": cores, "machine_cores": os.cpu_count(), "vectors": level}
    own = "" if cores == os.cpu_count() else f" of {os.cpu_count()}"
    yield Finding("cpu", "ok", f"{data['processor']}, {cores} cores{own}{f', {level}' if level else ''}", data=data)
    memory = psutil.virtual_memory()
    text = f"{size_text(memory.total)} of memory, {size_text(memory.available)} available"
    yield Finding("memory", "ok", text, data={"total": memory.total, "available": memory.available})
    limits = container_limits(proc, groups)
    words = []
    if limits["memory"] is not None:
        words.append(f"{size_text(limits['memory'])} of memory")
    if limits["cores"] is not None:
        words.append(f"{limits['cores']:g} cores")
    if words:
        less = (limits["memory"] or memory.total) < memory.total or (limits["cores"] or cores) < cores
        fix = "give --jobs: what a container may use is not seen by everything" if less else ""
        text = f"this container may use {' and '.join(words)}"
        yield Finding("container", "note" if less else "ok", text, fix, limits)
    else:
        yield Finding("container", "ok", "no limits of a container", data=limits)


def container_limits(proc: Path = OWN_GROUP, groups: Path = CGROUPS) -> dict[str, float | None]:
    """Return the least ``memory`` (bytes) and ``cores`` that this process's control groups allow; None: no limit."""
    memory: list[float] = []
    cores: list[float] = []
    try:
        lines = proc.read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        for controller in controllers.split(",") if controllers else [""]:
            # In a container the group's own path may not be visible: what is mounted at the top is its own then.
            places = [groups / controller / path.strip("/"), groups / controller]
            for folder in dict.fromkeys(
                place for start in places for place in (start, *start.parents) if groups in (place, *place.parents)
            ):
                memory += [value for name in ("memory.max", "memory.limit_in_bytes") for value in _numbers(folder / name)[:1]]
                limits = _numbers(folder / "cpu.max")
                limits = limits or [*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us")]
                if len(limits) == 2 and limits[0] > 0:
                    cores.append(limits[0] / limits[1])
    limited = [value for value in memory if value < _UNLIMITED]
    return {"memory": min(limited, default=None), "cores": min(cores, default=None)}


def _numbers(file: Path) -> list[float]:
    """Numbers in a file; none where it says ``max`` first, or is not there."""
    try:
        words = file.read_text(encoding="ascii").split()
        return [float(word) for word in words]
    except (OSError, ValueError):
        return []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def program_findings() -> Iterator[Finding]:
    """Look for what single parts of the project use."""
    compiler = next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)
    if compiler:
        yield Finding("compiler", "ok", f"C++ compiler {compiler}: the engine 'compiled' can run", data={"path": compiler})
    else:
        text = "no C++ compiler: on a CPU the engine 'fused' runs instead of 'compiled'"
        yield Finding("compiler", "note", text, "install g++ or clang++", {"path": None})
    if util.find_spec("ray") is not None:
        yield Finding("ray", "ok", f"ray {metadata.version('ray')}: grids can run on several machines")
    else:
        yield Finding("ray", "note", "no ray: grids run on this machine only", SETUP)
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    text = f"browser {browser}" if browser else "no Chromium: tests of the report in a browser cannot run"
    yield Finding("browser", "ok" if browser else "note", text, "" if browser else "install chromium", {"path": browser})
