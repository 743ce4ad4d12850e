"""The plan of a grid: its cells with settings, costs and what is there of them. Runs nothing."""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from benchmarks.console import duration, size_text
from benchmarks.costs.sources import (
    REFERENCE,
    Cost,
    Costs,
    Rows,
    Source,
    cost_row,
    device_kind,
    origins,
    other_rows,
)
from benchmarks.grid.cell import Adapter, Cell, Key, RunOptions, known_folder, record_in
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import Grid

#: Columns that are shown only where a cell has something there.
_SOMETIMES = ("#", "scope", "s bits", "point", "MLP steps", "time", "memory", "cached")
#: Columns that a table leaves out, in this order, if it is too wide for a terminal.
_LEAST = (
    "transform", "batch", "s bits", "images", "MLP steps", "loss", "steps", "done", "memory",
    "task", "seed", "cached",
)  # fmt: skip
_GAP = 2
#: Sources of costs that were measured, for people.
_MACHINES: dict[Source, str] = {
    "here": "finished cells here",
    "reference": "the reference",
    "rehearsal": "the rehearsal",
}


def plan_of(
    grid: Grid,
    filters: Filters,
    options: RunOptions,
    adapter: Adapter,
    cells: Sequence[Cell],
    jobs: int,
    width: int | None = None,
    reference: Path = REFERENCE,
) -> str:
    """Return the plan of ``cells``, which ``filters`` leave of a grid; see :func:`plan_text`."""
    rows, notes = other_rows([grid.name], options.results, reference)
    known = expand(grid, Filters(), options) if filters.active else ()
    plan = plan_text(cells, adapter, known, rows, jobs, width, options.force)
    return "\n".join([plan, *notes])


def plan_text(
    cells: Sequence[Cell],
    adapter: Adapter,
    known: Sequence[Cell] = (),
    others: Rows = (),
    jobs: int = 1,
    width: int | None = None,
    force: bool = False,
) -> str:
    """Return the table of cells, and lines with their number, time, memory and their sources.

    ``#`` is the order in which cells start, ``s bits`` are bits of attention probabilities if they
    differ from other activations', ``~`` marks estimates, ``cached`` is what a cell finds done.

    Args:
        known: cells of the whole grid, whose measured costs help to estimate.
        others: costs from elsewhere.
        jobs: cells at a time.
        width: of a terminal; a wider table leaves columns out and says so.
        force: measure cells that are done, too.
    """
    from benchmarks.run.order import make_chains

    every = {cell.key: cell for cell in (*cells, *known)}
    folders = {key: known_folder(cell, adapter) for key, cell in every.items()}
    records = {key: folder and record_in(folder) for key, folder in folders.items()}
    found = ((cell, records[key]) for key, cell in every.items())
    done = [(cell, cost_row(cell, record)) for cell, record in found if record]
    todo = [cell for cell in cells if force or records[cell.key] is None]
    costs = Costs(done, others, every.values())
    each = {cell.key: costs.of(cell) for cell in cells}
    chains = make_chains(todo)
    order = {cell.key: str(n) for n, cell in enumerate((c for chain in chains for c in chain), 1)}
    rows = []
    for cell in cells:
        is_done, folder = records[cell.key] is not None, folders[cell.key]
        cached = [] if is_done or folder is None else adapter.cached(cell.request, folder)
        row = {"#": order.get(cell.key, "-"), **_settings(cell), "done": "yes" if is_done else "no"}
        rows.append({**row, **_cost(cell, each[cell.key]), "cached": ", ".join(cached) or "-"})
    finished = sum(row["done"] == "yes" for row in rows)
    lines = [f"{len(rows)} cells, {finished} done, {len(todo)} to run."]
    lines += [*_totals(chains, each, jobs), *_origins(todo, each, costs)]
    return "\n".join([*_table(rows, width), "", *lines])


def _settings(cell: Cell) -> dict[str, str]:
    recipe = cell.request.recipe
    settings: dict[str, object] = {
        "task": cell.section,
        "model": cell.model,
        "scope": cell.scope,
        "method": cell.method,
        "bits": cell.bits,
        **dict.fromkeys(("s bits", "point", "seed", "steps", "MLP steps", "loss")),
        **dict.fromkeys(("images", "batch", "transform")),
    }
    if recipe is not None:
        settings |= {"point": cell.point, "seed": str(recipe.seed)}
        settings |= {"images": recipe.calibration_images, "transform": recipe.calibration_transform}
        if recipe.s_bits != recipe.a_bits:
            settings["s bits"] = recipe.s_bits
        if recipe.reconstruct_mlp:
            settings |= {"MLP steps": recipe.mlp_steps, "batch": recipe.mlp_batch}
        if recipe.reconstruct:
            settings |= {"steps": recipe.steps, "loss": recipe.loss, "batch": recipe.batch_size}
    return {name: str(value or "-") for name, value in settings.items()}


def _cost(cell: Cell, cost: Cost | None) -> dict[str, str]:
    if cost is None:
        return {"time": "-", "memory": "-"}
    about = "" if cost.source == "measured" else "~"
    # An estimate from the other kind of device says so.
    other = "" if not about or cost.device == device_kind(cell) else f" ({cost.device.upper()})"
    memory = "-" if cost.memory is None else f"{about}{size_text(cost.memory)}"
    return {"time": f"{about}{duration(cost.seconds)}{other}", "memory": memory}


def _table(rows: Sequence[Mapping[str, str]], width: int | None) -> list[str]:
    """Return the table in as many columns as fit.

    Columns that are equal in all rows are said once before it, columns left out are named behind.
    """
    different = {name: {row[name] for row in rows} for name in rows[0]}
    shown = [name for name in rows[0] if name not in _SOMETIMES or different[name] != {"-"}]
    # tabulate leaves two blanks beside each heading.
    widths = {name: max(len(name) + 2, *map(len, different[name])) for name in shown}
    alike, left_out = [], []

    def is_too_wide() -> bool:
        return width is not None and sum(widths[name] + _GAP for name in shown) - _GAP > width

    if is_too_wide() and len(rows) > 1:
        alike = [name for name in shown if name in _LEAST and len(different[name]) == 1]
        shown = [name for name in shown if name not in alike]
    for name in _LEAST:
        if is_too_wide() and name in shown:
            shown.remove(name)
            left_out.append(name)
    lines = []
    if alike:
        lines += [f"All cells: {', '.join(f'{name} {rows[0][name]}' for name in alike)}.", ""]
    cut = [[row[name] for name in shown] for row in rows]
    lines.append(tabulate(cut, headers=shown, disable_numparse=True))
    if left_out:
        names = ", ".join(left_out)
        lines += ["", f"Not shown for lack of width: {names}. A wider terminal or a file has them."]
    return lines


def _totals(
    chains: Sequence[Sequence[Cell]], each: Mapping[Key, Cost | None], jobs: int
) -> list[str]:
    """Return time and memory of what is to run, by kind of device.

    Chains go to ``jobs`` processes as these become free.
    """
    todo = [cell for chain in chains for cell in chain]
    known = [(cell, cost) for cell in todo if (cost := each[cell.key]) is not None]
    if not known:
        return ["Time: not known, nothing alike was measured yet."] if todo else []
    lines = []
    for device in ("gpu", "cpu"):
        mine = [(cell, cost) for cell, cost in known if cost.device == device]
        if not mine:
            continue
        seconds = {cell.key: cost.seconds for cell, cost in mine}
        ends = [0.0] * max(min(jobs, len(chains)), 1)
        for chain in chains:
            work = sum(seconds.get(cell.key, 0.0) for cell in chain)
            heapq.heapreplace(ends, ends[0] + work)
        line = f"{device.upper()} time: about {duration(max(ends))} "
        line += f"at {jobs} job{'' if jobs == 1 else 's'}"
        line += f" ({duration(sum(seconds.values()))} of work; {origins(cost for _, cost in mine)})"
        memory = max((cost.memory for _, cost in mine if cost.memory is not None), default=None)
        line += "" if memory is None else f", largest memory of a cell {size_text(memory)}"
        fixed = (cell for cell, _ in mine if cell.request.device != "auto")
        other = sum(device_kind(cell) != device for cell in fixed)
        line += f"; {other} of these are to run on another kind of device" if other else ""
        lines.append(f"{line}.")
    rest = len(todo) - len(known)
    if rest:
        lines.append(f"{rest} cells are not in this: nothing like them was measured or published.")
    return lines


def _origins(todo: Sequence[Cell], each: Mapping[Key, Cost | None], costs: Costs) -> list[str]:
    used = [cost for cell in todo if (cost := each[cell.key]) is not None]
    sources, lines = {cost.source for cost in used}, []
    for source, words in _MACHINES.items():
        if source in sources or (source == "here" and "measured" in sources):
            counts = costs.machines(source).items()
            texts = [f"{name} ({_cells(count)})" for name, count in counts]
            lines.append(f"Costs of {words}: {'; '.join(texts)}.")
    for source, words in (("published", "minutes"), ("alike", "minutes of methods alike")):
        notes = Counter(cost.note for cost in used if cost.source == source)
        texts = [f"{note} for {_cells(count)}" for note, count in notes.items()]
        lines += [f"Published {words}: {'; '.join(texts)}."] if texts else []
    return lines


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"
