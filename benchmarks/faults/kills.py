"""A small grid on a Ray cluster of two nodes whose processes are killed at random moments, against the same grid undisturbed."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cells import RunOptions, default_adapter, finished_record
from benchmarks.faults.audit import Event, read_events
from benchmarks.faults.cluster import Cluster
from benchmarks.grid import Filters, expand, load_grid

GRID = Path(__file__).with_name("grid.yaml")

#: What the processes are called by which they are found.
HOST, ACTOR = "benchmarks.engines.host", "ray::Seat"

#: What is killed, and how often against the others.
KINDS = {"cell": 6, "host": 2, "actor": 3, "driver": 4, "node": 2}


@dataclass
class Kills:
    """What was killed and what came of it.

    Attributes:
        kinds: kills by kind.
        given_up: calls that ended with a cell given up, since its process was killed again and again; the next one finished it.
        runs: how often the whole grid ran to its end: more than once where it was over before all kills were made.
        lost: cells without a record at the end.
        doubled: cells measured more than once, or by two processes at the same time.
        tables_identical: whether every table file equals the undisturbed run's byte for byte.
        checkpoints_identical: the same of every quantized model.
        seconds: of the disturbed runs.
        undisturbed_seconds: of the other.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    given_up: int = 0
    runs: int = 0
    lost: int = 0
    doubled: int = 0
    tables_identical: bool = True
    checkpoints_identical: bool = True
    seconds: float = 0.0
    undisturbed_seconds: float = 0.0


def command(results: Path, *more: str) -> list[str]:
    """The command that runs the grid into ``results``."""
    start = [sys.executable, "-m", "benchmarks.faults.driver", "audited", "run"]
    return [*start, "--profile", str(GRID), "--results", str(results), *more]


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of what the files below ``folder`` hold, by their paths there."""
    files = sorted(folder.rglob(pattern))
    return {file.relative_to(folder).as_posix(): hashlib.sha256(_content(file)).hexdigest() for file in files}


def _content(file: Path) -> bytes:
    """Bytes of a file; of a checkpoint its tensors behind its header with sorted keys: the library writes some in any order."""
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return content
    size = int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode() + content[8 + size :]


def doubled(events: list[Event]) -> set[str]:
    """Cells measured more than once, or worked on by two living processes."""
    measured = Counter(event.cell for event in events if event.kind == "measured")
    return {cell for cell, count in measured.items() if count > 1} | {e.cell for e in events if e.kind == "overlap"}


def lost(results: Path) -> int:
    """Cells of the grid without a valid record."""
    cells = expand(load_grid(str(GRID)), Filters(), RunOptions(results))
    return sum(finished_record(cell, default_adapter()) is None for cell in cells)


def victims(kind: str, driver: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Return the processes of a kind that run now, by what they are called, among those this process started."""
    if kind == "driver":
        return [psutil.Process(driver.pid)]
    family = {process.pid: process for process in psutil.Process().children(recursive=True)}
    found = []
    for process in family.values():
        try:
            words, parent = " ".join(process.cmdline()), family.get(process.ppid())
            is_host, under_host = HOST in words, parent is not None and HOST in " ".join(parent.cmdline())
        except psutil.Error:
            continue  # it ended just now
        if (kind == "cell" and is_host and under_host) or (kind == "host" and is_host and not under_host) or (
            kind == "actor" and words.startswith(ACTOR)
        ):  # fmt: skip
            found.append(process)
    return found


class Disturbed:
    """Runs of the grid on a cluster, and kills among them."""

    def __init__(self, cluster: Cluster, folder: Path, chance: random.Random, say: Callable[[str], None]) -> None:
        self._cluster, self._folder, self._chance, self._say = cluster, folder, chance, say
        self.kills: Counter[str] = Counter()
        self.given_up = 0

    def run(self, results: Path, wanted: int, pause: tuple[float, float]) -> None:
        """Run the grid to its end, and meanwhile kill something every so many seconds until ``wanted`` kills are made."""
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
                raise RuntimeError(f"The grid ended with exit code {code}: see {self._folder / 'driver.log'}.")
            # A cell was killed so often that it was given up: whoever is told so calls again.
            self.given_up += 1
            driver = self._start(results)

    def _start(self, results: Path) -> "subprocess.Popen[bytes]":
        with (self._folder / "driver.log").open("ab") as log:
            return subprocess.Popen(
                command(results, "--engine", "ray", "--ray-address", self._cluster.address), stdout=log, stderr=log
            )

    def _kill(self, driver: "subprocess.Popen[bytes]") -> None:
        kind = self._chance.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "node":
            self._cluster.kill_node()
        else:
            found = victims(kind, driver)
            if not found:
                return  # none runs just now: the next pause brings another
            with_luck = self._chance.choice(found)
            try:
                os.kill(with_luck.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            if kind == "driver":
                driver.wait()
        self.kills[kind] += 1
        self._say(f"kill {self.kills.total()}: {kind}")


def measure(folder: Path, wanted: int, seed: int, pause: tuple[float, float], say: Callable[[str], None]) -> Kills:
    """Run the grid undisturbed, then disturbed until ``wanted`` kills are made, and compare.

    Args:
        folder: an empty one, for everything that is written.
        wanted: kills.
        seed: of what is killed when.
        pause: shortest and longest time between two kills, in seconds.
        say: told what happens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quiet, found = folder / "quiet", Kills()
    began = time.monotonic()
    say("the grid undisturbed, one cell after the other")
    with (folder / "driver.log").open("ab") as log:
        subprocess.run(command(quiet, "--jobs", "1"), check=True, stdout=log, stderr=log)
    found.undisturbed_seconds = time.monotonic() - began
    cluster = Cluster(1)
    try:
        began, disturbed = time.monotonic(), Disturbed(cluster, folder, random.Random(seed), say)
        while disturbed.kills.total() < wanted:
            results = folder / f"disturbed-{found.runs + 1}"
            say(f"the grid on {cluster.address}, run {found.runs + 1}")
            disturbed.run(results, wanted, pause)
            found.runs += 1
            found.lost += lost(results)
            found.doubled += len(doubled(read_events(results)))
            found.tables_identical &= digests(results / "tables", "*") == digests(quiet / "tables", "*")
            mine, theirs = (digests(place / "runs", "quantized.safetensors") for place in (results, quiet))
            found.checkpoints_identical &= mine == theirs and bool(mine)
        found.seconds, found.kinds = time.monotonic() - began, disturbed.kills
        found.given_up = disturbed.given_up
    finally:
        cluster.stop()
    return found


def as_json(found: Kills) -> dict[str, Any]:
    """What is kept of it."""
    return {
        "kills": found.kinds.total(),
        "kinds": dict(sorted(found.kinds.items())),
        "cells": len(expand(load_grid(str(GRID)), Filters(), RunOptions())),
        "runs": found.runs,
        "given_up": found.given_up,
        "cells_lost": found.lost,
        "cells_doubled": found.doubled,
        "tables_identical": found.tables_identical,
        "checkpoints_identical": found.checkpoints_identical,
        "seconds": round(found.seconds, 1),
        "undisturbed_seconds": round(found.undisturbed_seconds, 1),
    }
