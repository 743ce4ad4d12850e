"""What a report is about: a grid's cells with their records, what failed, and what could not be read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cells import Adapter, Cell, RunOptions, known_folder
from benchmarks.grid import FP, Filters, expand
from benchmarks.results.scores import Measured, collect
from benchmarks.schema import Grid
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import OFF
from tasks.common.record import ResultRecord, bits_name, outcomes_problem, read_record

#: Bytes at the end of an error log in which its last line is looked for.
_TAIL = 4096


@dataclass
class Gathered:
    """Everything a report shows.

    Attributes:
        results: root of what runs wrote.
        cells: the grid's, and those that a filter of some run added to it, each once, in the order of tables.
        measured: the finished ones.
        beyond: how many of ``measured`` the grid itself does not have.
        foreign: how many records under the results belong to other grids or settings.
        failed: cells without a record whose last run ended in an error, and that error's last line.
        problems: files that could not be read, relative to the results, and why.
    """

    grid: Grid
    results: Path
    cells: list[Cell]
    measured: list[Measured]
    beyond: int = 0
    foreign: int = 0
    failed: list[tuple[Cell, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def relative(self, path: Path) -> str:
        """Return ``path`` as readers know it: from the results folder on."""
        try:
            return path.resolve().relative_to(self.results.resolve()).as_posix()
        except ValueError:
            return path.name

    def add_problem(self, name: str, error: object) -> None:
        """Note that a file could not be read; its message says paths from the results folder on."""
        self.problems.append((name, str(error).replace(f"{self.results}/", "")))


def gather(grid: Grid, options: RunOptions, adapter: Adapter) -> Gathered:
    """Read the finished cells of ``grid``, also those that runs with filters measured beside it."""
    own = list({cell.key: cell for cell in expand(grid, Filters(), options)}.values())
    gathered = Gathered(grid, options.results, own, collect(own, adapter))
    known = {item.folder.resolve() for item in gathered.measured if item.folder is not None}
    others: dict[Path, ResultRecord] = {}
    for path in sorted((options.results / "runs").rglob("result.json")):
        if path.parent.resolve() not in known:
            try:
                others[path.parent.resolve()] = read_record(path)
            except FimaqError as error:
                gathered.add_problem(gathered.relative(path), error)
    beyond = _beyond(grid, options, adapter, others, own)
    gathered.beyond, gathered.foreign = len(beyond), len(others) - len(beyond)
    if beyond:  # group by model as the grid does
        models = list(dict.fromkeys(cell.model for cell in [*own, *beyond]))
        place = (list(grid.tasks).index, models.index)
        gathered.cells = sorted([*own, *beyond], key=lambda cell: (place[0](cell.section), place[1](cell.model)))
        gathered.measured = collect(gathered.cells, adapter)
    for item in gathered.measured:
        problem = None if item.folder is None else outcomes_problem(item.record, item.folder)
        if item.folder is not None and problem is not None:
            gathered.add_problem(gathered.relative(item.folder / item.record.outcomes), problem)
    done = {item.cell.key for item in gathered.measured}
    for cell in own:
        folder = None if cell.key in done else known_folder(cell, adapter)
        line = None if folder is None or (folder / "result.json").exists() else _last_line(folder / "error.log")
        if line is not None:
            gathered.failed.append((cell, line))
    return gathered


def _beyond(
    grid: Grid, options: RunOptions, adapter: Adapter, others: dict[Path, ResultRecord], own: Sequence[Cell]
) -> list[Cell]:
    """Return the cells that filters can ask of ``grid`` and whose folder is among ``others``, those of records."""
    found: dict[object, Cell] = {}
    known = {cell.key for cell in own}
    wanted = dict.fromkeys((r.method, bits_name(r.w_bit, r.a_bit), r.w_bit == OFF == r.a_bit, r.seed) for r in others.values())
    for section, part in grid.tasks.items():
        models = (*part.models, *part.available)
        for method, bits, full, seed in wanted:
            filters = Filters((section,), models, (method,), None if full else (bits,), None if seed is None else (seed,))
            try:
                cells = expand(grid, filters, options)
            except FimaqError:  # the grid cannot have it, such as a method that this version does not know
                continue
            for cell in cells:
                folder = known_folder(cell, adapter)
                asked = cell.method == method or method == FP
                if asked and cell.key not in known and folder is not None and folder.resolve() in others:
                    found.setdefault(cell.key, cell)
    return list(found.values())


def inside(folder: Path, name: str) -> Path | None:
    """Return the file called ``name`` in ``folder``; None where that is no plain name, or a link that leads elsewhere."""
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError):  # a null byte, a loop of links
        return None
    return path if path.parent == folder.resolve() and Path(name).name == name else None


def _last_line(path: Path) -> str | None:
    """Return the last line of a log that says something; None without a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
