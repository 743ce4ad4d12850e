"""What a report is about: a grid's cells with their records, what failed, and what could not be read."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.cells import Adapter, Cell, RunOptions
from benchmarks.grid import FP, Filters, expand
from benchmarks.schema import Grid
from benchmarks.tables import Measured, collect
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import OFF
from tasks.common.record import ResultRecord, bits_name, outcomes_problem, read_record

#: Bytes at the end of an error log in which its last line is looked for.
_TAIL = 4096


@dataclass(frozen=True)
class Problem:
    """A file that could not be read, relative to the results, and why."""

    path: str
    message: str


@dataclass(frozen=True)
class Failed:
    """A cell without a record whose last run ended in an error, and that error's last line."""

    cell: Cell
    message: str


@dataclass(frozen=True)
class Gathered:
    """Everything a report shows.

    Attributes:
        results: root of what runs wrote.
        cells: the grid's, and those that a filter of some run added to it, each once, in the order of tables.
        measured: the finished ones.
        beyond: how many of ``measured`` the grid itself does not have.
        foreign: records under the results that belong to other grids or settings.
    """

    grid: Grid
    results: Path
    cells: list[Cell]
    measured: list[Measured]
    beyond: int
    failed: list[Failed]
    problems: list[Problem]
    foreign: int

    def relative(self, path: Path) -> str:
        """``path`` as readers know it: from the results folder on."""
        try:
            return path.resolve().relative_to(self.results.resolve()).as_posix()
        except ValueError:
            return path.name


def gather(grid: Grid, options: RunOptions, adapter: Adapter) -> Gathered:
    """Read the finished cells of ``grid``, also those that runs with filters measured beside it; see :class:`Gathered`."""
    own = list({cell.key: cell for cell in expand(grid, Filters(), options)}.values())
    measured = collect(own, adapter)
    known = {item.folder.resolve() for item in measured if item.folder is not None}
    gathered = Gathered(grid, options.results, own, [], 0, [], [], 0)
    others: dict[Path, ResultRecord] = {}
    for path in sorted((options.results / "runs").rglob("result.json")):
        if path.parent.resolve() in known:
            continue
        try:
            others[path.parent.resolve()] = read_record(path)
        except FimaqError as error:
            message = str(error).replace(f"{options.results}/", "")
            gathered.problems.append(Problem(gathered.relative(path), message))
    beyond = list(_beyond(grid, options, adapter, others, {cell.key for cell in own}))
    order = {model: index for index, model in enumerate(dict.fromkeys(cell.model for cell in [*own, *beyond]))}
    cells = [*own, *beyond]
    if beyond:  # group by model as the grid does
        cells.sort(key=lambda cell: (list(grid.tasks).index(cell.section), order[cell.model]))
        place = {cell.key: index for index, cell in enumerate(cells)}
        measured = sorted([*measured, *collect(beyond, adapter)], key=lambda item: place[item.cell.key])
    for item in measured:
        problem = None if item.folder is None else outcomes_problem(item.record, item.folder)
        if item.folder is not None and problem is not None:
            message = problem.replace(f"{options.results}/", "")
            gathered.problems.append(Problem(gathered.relative(item.folder / item.record.outcomes), message))
    done = {item.cell.key for item in measured}
    return replace(
        gathered,
        cells=cells,
        measured=measured,
        beyond=len(beyond),
        failed=list(_failed([cell for cell in own if cell.key not in done], adapter)),
        foreign=len(others) - len(beyond),
    )


def _beyond(
    grid: Grid, options: RunOptions, adapter: Adapter, others: dict[Path, ResultRecord], known: set[object]
) -> Iterator[Cell]:
    """Yield the cells that filters can ask of ``grid`` and whose folder is among ``others``, those of records."""
    wanted = dict.fromkeys((r.method, bits_name(r.w_bit, r.a_bit), r.w_bit == OFF == r.a_bit, r.seed) for r in others.values())
    seen = set(known)
    for section, part in grid.tasks.items():
        models = (*part.models, *part.available)
        for method, bits, full, seed in wanted:
            filters = Filters((section,), models, (method,), None if full else (bits,), None if seed is None else (seed,))
            for cell in _expanded(grid, filters, options, method):
                if cell.key not in seen and _folder(cell, adapter) in others:
                    seen.add(cell.key)
                    yield cell


def _expanded(grid: Grid, filters: Filters, options: RunOptions, method: str) -> list[Cell]:
    """The cells of ``filters``; none where the grid cannot have them, such as a method that this version does not know."""
    try:
        return [cell for cell in expand(grid, filters, options) if cell.method == method or method == FP]
    except FimaqError:
        return []


def _folder(cell: Cell, adapter: Adapter) -> Path | None:
    try:
        return adapter.planned_folder(cell.request).resolve()
    except FimaqError:
        return None


def inside(folder: Path, name: str) -> Path | None:
    """The file called ``name`` in ``folder``; None where that is no plain name, or a link that leads elsewhere."""
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError):  # a null byte, a loop of links
        return None
    return path if path.parent == folder.resolve() and Path(name).name == name else None


def _failed(cells: Sequence[Cell], adapter: Adapter) -> Iterator[Failed]:
    for cell in cells:
        folder = _folder(cell, adapter)
        if folder is not None and not (folder / "result.json").exists():
            line = _last_line(folder / "error.log")
            if line is not None:
                yield Failed(cell, line)


def _last_line(path: Path) -> str | None:
    """The last line of a log that says something; None without a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines: Iterable[str] = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(list(lines)) if line.strip()), "")
