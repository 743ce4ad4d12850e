"""Plan of a run: its cells with their settings and costs, and the finished cells."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from benchmarks.console import duration, size_text
from benchmarks.costs.sources import MEASURED, REFERENCE, Cost, device_kind, gather
from benchmarks.grid.cell import Cell, Key, known_folder
from benchmarks.grid.expand import Filters, expand
from benchmarks.run.options import RunRequest
from benchmarks.run.order import make_chains

_COLUMNS = (
    "#", "task", "model", "scope", "method", "bits", "s bits", "point", "seed", "steps",
    "MLP steps", "loss", "images", "batch", "transform", "done", "time", "memory", "cached",
)  # fmt: skip
#: Columns that become one line before the table if all cells have the same value.
_COMMON = (
    "task", "scope", "s bits", "point", "seed", "steps", "MLP steps", "loss", "images", "batch",
    "transform",
)  # fmt: skip
#: Columns that a table wider than the terminal leaves out, in this order.
_LEAST = (
    "transform", "batch", "s bits", "images", "MLP steps", "loss", "steps", "done", "memory",
    "task", "seed", "cached",
)  # fmt: skip


class Plan(NamedTuple):
    """Plan of a run."""

    text: str
    unreadable: list[str]  #: one message per cell whose record cannot be read


def make_plan(request: RunRequest, width: int | None = None, reference: Path = REFERENCE) -> Plan:
    """Return the table of a run's cells, then their number, total time, memory and cost sources.

    ``#`` is the order in which cells start. ``s bits`` are the bits of attention probabilities if
    they differ from the bits of other activations. ``~`` marks an estimate; CPU or GPU follows if
    it is of the other kind of device. ``cached`` names results that an unfinished cell will reuse.
    A table wider than ``width`` characters leaves columns out and says so.
    """
    grid, options, adapter = request.grid, request.options, request.adapter
    cells = request.cells()
    others = expand(grid, Filters(), options) if request.filters != Filters() else ()
    every = list({cell.key: cell for cell in (*cells, *others)}.values())
    costs, warnings = gather(every, adapter, [grid.name], options.results, reference)
    each = {cell.key: costs.of(cell) for cell in cells}
    done = {key for key, cost in each.items() if cost is not None and cost.source == MEASURED}
    bad = {} if options.force else costs.unreadable
    todo = [cell for cell in cells if options.force or cell.key not in (done | bad.keys())]
    chains = make_chains(todo)
    order = {cell.key: n for n, cell in enumerate((c for chain in chains for c in chain), 1)}
    rows = []
    for cell in cells:
        is_done, folder = cell.key in done, known_folder(cell, adapter)
        cached = [] if is_done or folder is None else adapter.cached(cell.request, folder)
        row = _settings(cell) | _cost(cell, each[cell.key]) | {"cached": ", ".join(cached)}
        state = "yes" if is_done else "unreadable" if cell.key in bad else "no"
        row |= {"#": order.get(cell.key), "done": state}
        rows.append({name: str(row.get(name) or "-") for name in _COLUMNS})
    own = [bad[cell.key] for cell in cells if cell.key in bad]
    unread = f", {len(own)} with unreadable records" if own else ""
    counts = f"{len(rows)} cells, {len(done)} done{unread}, {len(todo)} to run."
    totals = _totals(chains, each, request)
    return Plan("\n".join([*_table(rows, width), "", counts, *totals, *warnings]), own)


def _settings(cell: Cell) -> dict[str, object]:
    recipe = cell.request.recipe
    settings: dict[str, object] = {
        "task": cell.section, "model": cell.model, "scope": cell.scope, "method": cell.method,
        "bits": cell.bits, "point": cell.point,
    }  # fmt: skip
    if recipe is not None:
        settings |= {"seed": str(recipe.seed), "images": recipe.calibration_images}
        settings["transform"] = recipe.calibration_transform
        if recipe.s_bits != recipe.a_bits:
            settings["s bits"] = recipe.s_bits
        if recipe.reconstruct_mlp:
            settings |= {"MLP steps": recipe.mlp_steps, "batch": recipe.mlp_batch}
        if recipe.reconstruct:
            settings |= {"steps": recipe.steps, "loss": recipe.loss, "batch": recipe.batch_size}
    return settings


def _cost(cell: Cell, cost: Cost | None) -> dict[str, str]:
    if cost is None:
        return {}
    about = "" if cost.source == MEASURED else "~"
    other = f" ({cost.device.upper()})" if about and cost.device != device_kind(cell) else ""
    memory = "" if cost.memory is None else f"{about}{size_text(cost.memory)}"
    return {"time": f"{about}{duration(cost.seconds)}{other}", "memory": memory}


def _table(rows: Sequence[Mapping[str, str]], width: int | None) -> list[str]:
    """Return the table with the columns that fit into ``width`` and are not empty."""
    values = {name: {row[name] for row in rows} for name in _COLUMNS}
    shown = [name for name in _COLUMNS if values[name] != {"-"}]
    several = len(rows) > 1
    common = [name for name in shown if several and name in _COMMON and len(values[name]) == 1]
    shown = [name for name in shown if name not in common]
    # tabulate adds two blanks to a heading, and two between columns.
    widths = {name: max(len(name) + 2, *map(len, values[name])) + 2 for name in shown}
    left_out: list[str] = []
    for name in _LEAST:
        if width is not None and sum(widths[one] for one in shown) - 2 > width and name in shown:
            shown.remove(name)
            left_out.append(name)
    lines = []
    if common:
        lines = [f"All cells: {', '.join(f'{name} {rows[0][name]}' for name in common)}.", ""]
    cut = [[row[name] for name in shown] for row in rows]
    lines.append(tabulate(cut, headers=shown, disable_numparse=True))
    if left_out:
        names = ", ".join(left_out)
        words = "A wider terminal or a file shows them."
        lines += ["", f"Not shown for lack of width: {names}. {words}"]
    return lines


def _totals(
    chains: Sequence[Sequence[Cell]], each: Mapping[Key, Cost | None], request: RunRequest
) -> Iterator[str]:
    """Yield the time and memory of the cells to run, by kind of device, and the cost sources."""
    found = [[each[cell.key] for cell in chain] for chain in chains]
    costs = [cost for chain in found for cost in chain if cost is not None]
    for device in ("gpu", "cpu"):
        own = [cost for cost in costs if cost.device == device]
        if own:
            # The cells of a chain run one after another while other processes have work.
            parts = [[c.seconds for c in chain if c and c.device == device] for chain in found]
            longest = max(map(sum, parts))
            work, jobs = sum(cost.seconds for cost in own), request.jobs
            yield (
                f"{device.upper()} time: about {duration(max(work / jobs, longest))} with --jobs "
                f"{jobs} ({duration(work)} of work). "
                f"Largest memory of a cell: {size_text(max(cost.memory or 0 for cost in own))}."
            )
    unknown = sum(map(len, chains)) - len(costs)
    if unknown:
        yield f"{unknown} cells are not in these times: nothing similar was measured or published."
    if costs:
        yield "Sources of these costs, with their number of cells:"
        counts = Counter(cost.origin for cost in costs)
        yield from (f"{count:6d}  {origin}" for origin, count in counts.items())
