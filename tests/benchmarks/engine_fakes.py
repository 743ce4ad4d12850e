"""Cells that fail as the file ``plan.json`` beside the results says."""

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

#: Seconds after which a wait counts as hanging. They are many, since a busy machine is slow.
HANG = 300.0


def until(condition: Callable[[], object]) -> None:
    """Wait until ``condition`` is true; AssertionError after `HANG` seconds."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@contextmanager
def ray_folder() -> Iterator[Path]:
    """Make a folder for Ray's files, which is removed afterwards.

    Paths of sockets must be short, so the folder is not in pytest's folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="fimaq-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def name_of(request: CellRequest) -> str:
    """Return the name of a cell, such as ``demo_vit rtn w3a3``."""
    recipe = request.recipe
    return (
        f"{request.model.name} fp"
        if recipe is None
        else f"{request.model.name} {recipe.method} {recipe.bits_name}"
    )


def run_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    """Write a fake record, after the fault in the plan for this attempt at this cell, if any.

    Each attempt adds a line to ``attempts.txt``: the ids of the process and of its parent, the
    cell, ``eval_batch`` and ``placement``.
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
    """Return the lines of all attempts so far in order, split into words."""
    log = root / "attempts.txt"
    return [line.split() for line in log.read_text().splitlines()] if log.is_file() else []


def tries(root: Path, name: str) -> int:
    """Return the number of attempts at a cell."""
    return sum(" ".join(words[2:-2]) == name for words in attempts(root))


ADAPTER = Adapter(run_cell, fakes.planned_folder, fakes.preflight)
