"""The fault bench: kills processes of a small grid, and compares the results."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import psutil  # type: ignore[import-untyped, unused-ignore]

from benchmarks.compare.reference import machine
from benchmarks.faults.audit import doubled, read_notes
from benchmarks.grid.cell import RunOptions, default_adapter, finished
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import load_grid
from benchmarks.run.cluster import check_folder
from fimaq_core.documents import parse_json
from fimaq_core.errors import FimaqError
from tasks.common.cli import numbers
from tasks.common.cli.process import Command, verbose

GRID = Path(__file__).with_name("grid.yaml")
#: Relative frequencies of the kinds of kills. The driver is the process that runs the grid.
KINDS = {"cell": 6, "worker": 5, "driver": 4, "node": 2}
#: Words in the command lines of these processes; a node is not a process.
WORDS = {"cell": "multiprocessing.spawn", "worker": "ray::", "driver": "benchmarks.faults.audit"}

_ADVICE = "Give --folder, and look for the reason in its driver.log."


def start(results: Path, *more: str) -> "subprocess.Popen[bytes]":
    """Start the grid with `more` options. Its output goes to ``driver.log`` beside `results`."""
    command = [sys.executable, "-m", WORDS["driver"], "run", "--profile", str(GRID), *more]
    with results.with_name("driver.log").open("ab") as log:
        return subprocess.Popen([*command, "--results", str(results)], stdout=log, stderr=log)


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """Return the SHA-256 of the files in `folder` that fit `pattern`, by relative path."""
    files = sorted(folder.rglob(pattern))
    return {str(f.relative_to(folder)): hashlib.sha256(_content(f)).hexdigest() for f in files}


def _content(file: Path) -> bytes:
    """Return the bytes of a file. In the header of a checkpoint, the keys are sorted."""
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    header = parse_json(content[8:end].decode(), str(file), FimaqError)
    return json.dumps(header, sort_keys=True).encode() + content[end:]


def victims(kind: str) -> list[psutil.Process]:
    """Return the processes of a kind that this process has started, also indirectly."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # the process has just ended
            line = " ".join(process.cmdline())
            if WORDS[kind] in line and "IDLE" not in line:
                found.append(process)
    return found


def kill(kind: str, cluster: Any, chance: random.Random) -> bool:
    """Kill a random process of a kind, or replace a node. Return False if there is none."""
    if kind == "node":
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        return True
    try:
        chance.choice(victims(kind)).kill()
    except (IndexError, psutil.NoSuchProcess):
        return False
    return True


def disturb(
    cluster: Any, results: Path, wanted: int, pause: tuple[float, float], chance: random.Random,
    kills: "Counter[str]",
) -> int:  # fmt: skip
    """Run the grid to its end. Kill one process after each pause until `kills` counts `wanted`.

    Returns:
        Number of times that the grid was started again after cells had failed.
    """
    given_up = 0
    options = "--engine", "ray", "--ray-address", cluster.address
    driver = start(results, *options)
    while True:
        try:
            seconds = chance.uniform(*pause) if kills.total() < wanted else None
            code = driver.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
            if kill(kind, cluster, chance):
                kills[kind] += 1
                print(f"kill {kills.total()}: {kind}", file=sys.stderr)
            continue
        if code == 0:
            return given_up
        if code not in (1, -signal.SIGKILL):
            raise FimaqError(f"The grid ended with exit code {code}. {_ADVICE}")
        given_up += code == 1
        driver = start(results, *options)


def measure(folder: Path, wanted: int, seed: int, pause: tuple[float, float]) -> dict[str, Any]:
    """Run the grid once without kills, and repeatedly with kills until there are `wanted` kills.

    All files go to the empty `folder`. `pause` has the least and most seconds between two kills.

    Returns:
        Counts of kills and of lost and doubled cells, comparisons of files, and seconds.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    folder.mkdir(parents=True, exist_ok=True)
    quiet, began = folder / "quiet", time.monotonic()
    if code := start(quiet, "--jobs", "1").wait():
        raise FimaqError(f"The grid without kills ended with exit code {code}. {_ADVICE}")
    undisturbed, began = time.monotonic() - began, time.monotonic()
    kills: Counter[str] = Counter()
    found: Counter[str] = Counter(cells_lost=0, cells_doubled=0)
    tables = checkpoints = True
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
            found["cells_doubled"] += len(doubled(read_notes(results)))
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


_PAUSE = click.Tuple([numbers.SECONDS, numbers.SECONDS])


@click.command(
    cls=Command, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@verbose
@click.option("--kills", type=numbers.COUNT, default=30, help="Number of kills.")
@click.option(
    "--seed",
    type=numbers.COUNT_OR_NONE,
    default=0,
    help="Seed of the kinds and times of the kills.",
)
@click.option("--pause", type=_PAUSE, default=(3, 9), help="Seconds between two kills.")
@click.option("--folder", type=click.Path(path_type=Path), help="Folder that keeps all files.")
def main(kills: int, seed: int, pause: tuple[float, float], folder: Path | None) -> None:
    """Kill processes of a small grid on two Ray nodes; compare with a run without kills."""
    with tempfile.TemporaryDirectory(prefix="fimaq-faults-") as temporary:
        check_folder()  # at once, because Ray starts only after minutes
        place = Path(folder or temporary).absolute()
        figures = measure(place, kills, seed, pause) | {"machine": machine()}
        click.echo(json.dumps(figures, indent=1))
