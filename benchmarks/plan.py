"""The plan of a grid: its cells with their settings, as a table, without running anything."""

from collections.abc import Sequence

from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from benchmarks.cells import Adapter, Cell, finished_record

_HEADERS = ["task", "model", "method", "bits", "seed", "steps", "loss", "images", "batch", "transform", "done"]


def plan_text(cells: Sequence[Cell], adapter: Adapter) -> str:
    """Return the table of cells and a line with their number; ``done`` tells which have a record already."""
    rows = []
    for cell in cells:
        recipe = cell.request.recipe
        done = "yes" if finished_record(cell, adapter) is not None else "no"
        settings = ["-"] * 6 if recipe is None else [
            str(recipe.seed),
            str(recipe.steps) if recipe.reconstruct else "-",
            recipe.loss if recipe.reconstruct else "-",
            str(recipe.calibration_images),
            str(recipe.batch_size) if recipe.reconstruct else "-",
            recipe.calibration_transform,
        ]  # fmt: skip
        rows.append([cell.task, cell.model, cell.method, cell.bits, *settings, done])
    finished = sum(row[-1] == "yes" for row in rows)
    table = tabulate(rows, headers=_HEADERS, disable_numparse=True)
    return f"{table}\n\n{len(rows)} cells, {finished} done, {len(rows) - finished} to run."
