"""Whether many workers stay busy: cells of one second that do the input and output of real ones."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults.audit import Event, read_events

#: Cells of each worker.
ROUNDS = 60


def worker_busy(events: Sequence[Event], workers: int) -> float:
    """Return the share of the workers' time, from the first cell's start to the last one's end, that is spent in cells."""
    begun = {event.cell: event.time for event in events if event.kind == "begun"}
    ended = {event.cell: event.time for event in events if event.kind == "measured"}
    spent = sum(ended[cell] - begun[cell] for cell in ended)
    return spent / (workers * (max(ended.values()) - min(begun.values())))


def measure(folder: Path, workers: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Keep ``workers`` busy by the local engine, and on a Ray cluster of two nodes; return the share of each.

    Args:
        folder: an empty one, for everything that is written.
        workers: cells at a time, an even number.
        say: told what happens.
    """
    from benchmarks.faults.cluster import Cluster

    folder.mkdir(parents=True, exist_ok=True)
    grid = folder / "grid.yaml"
    count = workers * ROUNDS
    # Cells that share nothing: each has a seed of its own.
    grid.write_text(yaml.safe_dump({
        "name": "busy", "tasks": {"classification": {"dataset": "none", "models": ["demo_vit"]}}, "methods": ["rtn"],
        "bits": ["w4a4"], "seeds": list(range(count)), "threads": 1,
    }), encoding="utf-8")  # fmt: skip

    def share(name: str, *how: str) -> float:
        say(f"{count} cells of a second on {workers} workers, {name}")
        results = folder / name
        command = [sys.executable, "-m", "benchmarks.faults.driver", "stand-in", "run", "--profile", str(grid)]
        with (folder / f"{name}.log").open("wb") as log:
            subprocess.run([*command, "--results", str(results), *how], check=True, stdout=log, stderr=log)
        events = read_events(results)
        measured = sorted(event.cell for event in events if event.kind == "measured")
        if len(measured) != count or len(set(measured)) != count:
            raise RuntimeError(f"{len(measured)} cells were measured, {len(set(measured))} of them once; planned were {count}.")
        return worker_busy(events, workers)

    local = share("local", "--jobs", str(workers))
    cluster = Cluster(workers // 2)
    try:
        ray = share("ray", "--engine", "ray", "--ray-address", cluster.address)
    finally:
        cluster.stop()
    return {"worker_busy": round(ray, 4), "worker_busy_local": round(local, 4), "workers": workers, "busy_cells": count}
