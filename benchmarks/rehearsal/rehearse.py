"""Option ``--rehearse`` of ``run``: rehearses a grid, and estimates the costs of the real run."""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from benchmarks.console import duration, size_text
from benchmarks.costs.sources import cost_row, has_known_settings
from benchmarks.grid.cell import Adapter, Cell, RunOptions, finished
from benchmarks.grid.names import load_names
from benchmarks.grid.schema import Grid
from benchmarks.rehearsal.cell import in_small, read_events, rehearse_cell
from benchmarks.rehearsal.full_cost import real_memory, real_seconds, spent
from benchmarks.run.local import default_jobs
from benchmarks.run.options import RunRequest, settled
from fimaq_core.documents import read_json
from fimaq_core.errors import FimaqError
from fimaq_core.files import replaced_whole
from tasks.common.cell.machine import container_limits

#: File of the estimates in the folder of the rehearsal.
FILE = "rehearsal.json"
#: Bytes of memory that the largest models need in a rehearsal on a CPU.
_CELL_BYTES = 6e9


def rehearse(request: RunRequest) -> int:
    """Rehearse cells below ``<results>/rehearsal``; return 0 if all of them finished, else 1."""
    from benchmarks.rehearsal.inputs import make_data, make_weights
    from benchmarks.run.command import run_grid

    grid, options = request.grid.at_home(), request.options
    request = replace(request, grid=grid)
    if any(part.export for part in grid.tasks.values()):
        print("Exports are not rehearsed: they cost little.")
        grid = grid.without_exports()
        request = replace(request, grid=grid)
    folder = options.results / "rehearsal"
    weights = folder / "weights"
    if options.force:  # a rehearsal has nothing worth keeping
        shutil.rmtree(folder, ignore_errors=True)
    options = replace(options, results=folder, weights=weights, force=False)
    request = settled(replace(request, options=options, adapter=rehearsing(request.adapter)))
    options = request.options
    if options.device == "cpu" and options.engine == "local":
        # As many cells as cores and memory allow.
        threads = options.threads or 1
        jobs = min(default_jobs(threads, "cpu"), max(1, int(_memory("cpu") / _CELL_BYTES)))
        options = replace(options, threads=threads, jobs=options.jobs or jobs)
        request = replace(request, options=options)
    cells = request.cells()
    print(f"Making random weights and images in {folder}. Each cell's process is killed once.")
    make_weights(weights, cells)
    data = make_data(folder / "data", {grid.tasks[cell.section].data for cell in cells} - {"own"})
    request = replace(request, options=replace(options, data=data))
    run_grid(request)
    return _conclude(grid, request.cells(), request.options, request.adapter)


def rehearsing(adapter: Adapter) -> Adapter:
    """Return an adapter that rehearses cells instead of measuring them."""
    return replace(
        adapter,
        run_cell=rehearse_cell,
        planned_folder=lambda request: adapter.planned_folder(in_small(request)),
        preflight=lambda request: adapter.preflight(in_small(request)),
        cached=lambda request, folder: adapter.cached(in_small(request), folder),
    )


def _conclude(grid: Grid, cells: Sequence[Cell], options: RunOptions, adapter: Adapter) -> int:
    """Print and save the estimates of rehearsed `cells`; return the exit code."""
    found = [(cell, row) for cell in cells if (row := _row(grid, cell, adapter)) is not None]
    rows = [row for _, row in found]
    if not rows:
        return 1
    print(f"\n{tabulate(map(_texts, rows), headers='keys', disable_numparse=True)}")
    path = options.results / FILE
    _save(path, [row for cell, row in found if has_known_settings(cell)])
    largest = max(rows, key=lambda row: row["peak_memory_bytes"])
    tape = max(rows, key=lambda row: row["tape_bytes"])
    print(
        f"\nRehearsed {len(rows)} of {len(cells)} cells on {rows[0]['device']}. The real run would "
        f"take about {duration(sum(row['seconds'] for row in rows))} on this device, one cell at a "
        f"time.\nLargest memory of a cell: at most {size_text(largest['peak_memory_bytes'])} "
        f"({largest['model']} {largest['method']}). The results take "
        f"{size_text(sum(row['disk_bytes'] for row in rows))} of disk, not counting calibrations "
        "and MLPs that cells share. The tape of a cell takes up to "
        f"{size_text(tape['tape_bytes'])} ({tape['model']}).\nEstimates: {path}. Nothing here "
        "counts as measured: weights and images are random."
    )
    _warn(rows, str(options.device))
    return 0 if len(rows) == len(cells) else 1


def _row(grid: Grid, cell: Cell, adapter: Adapter) -> dict[str, Any] | None:
    """Return estimates and measurements of a rehearsed cell; None if the cell has no record."""
    found = finished(cell, adapter)
    if found is None:
        return None
    record, folder = found
    real, request = cell.request.recipe, cell.request
    times, small = spent(read_events(folder)), in_small(request).recipe
    published = load_names().published_on(cell.task, grid.tasks[cell.section].dataset)
    images = published[0][2].count if published else record.n
    batch = 1 if cell.task == "detection" else request.eval_batch  # detectors take one image
    memory, tape = real_memory(record, times, real, batch, request.placement == "disk")
    return {
        **cost_row(cell, record).model_dump(),
        "seconds": round(real_seconds(record, times, real, images), 1),
        "peak_memory_bytes": memory,
        "tape_bytes": tape,
        "disk_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "rehearsed": {
            "seconds": round(times.total, 1),
            "peak_memory_bytes": max(record.peak_memory_bytes, times.peak_memory_bytes),
            "seconds_per_step": round(times.step or times.mlp_step, 4) or None,
            "batch_size": small and small.batch_size,
            "calibration_images": small and small.calibration_images,
            "images": record.n,
            "placement": request.placement,
            "step_engine": record.step_engine,
        },
    }


def _texts(row: dict[str, Any]) -> dict[str, str]:
    """Return the texts of a row by column of the printed table."""
    rehearsed = row["rehearsed"]
    step = rehearsed["seconds_per_step"]
    return {
        "model": f"{row['model']} [{row['scope']}]" if row["scope"] else row["model"],
        "method": f"{row['method']} {row['point']}".strip(),
        "bits": row["bits"],
        "rehearsed": duration(rehearsed["seconds"]),
        "peak": size_text(rehearsed["peak_memory_bytes"]),
        "per step": "-" if step is None else f"{1000 * step:.0f} ms",
        "real time": duration(row["seconds"]),
        "real memory": size_text(row["peak_memory_bytes"]),
    }


def _save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows to a file. Rows of other cells that are already in the file stay."""
    keys = ("section", "model", "scope", "method", "bits", "seed", "point", "device")
    kept = read_json(path, FimaqError, "rehearsal")["cells"] if path.is_file() else []
    merged = {tuple(str(row[name]) for name in keys): row for row in [*kept, *rows]}
    content = {"cells": [row for _, row in sorted(merged.items())]}
    with replaced_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _warn(rows: Sequence[dict[str, Any]], device: str) -> None:
    """Print a warning about cells of the real run that may need more memory or disk."""
    memory, temporary = _memory(device), tempfile.gettempdir()
    large = dict.fromkeys(row["model"] for row in rows if row["peak_memory_bytes"] > memory)
    if large:
        print(
            f"warning: {', '.join(large)} may need more memory than the {size_text(memory)} here: "
            "PLACEMENT=host or PLACEMENT=disk needs less memory on the device."
        )
    free = shutil.disk_usage(temporary).free
    tapes = [row["tape_bytes"] for row in rows if row["rehearsed"]["placement"] == "disk"]
    if max(tapes, default=0) > free:
        print(
            f"warning: A tape of {size_text(max(tapes))} does not fit in {temporary}, where "
            f"{size_text(free)} are free: set TMPDIR to a folder on a larger disk for the real run."
        )


def _memory(device: str) -> float:
    """Return the bytes of memory that a cell may use on `device`."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.get_device_properties(device).total_memory)
    return min(psutil.virtual_memory().total, container_limits()["memory"] or math.inf)
