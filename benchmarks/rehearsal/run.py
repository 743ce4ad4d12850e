"""``run --rehearse``: rehearses the cells of a grid and prints what the real run will take."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from benchmarks.cells import Adapter, Cell, RunOptions, finished
from benchmarks.costs import cost_row
from benchmarks.estimate import duration
from benchmarks.names import load_names
from benchmarks.rehearsal.cell import in_small, read_events, rehearse_cell
from benchmarks.rehearsal.estimate import real_memory, real_seconds, spent
from benchmarks.schema import Grid
from fimaq_core.errors import FimaqError
from fimaq_core.files import replaced_whole
from tasks.common.request import CellRequest

FILE = "rehearsal.json"
_COLUMNS = ("model", "method", "bits", "rehearsed", "peak", "per step", "real time", "real memory")


def rehearsal_options(options: RunOptions, device: str) -> RunOptions:
    """Return the options of a rehearsal: everything of it lies in ``<results>/rehearsal``."""
    folder = options.results / "rehearsal"
    if options.force:  # a rehearsal has nothing worth keeping
        shutil.rmtree(folder, ignore_errors=True)
    return replace(
        options, results=folder, weights=folder / "weights", device=device, force=""
    )


def prepare(grid: Grid, cells: Sequence[Cell], options: RunOptions) -> RunOptions:
    """Make random data and weights for ``cells``; return the options with the folders of the data."""
    from benchmarks.rehearsal.data import make_data
    from benchmarks.rehearsal.models import make_weights

    kinds = {grid.tasks[cell.section].data for cell in cells} - {"own"}
    assert options.weights is not None
    make_weights(options.weights, cells)
    return replace(options, data=make_data(options.results / "data", kinds))


def rehearsing(adapter: Adapter) -> Adapter:
    """Return an adapter that runs cells in small."""

    def small(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda request, *rest: function(in_small(request), *rest)

    return Adapter(
        rehearse_cell,
        small(adapter.planned_folder),
        small(adapter.preflight),
        small(adapter.cached),
        adapter.imports,
    )


def conclude(cells: Sequence[Cell], options: RunOptions, adapter: Adapter) -> int:
    """Print the estimates of rehearsed ``cells`` and keep them; return the exit code.

    Args:
        cells: of the real grid, under the options of the rehearsal.
        options: of the rehearsal.
        adapter: of the rehearsal.

    Returns:
        0 if all cells went through, else 1.
    """
    rows = [row for cell in cells if (row := _row(cell, adapter)) is not None]
    if not rows:
        return 1
    print()
    print(tabulate([_texts(row) for row in rows], headers=_COLUMNS, disable_numparse=True))
    path = options.results / FILE
    _keep(path, rows)
    total = sum(row["seconds"] for row in rows)
    largest = max(rows, key=lambda row: row["peak_memory_bytes"])
    tape = max(rows, key=lambda row: row["tape_bytes"])
    print(
        f"\nRehearsed {len(rows)} of {len(cells)} cells on {rows[0]['device']}. The real run would "
        f"take about {duration(total)} on this device, one cell at a time.\n"
        f"Largest memory of a cell: at most {_gb(largest['peak_memory_bytes'])} "
        f"({largest['model']} {largest['method']}). Results take {_gb(_disk(options))} of disk, "
        f"what a cell keeps of its calibration images up to {_gb(tape['tape_bytes'])} "
        f"({tape['model']}).\nEstimates: {path}. Nothing here counts as measured: weights and "
        "images are random."
    )
    for line in _too_large(rows, options):
        print(line)
    return 0 if len(rows) == len(cells) else 1


def _row(cell: Cell, adapter: Adapter) -> dict[str, Any] | None:
    found = finished(cell, adapter)
    if found is None:
        return None
    record, folder = found
    real, request = cell.request.recipe, cell.request
    times = spent(read_events(folder))
    memory, tape = real_memory(record, times, real, request.eval_batch, request.placement == "disk")
    small = in_small(request).recipe
    rehearsed = {
        "seconds": {name: round(seconds, 2) for name, seconds in record.seconds.items()},
        "peak_memory_bytes": record.peak_memory_bytes,
        "seconds_per_step": round(times.step or times.mlp_step, 4) or None,
        "batch_size": None if small is None else small.batch_size,
        "calibration_images": None if small is None else small.calibration_images,
        "images": record.n,
        "placement": request.placement,
        "step_engine": record.step_engine,
    }
    return {
        **cost_row(cell, record).model_dump(),
        "seconds": round(real_seconds(record, times, real, _count(cell, record.n)), 1),
        "peak_memory_bytes": memory,
        "tape_bytes": tape,
        "disk_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "rehearsed": rehearsed,
    }


def _count(cell: Cell, measured: int) -> int:
    """Return the images of the published data set of a cell; ``measured`` where none is known."""
    counts = [
        entry.count
        for sets in load_names().datasets.values()
        for entry in sets.values()
        if entry.task == cell.task
    ]
    return counts[0] if counts else measured


def _texts(row: dict[str, Any]) -> list[str]:
    rehearsed = row["rehearsed"]
    step = rehearsed["seconds_per_step"]
    return [
        f"{row['model']}{' [' + row['scope'] + ']' if row['scope'] else ''}",
        f"{row['method']}{' ' + row['point'] if row['point'] else ''}",
        row["bits"],
        duration(sum(rehearsed["seconds"].values())),
        _gb(rehearsed["peak_memory_bytes"]),
        "-" if step is None else f"{1000 * step:.0f} ms",
        duration(row["seconds"]),
        _gb(row["peak_memory_bytes"]),
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _disk(options: RunOptions) -> int:
    kept = ("runs", "calibration", "mlp", "reconstruction")
    files = (file for name in kept for file in (options.results / name).rglob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _keep(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows; those of other cells that the file has stay in it."""
    keys = ("section", "model", "scope", "method", "bits", "seed", "point", "device")
    kept = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []
    merged = {tuple(row[name] for name in keys): row for row in [*kept, *rows]}
    content = {"cells": sorted(merged.values(), key=lambda row: [str(row[name]) for name in keys])}
    with replaced_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _too_large(rows: Sequence[dict[str, Any]], options: RunOptions) -> list[str]:
    """Say what would not fit on this machine."""
    import tempfile

    lines = []
    free = shutil.disk_usage(tempfile.gettempdir()).free
    on_disk = [row for row in rows if row["rehearsed"]["placement"] == "disk"]
    most = max(on_disk, key=lambda row: row["tape_bytes"], default=None)
    if most is not None and most["tape_bytes"] > free:
        lines.append(
            f"warning: {most['model']} keeps {_gb(most['tape_bytes'])} in {tempfile.gettempdir()}, "
            f"where {_gb(free)} are free: set TMPDIR to a larger disk for the real run."
        )
    return lines
