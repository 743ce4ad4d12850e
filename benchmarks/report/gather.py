"""Content of a report: a grid's cells with their records, failures and unreadable files."""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.grid.cell import Adapter, Cell, RunOptions, known_folder
from benchmarks.grid.expand import FP, Filters, expand
from benchmarks.grid.schema import Grid
from benchmarks.results.scores import Measured, collect
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
        cells: the grid's, and those that a filter of some run added, in the order of tables.
        measured: the finished ones.
        beyond: how many of ``measured`` the grid itself does not have.
        foreign: how many records belong to other grids or settings.
        failed: cells without a record whose last run ended in an error, and the error's last line.
        problems: files that cannot be read, relative to the results, and why.
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
        """Note that a file cannot be read; paths in the message begin at the results folder."""
        self.problems.append((name, str(error).replace(f"{self.results}/", "")))


def gather(grid: Grid, options: RunOptions, adapter: Adapter) -> Gathered:
    """Read the finished cells of ``grid``, and those that runs with filters measured beside it."""
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
    beyond = _beyond(gathered, options, adapter, others)
    gathered.beyond, gathered.foreign = len(beyond), len(others) - len(beyond)
    if beyond:  # group by model as the grid does
        sections, cells = list(grid.tasks), [*own, *beyond]
        models = list(dict.fromkeys(cell.model for cell in cells))
        cells.sort(key=lambda cell: (sections.index(cell.section), models.index(cell.model)))
        gathered.cells, gathered.measured = cells, collect(cells, adapter)
    for item in gathered.measured:
        if item.folder is not None and (problem := outcomes_problem(item.record, item.folder)):
            gathered.add_problem(gathered.relative(item.folder / item.record.outcomes), problem)
    done = {item.cell.key for item in gathered.measured}
    for cell in own:
        folder = None if cell.key in done else known_folder(cell, adapter)
        if folder is not None and not (folder / "result.json").exists():
            line = _last_line(folder / "error.log")
            gathered.failed += [] if line is None else [(cell, line)]
    return gathered


def _beyond(
    gathered: Gathered, options: RunOptions, adapter: Adapter, others: dict[Path, ResultRecord]
) -> list[Cell]:
    """Return the cells that filters can ask of the grid, with folders among those of ``others``."""
    grid, known = gathered.grid, {cell.key for cell in gathered.cells}
    found: dict[object, Cell] = {}
    wanted = dict.fromkeys((r.method, r.w_bit, r.a_bit, r.seed) for r in others.values())
    for section, part in grid.tasks.items():
        models = (*part.models, *part.available)
        for method, w_bit, a_bit, seed in wanted:
            bits = None if w_bit == a_bit == OFF else (bits_name(w_bit, a_bit),)
            seeds = None if seed is None else (seed,)
            try:
                cells = expand(grid, Filters((section,), models, (method,), bits, seeds), options)
            except FimaqError:  # a method that this version does not know, for example
                continue
            for cell in cells:
                folder = known_folder(cell, adapter)
                asked = cell.key not in known and (cell.method == method or method == FP)
                if asked and folder is not None and folder.resolve() in others:
                    found.setdefault(cell.key, cell)
    return list(found.values())


def _last_line(path: Path) -> str | None:
    """Return the last line of a log that says something; None without a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
