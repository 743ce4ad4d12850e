"""The plan of a grid: its cells with their settings, as a table, without running anything."""

from collections.abc import Sequence

from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from benchmarks.cells import Adapter, Cell, finished_record

#: Columns that are shown only where a cell has something there.
_SOMETIMES = ("scope", "s bits", "point", "MLP steps")


def plan_text(cells: Sequence[Cell], adapter: Adapter) -> str:
    """Return the table of cells and a line with their number; ``done`` tells which have a record already.

    ``task`` is the section of the grid. ``s bits`` are the bits of attention probabilities where they are not those of the other
    activations.
    """
    rows = [_row(cell, adapter) for cell in cells]
    shown = [name for name in rows[0] if name not in _SOMETIMES or any(row[name] != "-" for row in rows)]
    finished = sum(row["done"] == "yes" for row in rows)
    table = tabulate([[row[name] for name in shown] for row in rows], headers=shown, disable_numparse=True)
    return f"{table}\n\n{len(rows)} cells, {finished} done, {len(rows) - finished} to run."


def _row(cell: Cell, adapter: Adapter) -> dict[str, str]:
    recipe = cell.request.recipe
    row = {"task": cell.section, "model": cell.model, "scope": cell.scope or "-", "method": cell.method, "bits": cell.bits}
    names = ("s bits", "point", "seed", "steps", "MLP steps", "loss", "images", "batch", "transform")
    row |= dict.fromkeys(names, "-")
    if recipe is not None:
        batch = recipe.batch_size if recipe.reconstruct else recipe.mlp_batch if recipe.reconstruct_mlp else "-"
        row |= {
            "s bits": str(recipe.s_bits) if recipe.s_bits not in (None, recipe.a_bits) else "-",
            "point": cell.point or "-",
            "seed": str(recipe.seed),
            "steps": str(recipe.steps) if recipe.reconstruct else "-",
            "MLP steps": str(recipe.mlp_steps) if recipe.reconstruct_mlp else "-",
            "loss": recipe.loss if recipe.reconstruct else "-",
            "images": str(recipe.calibration_images),
            "batch": str(batch),
            "transform": recipe.calibration_transform,
        }
    return {**row, "done": "yes" if finished_record(cell, adapter) is not None else "no"}
