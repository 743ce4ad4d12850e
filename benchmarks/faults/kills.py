"""A small grid on two Ray nodes whose processes are killed, against the undisturbed grid."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from benchmarks.cells import RunOptions, default_adapter, finished_record
from benchmarks.faults.audit import doubled, read_events
from benchmarks.grid import Filters, expand, load_grid

GRID = Path(__file__).with_name("grid.yaml")
#: Relative frequency of the kinds of kills, and words in the command line of their processes.
KINDS = {"cell": 6, "worker": 5, "driver": 4, "node": 2}
WORDS = {"cell": "multiprocessing.spawn", "worker": "ray::", "driver": "benchmarks.faults.audit"}


class Cluster:
    """Two Ray nodes of one core on this machine; the second one can be killed."""

    def __init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster as Local

        head = {"num_cpus": 1, "include_dashboard": False}
        self._cluster = Local(initialize_head=True, head_node_args=head)
        self._node = self._cluster.add_node(num_cpus=1)
        self.address = str(self._cluster.address)
        self.stop = self._cluster.shutdown

    def kill_node(self) -> None:
        """Kill the second node with all that runs there, and let another one join."""
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = self._cluster.add_node(num_cpus=1)


def start(results: Path, *more: str) -> "subprocess.Popen[bytes]":
    """Start the grid; its output goes to ``driver.log`` beside ``results``."""
    command = [sys.executable, "-m", WORDS["driver"], "run", "--profile", str(GRID)]
    with results.with_name("driver.log").open("ab") as log:
        command += ["--results", str(results), *more]
        return subprocess.Popen(command, stdout=log, stderr=log)


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """Return the sha256 of the contents of files below ``folder``, by path."""
    files = sorted(folder.rglob(pattern))
    return {str(f.relative_to(folder)): hashlib.sha256(_content(f)).hexdigest() for f in files}


def _content(file: Path) -> bytes:
    """Return the bytes of a file, with sorted keys in a checkpoint's header: their order varies."""
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]


def victims(kind: str) -> list[psutil.Process]:
    """Return the running processes of a kind among this process's descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue  # it ended just now
        if WORDS[kind] in line and "IDLE" not in line:
            found.append(process)
    return found


def disturb(
    cluster: Cluster, results: Path, wanted: int, pause: tuple[float, float],
    chance: random.Random, kills: "Counter[str]",
) -> int:  # fmt: skip
    """Run the grid to its end; kill one process per pause until ``kills`` has ``wanted``.

    Returns:
        How many times the grid gave up a cell that was killed too often, and was started again.
    """
    given_up = 0
    options = "--engine", "ray", "--ray-address", cluster.address
    driver = start(results, *options)
    while True:
        more = kills.total() < wanted
        try:
            code = driver.wait(timeout=chance.uniform(*pause) if more else None)
        except subprocess.TimeoutExpired:
            kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
            if kind == "node":
                cluster.kill_node()
            else:
                try:
                    chance.choice(victims(kind)).kill()
                except (IndexError, psutil.NoSuchProcess):
                    continue  # none runs now; the next pause brings another kind
            kills[kind] += 1
            print(f"kill {kills.total()}: {kind}", file=sys.stderr)
            if kind == "driver":
                driver.wait()
                driver = start(results, *options)
        else:
            if code not in (0, 1):
                log = results.with_name("driver.log")
                raise RuntimeError(f"The grid ended with exit code {code}: see {log}.")
            if code == 0:
                return given_up
            given_up += 1
            driver = start(results, *options)


def measure(folder: Path, wanted: int, seed: int, pause: tuple[float, float]) -> dict[str, Any]:
    """Run the grid undisturbed, then disturbed until ``wanted`` kills are made, and compare.

    Args:
        folder: an empty one, for all files.
        wanted: kills.
        seed: of the kinds and times of the kills.
        pause: shortest and longest time between two kills, in seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quiet, began = folder / "quiet", time.monotonic()
    if code := start(quiet, "--jobs", "1").wait():
        raise RuntimeError(f"The undisturbed grid ended with exit code {code}.")
    undisturbed, began = time.monotonic() - began, time.monotonic()
    kills: Counter[str] = Counter()
    found: Counter[str] = Counter(cells_lost=0, cells_doubled=0)
    tables, checkpoints = True, True
    chance, cluster = random.Random(seed), Cluster()
    try:
        while kills.total() < wanted:
            found["runs"] += 1
            results = folder / f"disturbed-{found['runs']}"
            found["given_up"] += disturb(cluster, results, wanted, pause, chance, kills)
            cells = expand(load_grid(str(GRID)), Filters(), RunOptions(results))
            there = [cell for cell in cells if finished_record(cell, default_adapter())]
            found["cells_lost"] += len(cells) - len(there)
            found["cells_doubled"] += len(doubled(read_events(results)))
            tables &= digests(results / "tables", "*") == digests(quiet / "tables", "*")
            mine = digests(results / "runs", "quantized.safetensors")
            checkpoints &= mine == digests(quiet / "runs", "quantized.safetensors") != {}
        seconds = time.monotonic() - began
    finally:
        cluster.stop()
    return {
        "kills": kills.total(), "kinds": dict(sorted(kills.items())), "cells": len(cells), **found,
        "tables_identical": tables, "checkpoints_identical": checkpoints,
        "seconds": round(seconds, 1), "undisturbed_seconds": round(undisturbed, 1),
    }  # fmt: skip
