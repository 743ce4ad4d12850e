"""Cells that fail in every possible way, as ``plan.json`` beside the results says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import benchmark_fakes as fakes

from benchmarks.grid.cell import Adapter
from fimaq_core.progress import OnProgress, Progress
from tasks.common.cell.lease import Busy
from tasks.common.request import CellRequest

#: Seconds after which a wait is taken to hang. Machines under load are slow, so minutes.
HANG = 300.0


def until(condition: Callable[[], object]) -> None:
    """Wait for ``condition``. Raises AssertionError: it hangs."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@contextmanager
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's files that does not outlive a test.

    Paths of sockets must be short, so it is none of pytest's.
    """
    folder = Path(tempfile.mkdtemp(prefix="fimaq-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def name_of(request: CellRequest) -> str:
    """``demo_vit rtn w3a3``."""
    recipe = request.recipe
    return (
        f"{request.model.name} fp"
        if recipe is None
        else f"{request.model.name} {recipe.method} {recipe.bits_name}"
    )


def run_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    """Measure nothing, after the fault that the plan has for this attempt at this cell, if any.

    Each attempt is a line of ``attempts.txt``: ids of the process and of its parent, cell,
    eval_batch, placement.
    """
    root = request.results.parent
    plan = json.loads((root / "plan.json").read_text()) if (root / "plan.json").is_file() else {}
    log = root / "attempts.txt"
    settings = f"{request.eval_batch} {request.placement}"
    with log.open("a") as file:
        file.write(f"{os.getpid()} {os.getppid()} {name_of(request)} {settings}\n")
    attempt = sum(f" {name_of(request)} " in line for line in log.read_text().splitlines())
    faults = plan.get(name_of(request), [])
    fault = faults[attempt - 1] if attempt <= len(faults) else ""
    on_progress(Progress("calibrate", 0, 1))
    if fault.startswith("further"):
        on_progress(Progress("reconstruct", 1, 9, f"block {attempt}", 0.5))
        fault = fault.removeprefix("further ")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "kill parent":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(HANG)
    if fault == "sleep":
        time.sleep(HANG)
    while fault == "flag" and not (root / "flag").exists():
        time.sleep(0.05)
    if fault == "nap":
        time.sleep(0.5)
    if fault == "memory":
        raise MemoryError("no room")
    if fault == "error":
        raise ValueError("it broke")
    if fault == "busy":
        raise Busy(fakes.planned_folder(request) / "result.json", "process 1 on a far machine")
    fakes.run_cell(request, lambda _: None)
    return fakes.planned_folder(request) / "result.json"


def attempts(root: Path) -> list[list[str]]:
    """The attempts so far, in order, split into words."""
    log = root / "attempts.txt"
    return [line.split() for line in log.read_text().splitlines()] if log.is_file() else []


def tries(root: Path, name: str) -> int:
    """How often a cell was tried."""
    return sum(" ".join(words[2:-2]) == name for words in attempts(root))


ADAPTER = Adapter(run_cell, fakes.planned_folder, fakes.preflight)
