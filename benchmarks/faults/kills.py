"""``python -m benchmarks.faults``: a small grid whose processes are killed, and its figures."""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import psutil  # type: ignore[import-untyped, unused-ignore]

from benchmarks.compare.reference import machine
from benchmarks.console import user_errors
from benchmarks.faults.audit import doubled, read_events
from benchmarks.grid.cell import RunOptions, default_adapter, finished
from benchmarks.grid.expand import Filters, expand, load_grid
from benchmarks.run.ray import check_folder

GRID = Path(__file__).with_name("grid.yaml")
#: Relative frequency of the kinds of kills, and words in the command line of their processes.
KINDS = {"cell": 6, "worker": 5, "driver": 4, "node": 2}
WORDS = {"cell": "multiprocessing.spawn", "worker": "ray::", "driver": "benchmarks.faults.audit"}


def start(results: Path, *more: str) -> "subprocess.Popen[bytes]":
    """Start the grid; its output goes to ``driver.log`` beside ``results``."""
    command = [sys.executable, "-m", WORDS["driver"], "run", "--profile", str(GRID), *more]
    with results.with_name("driver.log").open("ab") as log:
        return subprocess.Popen([*command, "--results", str(results)], stdout=log, stderr=log)


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
    cluster: Any, results: Path, wanted: int, pause: tuple[float, float], chance: random.Random,
    kills: "Counter[str]",
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
                cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
                cluster.add_node(num_cpus=1)
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
            if code == 0:
                return given_up
            if code != 1:
                raise RuntimeError(f"The grid ended with exit code {code}: see driver.log.")
            given_up += 1
            driver = start(results, *options)


def measure(folder: Path, wanted: int, seed: int, pause: tuple[float, float]) -> dict[str, Any]:
    """Run the grid undisturbed, then disturbed until ``wanted`` kills are made, and compare.

    ``folder``, an empty one, takes all files; ``pause`` are the seconds between two kills.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    folder.mkdir(parents=True, exist_ok=True)
    quiet, began = folder / "quiet", time.monotonic()
    if code := start(quiet, "--jobs", "1").wait():
        raise RuntimeError(f"The undisturbed grid ended with exit code {code}: see driver.log.")
    undisturbed, began = time.monotonic() - began, time.monotonic()
    kills: Counter[str] = Counter()
    found: Counter[str] = Counter(cells_lost=0, cells_doubled=0)
    tables, checkpoints = True, True
    chance, head = random.Random(seed), {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1)
        while kills.total() < wanted:
            found["runs"] += 1
            results = folder / f"disturbed-{found['runs']}"
            found["given_up"] += disturb(cluster, results, wanted, pause, chance, kills)
            cells = expand(load_grid(str(GRID)), Filters(), RunOptions(results))
            there = [cell for cell in cells if finished(cell, default_adapter())]
            found["cells_lost"] += len(cells) - len(there)
            found["cells_doubled"] += len(doubled(read_events(results)))
            tables &= digests(results / "tables", "*") == digests(quiet / "tables", "*")
            mine = digests(results / "runs", "quantized.safetensors")
            checkpoints &= mine == digests(quiet / "runs", "quantized.safetensors") != {}
        seconds = time.monotonic() - began
    finally:
        cluster.shutdown()
    return {
        "kills": kills.total(), "kinds": dict(sorted(kills.items())), "cells": len(cells), **found,
        "tables_identical": tables, "checkpoints_identical": checkpoints,
        "seconds": round(seconds, 1), "undisturbed_seconds": round(undisturbed, 1),
    }  # fmt: skip


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--kills", type=click.IntRange(min=1), default=30, help="Processes to kill.")
@click.option("--seed", type=int, default=0, help="Of the kinds and times of the kills.")
@click.option("--pause", type=(float, float), default=(3, 9), help="Seconds between two kills.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep all files in this folder.")
@click.pass_context
def main(
    context: click.Context, kills: int, seed: int, pause: tuple[float, float],
    folder: Path | None,
) -> None:  # fmt: skip
    """Kill processes of a small grid on two Ray nodes, and compare with the undisturbed grid."""
    with user_errors(context, ""):
        check_folder()  # Ray starts after minutes; complain before
    with tempfile.TemporaryDirectory(prefix="fimaq-faults-") as temporary:
        place = Path(folder or temporary).absolute()
        figures = measure(place, kills, seed, pause) | {"machine": machine()}
    click.echo(json.dumps(figures, indent=1))
