"""A small grid on two Ray nodes whose processes are killed, against the undisturbed grid."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from benchmarks.cells import RunOptions, default_adapter, finished_record
from benchmarks.faults.audit import doubled, read_events
from benchmarks.grid import Filters, expand, load_grid

GRID = Path(__file__).with_name("grid.yaml")
#: Words in the command lines of a cell's host and of Ray's actors.
HOST, ACTOR = "benchmarks.engines.host", "ray::Seat"
#: Relative frequency of the kinds of kills.
KINDS = {"cell": 6, "host": 2, "actor": 3, "driver": 4, "node": 2}


class Cluster:
    """Two Ray nodes of one core on this machine; the second one can be killed."""

    def __init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster as Local

        head = {"num_cpus": 1, "include_dashboard": False}
        self._cluster = Local(initialize_head=True, head_node_args=head)
        self._node = self._cluster.add_node(num_cpus=1)
        self.address = str(self._cluster.address)

    def kill_node(self) -> None:
        """Kill the second node with all that runs there, and let another one join."""
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = self._cluster.add_node(num_cpus=1)

    def stop(self) -> None:
        """End both nodes."""
        self._cluster.shutdown()  # type: ignore[no-untyped-call]


def command(results: Path, *more: str) -> list[str]:
    """Return the command that runs the grid into ``results``."""
    start = [sys.executable, "-m", "benchmarks.faults.driver", "run"]
    return [*start, "--profile", str(GRID), "--results", str(results), *more]


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """Return the sha256 of the contents of files below ``folder``, by path."""
    found = {}
    for file in sorted(folder.rglob(pattern)):
        name = str(file.relative_to(folder))
        found[name] = hashlib.sha256(_content(file)).hexdigest()
    return found


def _content(file: Path) -> bytes:
    """Return the bytes of a file, with sorted keys in a checkpoint's header: their order varies."""
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]


def lost(results: Path) -> int:
    """Return the number of cells of the grid without a valid record."""
    cells = expand(load_grid(str(GRID)), Filters(), RunOptions(results))
    return sum(finished_record(cell, default_adapter()) is None for cell in cells)


def victims(kind: str, driver: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Return the running processes of a kind among those that this process started."""
    if kind == "driver":
        return [psutil.Process(driver.pid)]
    lines: dict[int, str] = {}
    family = psutil.Process().children(recursive=True)
    for process in family:
        try:
            lines[process.pid] = " ".join(process.cmdline())
        except psutil.Error:
            continue  # it ended just now
    found = []
    for process in family:
        try:
            parent = lines.get(process.ppid(), "")
        except psutil.Error:
            continue
        line = lines.get(process.pid, "")
        is_kind = {
            "cell": HOST in line and HOST in parent,
            "host": HOST in line and HOST not in parent,
            "actor": line.startswith(ACTOR),
        }
        if is_kind[kind]:
            found.append(process)
    return found


class Disturbed:
    """Runs of the grid on a cluster, with kills.

    Attributes:
        kills: by kind.
        given_up: runs that ended since a cell was killed too often; the next run finished it.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        chance: random.Random,
        say: Callable[[str], None],
    ) -> None:
        self._cluster, self._folder, self._chance, self._say = cluster, folder, chance, say
        self.kills: Counter[str] = Counter()
        self.given_up = 0

    def run(self, results: Path, wanted: int, pause: tuple[float, float]) -> None:
        """Run the grid to its end; kill one process per pause until ``wanted`` kills are made."""
        driver = self._start(results)
        while True:
            left = self.kills.total() < wanted
            try:
                code = driver.wait(timeout=self._chance.uniform(*pause) if left else None)
            except subprocess.TimeoutExpired:
                self._kill(driver)
                if driver.poll() is not None:
                    driver = self._start(results)
                continue
            if code == 0:
                return
            if code != 1:
                log = self._folder / "driver.log"
                raise RuntimeError(f"The grid ended with exit code {code}: see {log}.")
            self.given_up += 1
            driver = self._start(results)

    def _start(self, results: Path) -> "subprocess.Popen[bytes]":
        arguments = command(results, "--engine", "ray", "--ray-address", self._cluster.address)
        with (self._folder / "driver.log").open("ab") as log:
            return subprocess.Popen(arguments, stdout=log, stderr=log)

    def _kill(self, driver: "subprocess.Popen[bytes]") -> None:
        kind = self._chance.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "node":
            self._cluster.kill_node()
        else:
            found = victims(kind, driver)
            if not found:
                return  # none runs now; the next pause brings another kind
            try:
                os.kill(self._chance.choice(found).pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            if kind == "driver":
                driver.wait()
        self.kills[kind] += 1
        self._say(f"kill {self.kills.total()}: {kind}")


def measure(
    folder: Path,
    wanted: int,
    seed: int,
    pause: tuple[float, float],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run the grid undisturbed, then disturbed until ``wanted`` kills are made, and compare.

    Args:
        folder: an empty one, for all files.
        wanted: kills.
        seed: of the kinds and times of the kills.
        pause: shortest and longest time between two kills, in seconds.
        say: receives what happens.

    Returns:
        ``kills`` and ``kinds``, ``cells`` of the grid, ``runs`` (more than one where the grid ended
        before all kills), ``given_up``, ``cells_lost``, ``cells_doubled``, ``tables_identical`` and
        ``checkpoints_identical`` (to the undisturbed ones), ``seconds``, ``undisturbed_seconds``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quiet, began = folder / "quiet", time.monotonic()
    say("the grid undisturbed, one cell after the other")
    with (folder / "driver.log").open("ab") as log:
        subprocess.run(command(quiet, "--jobs", "1"), check=True, stdout=log, stderr=log)
    undisturbed = time.monotonic() - began
    found: dict[str, Any] = {"runs": 0, "cells_lost": 0, "cells_doubled": 0}
    tables, checkpoints = True, True
    cluster = Cluster()
    try:
        began = time.monotonic()
        disturbed = Disturbed(cluster, folder, random.Random(seed), say)
        while disturbed.kills.total() < wanted:
            found["runs"] += 1
            results = folder / f"disturbed-{found['runs']}"
            say(f"the grid on {cluster.address}, run {found['runs']}")
            disturbed.run(results, wanted, pause)
            found["cells_lost"] += lost(results)
            found["cells_doubled"] += len(doubled(read_events(results)))
            tables &= digests(results / "tables", "*") == digests(quiet / "tables", "*")
            mine = digests(results / "runs", "quantized.safetensors")
            checkpoints &= mine == digests(quiet / "runs", "quantized.safetensors") != {}
        seconds = time.monotonic() - began
    finally:
        cluster.stop()
    return {
        "kills": disturbed.kills.total(),
        "kinds": dict(sorted(disturbed.kills.items())),
        "cells": len(expand(load_grid(str(GRID)), Filters(), RunOptions())),
        "given_up": disturbed.given_up,
        **found,
        "tables_identical": tables,
        "checkpoints_identical": checkpoints,
        "seconds": round(seconds, 1),
        "undisturbed_seconds": round(undisturbed, 1),
    }
