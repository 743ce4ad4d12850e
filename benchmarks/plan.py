"""The plan of a grid: its cells with their settings, costs and what is there of them, as a table, without running anything."""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from benchmarks.cells import Adapter, Cell, Key, RunOptions, finished_record, known_folder, record_in
from benchmarks.costs import (
    REFERENCE,
    Cost,
    CostRow,
    Costs,
    Rows,
    Source,
    cost_row,
    device_kind,
    origins,
    other_rows,
)
from benchmarks.grid import Filters, expand
from benchmarks.schema import Grid
from benchmarks.units import duration, size_text

#: Columns that are shown only where a cell has something there.
_SOMETIMES = ("#", "scope", "s bits", "point", "MLP steps", "time", "memory", "cached")

#: What is left out of a table that is too wide for a terminal, in this order; the rest says which cell is meant.
_LEAST = ("transform", "batch", "s bits", "images", "MLP steps", "loss", "steps", "done", "memory", "task", "seed", "cached")

_GAP = 2

#: Measured costs by their source, for people.
_ORIGINS: dict[Source, str] = {
    "here": "finished cells here", "reference": "the reference", "rehearsal": "the rehearsal"
}  # fmt: skip

#: Finished cells of a method, beyond those planned, that are looked at for its costs.
_ENOUGH = 8


def plan_of(
    grid: Grid, filters: Filters, options: RunOptions, adapter: Adapter, cells: Sequence[Cell], jobs: int,
    width: int | None = None, reference: Path = REFERENCE,
) -> str:  # fmt: skip
    """Return the plan of ``cells``, which ``filters`` leave of a grid; see :func:`plan_text`.

    Args:
        reference: folder with reference costs and the committed rehearsal.
    """
    rows, notes = other_rows([grid.name], options.results, reference)
    known = expand(grid, Filters(), options) if filters.active else cells
    return "\n".join([plan_text(cells, adapter, known, rows, jobs, width, options.force), *notes])


def plan_text(
    cells: Sequence[Cell], adapter: Adapter, known: Sequence[Cell] = (), others: Rows = (), jobs: int = 1,
    width: int | None = None, force: bool = False,
) -> str:  # fmt: skip
    """Return the table of cells and lines with their number, time, memory and where these are from.

    ``done`` tells which have a record already, ``#`` the order in which the others start. ``task`` is the section of the grid.
    ``s bits`` are the bits of attention probabilities where they are not those of the other activations. ``time`` and
    ``memory`` were measured of cells that are done and are estimates (~) of others. ``cached`` is what a cell would find done.

    Args:
        known: of the whole grid, for estimates: costs of what is finished there, too.
        others: costs from elsewhere, for what nothing here tells.
        jobs: cells at a time.
        width: of a terminal: a wider table leaves columns out and says so. None: everything.
        force: measure cells that are done, too.
    """
    folders = {cell.key: known_folder(cell, adapter) for cell in cells}
    done = [(cell, row) for cell in cells if (row := _measured(cell, folders[cell.key])) is not None]
    finished = {cell.key for cell, _ in done}
    todo = [cell for cell in cells if force or cell.key not in finished]
    costs = Costs([*done, *_more(todo, done, known, adapter)], others, [*known, *cells])
    each = {cell.key: costs.of(cell) for cell in cells}
    chains = _chains(todo)
    order = {cell.key: number for number, cell in enumerate((cell for chain in chains for cell in chain), 1)}
    rows = []
    for cell in cells:
        is_done = cell.key in finished
        rows.append({
            "#": str(order.get(cell.key, "-")), **_settings(cell), "done": "yes" if is_done else "no",
            **_cost(cell, each[cell.key]),
            "cached": "-" if is_done else _cached(cell, folders[cell.key], adapter),
        })  # fmt: skip
    lines = [f"{len(rows)} cells, {len(done)} done, {len(todo)} to run.", *_totals(chains, each, jobs)]
    return "\n".join([*_table(rows, width), "", *lines, *_origins(todo, each, costs)])


def _measured(cell: Cell, folder: Path | None) -> CostRow | None:
    record = None if folder is None else record_in(folder)
    return None if record is None else cost_row(cell, record)


def _chains(todo: Sequence[Cell]) -> list[list[Cell]]:
    from benchmarks.run.order import make_chains

    return make_chains(todo)


def _more(
    todo: Sequence[Cell], done: Sequence[tuple[Cell, CostRow]], known: Sequence[Cell], adapter: Adapter
) -> list[tuple[Cell, CostRow]]:
    """Costs of finished cells that are not planned, for methods of which no planned cell is finished."""
    planned = {cell.key for cell in todo} | {cell.key for cell, _ in done}
    has = {_method(cell) for cell, _ in done}
    wanted = dict.fromkeys((_method(cell) for cell in todo if _method(cell) not in has), _ENOUGH)
    found = []
    for cell in known:
        method = _method(cell)
        if wanted.get(method, 0) and cell.key not in planned and (record := finished_record(cell, adapter)) is not None:
            wanted[method] -= 1
            found.append((cell, cost_row(cell, record)))
    return found


def _method(cell: Cell) -> tuple[str, str, str]:
    return cell.section, cell.scope, cell.method


def _settings(cell: Cell) -> dict[str, str]:
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
    return row


def _cost(cell: Cell, cost: Cost | None) -> dict[str, str]:
    if cost is None:
        return {"time": "-", "memory": "-"}
    about = "" if cost.source == "measured" else "~"
    # An estimate from the other kind of device says so.
    other = "" if not about or cost.device == device_kind(cell) else f" ({cost.device.upper()})"
    memory = "-" if cost.memory is None else f"{about}{size_text(cost.memory)}"
    return {"time": f"{about}{duration(cost.seconds)}{other}", "memory": memory}


def _cached(cell: Cell, folder: Path | None, adapter: Adapter) -> str:
    # Without a folder, data or weights are missing: the run says so.
    return "-" if folder is None else ", ".join(adapter.cached(cell.request, folder)) or "-"


def _table(rows: Sequence[Mapping[str, str]], width: int | None) -> list[str]:
    """The table, in as many columns as fit; before it what all rows have alike, behind it what was left out, if need be."""
    shown = [name for name in rows[0] if name not in _SOMETIMES or any(row[name] != "-" for row in rows)]
    # tabulate leaves two blanks beside each heading.
    widths = {name: max(len(name) + 2, *(len(row[name]) for row in rows)) for name in shown}

    def excess() -> int:
        return 0 if width is None else sum(widths[name] + _GAP for name in shown) - _GAP - width

    alike, left_out = [], []
    if excess() > 0 and len(rows) > 1:
        alike = [name for name in shown if name in _LEAST and len({row[name] for row in rows}) == 1]
        shown = [name for name in shown if name not in alike]
    for name in _LEAST:
        if excess() > 0 and name in shown:
            shown.remove(name)
            left_out.append(name)
    lines = [f"All cells: {', '.join(f'{name} {rows[0][name]}' for name in alike)}.", ""] if alike else []
    lines.append(tabulate([[row[name] for name in shown] for row in rows], headers=shown, disable_numparse=True))
    if left_out:
        lines += ["", f"Not shown for lack of width: {', '.join(left_out)}. A wider terminal or a file has them."]
    return lines


def _totals(chains: Sequence[Sequence[Cell]], each: Mapping[Key, Cost | None], jobs: int) -> list[str]:
    """Time and memory of what is to run, by kind of device.

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
        memory = [cost.memory for _, cost in mine if cost.memory is not None]
        line += f", largest memory of a cell {size_text(max(memory))}" if memory else ""
        fixed = [cell for cell, _ in mine if cell.request.device != "auto"]
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
    for source, words in _ORIGINS.items():
        if source in sources or (source == "here" and "measured" in sources):
            machines = costs.machines(source)
            texts = [f"{name} ({_cells(count)})" for name, count in machines.items()]
            lines.append(f"Costs of {words}: {'; '.join(texts)}.")
    for source, words in (("published", "minutes"), ("alike", "minutes of methods alike")):
        notes = Counter(cost.note for cost in used if cost.source == source)
        texts = [f"{note} for {_cells(count)}" for note, count in notes.items()]
        lines += [f"Published {words}: {'; '.join(texts)}."] if texts else []
    return lines


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"
