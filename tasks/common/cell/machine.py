"""Processor and limits of this machine, without PyTorch."""

import platform
from pathlib import Path

#: Folder of the control groups, and the file that names the groups of this process.
CGROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: Limit (bytes) from which version 1 of control groups means "no limit".
_UNLIMITED = 2**60


def processor() -> str:
    """Return the processor's model name, or its architecture if the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def container_limits(proc: Path = OWN_GROUP, groups: Path = CGROUPS) -> dict[str, float | None]:
    """Return the smallest limits of the process's control groups, version 1 or 2.

    ``proc`` is the file that names the groups of the process; ``groups`` is the folder of all
    groups. Returns ``memory`` (bytes) and ``cores``; None means no limit.
    """
    memory: list[float] = []
    cores: list[float] = []
    lines = proc.read_text(encoding="ascii").splitlines() if proc.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        for controller in controllers.split(","):
            # A container may show its own group as the top folder, not at the group's path.
            own, top = groups / controller / path.strip("/"), groups / controller
            for folder in {own, *own.parents, top, *top.parents}:
                if groups not in (folder, *folder.parents):
                    continue
                for name in ("memory.max", "memory.limit_in_bytes"):
                    memory += [value for value in _numbers(folder / name) if value < _UNLIMITED]
                share = _numbers(folder / "cpu.max")
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"):
                    share += _numbers(folder / name)
                if len(share) == 2 and share[0] > 0:
                    cores.append(share[0] / share[1])
    return {"memory": min(memory, default=None), "cores": min(cores, default=None)}


def _numbers(file: Path) -> list[float]:
    """Return the numbers in ``file``; an empty list if it is absent or says ``max``."""
    try:
        return [float(word) for word in file.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []
