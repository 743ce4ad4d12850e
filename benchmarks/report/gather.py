"""Data of a report: the cells of a grid, their records, failures and unreadable files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.grid.cell import Adapter, Cell, RunOptions, known_folder
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import FP, Grid
from benchmarks.results.scores import Damaged, Measured, collect, record_files
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import OFF
from fimaq_core.terminal import one_line
from tasks.common.outcome_files import outcomes_problem
from tasks.common.record import bits_name, read_record

#: Method, bits of weights and activations, and seed of a record.
_Settings = tuple[str, int, int, int | None]


@dataclass
class Gathered:
    """Cells and records that a report shows."""

    grid: Grid
    results: Path  #: root folder of runs
    cells: list[Cell]  #: of the grid, and of runs with filters beyond it, in the order of tables
    measured: list[Measured]  #: the finished cells
    damaged: list[Damaged]  #: cells with unreadable records
    beyond: int = 0  #: number of ``measured`` cells that are not in the grid
    foreign: int = 0  #: number of records of other grids or settings
    #: Unmeasured cells whose last run failed, with the last line of the error log.
    failed: list[tuple[Cell, str]] = field(default_factory=list)
    #: Unreadable files, with the reason.
    problems: list[tuple[str, str]] = field(default_factory=list)
    unreadable: int = 0  #: number of records among ``problems``

    def relative(self, path: Path) -> str:
        """Return ``path`` relative to the results folder, or the name of a file elsewhere."""
        if path.is_relative_to(self.results):
            return path.relative_to(self.results).as_posix()
        try:
            return path.resolve().relative_to(self.results.resolve()).as_posix()
        except ValueError:
            return path.name

    def add_problem(self, name: str, error: object) -> None:
        """Note an unreadable file, with paths relative to the results folder in the message."""
        self.problems.append((name, one_line(str(error)).replace(f"{self.results}/", "")))


def gather(grid: Grid, options: RunOptions, adapter: Adapter) -> Gathered:
    """Read the finished cells of ``grid``, and those that runs with filters measured beyond it."""
    own = list({cell.key: cell for cell in expand(grid, Filters(), options)}.values())
    gathered = Gathered(grid, options.results, own, *collect(own, adapter))
    known = {item.folder for item in gathered.measured if item.folder is not None}
    for one in gathered.damaged:
        folder = known_folder(one.cell, adapter)
        if folder is not None:
            known.add(folder)
            gathered.add_problem(gathered.relative(folder / "result.json"), one.message)
    others: dict[Path, _Settings] = {}
    paths, problems = record_files(options.results / "runs")
    for problem in problems:
        gathered.add_problem("runs", problem)
    for path in paths:
        if path.parent not in known:
            try:
                record = read_record(path)
                settings = record.method, record.w_bit, record.a_bit, record.seed
                others[path.parent] = settings
            except FimaqError as error:
                gathered.add_problem(gathered.relative(path), error)
    gathered.unreadable = len(gathered.problems)
    beyond = _beyond(gathered, options, adapter, others)
    gathered.beyond, gathered.foreign = len(beyond), len(others) - len(beyond)
    if beyond:  # in the order of the grid's sections and models
        sections, cells = list(grid.tasks), [*own, *beyond]
        models = list(dict.fromkeys(cell.model for cell in cells))
        order = {
            cell.key: (sections.index(cell.section), models.index(cell.model)) for cell in cells
        }
        gathered.measured += collect(beyond, adapter).measured
        gathered.cells = sorted(cells, key=lambda cell: order[cell.key])
        gathered.measured.sort(key=lambda item: order[item.cell.key])
    for item in gathered.measured:
        if item.folder is not None and (problem := outcomes_problem(item.record, item.folder)):
            gathered.add_problem(gathered.relative(item.folder / item.record.outcomes), problem)
    done = {item.cell.key for item in (*gathered.measured, *gathered.damaged)}
    for cell in own:
        folder = None if cell.key in done else known_folder(cell, adapter)
        if folder is not None and (last := _last_line(folder / "error.log")) is not None:
            gathered.failed.append((cell, last))
    return gathered


def _last_line(log: Path) -> str | None:
    """Return the last line of an error log; None if there is none."""
    try:
        if not log.is_file():
            return None
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 100_000))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return None
    return text.rstrip().rpartition("\n")[2].strip()


def _beyond(
    gathered: Gathered, options: RunOptions, adapter: Adapter, others: Mapping[Path, _Settings]
) -> list[Cell]:
    """Return the cells that filters would add to the grid and whose folders are in ``others``."""
    found = {cell.key: cell for cell in gathered.cells}
    own = set(found)
    wanted = dict.fromkeys(others.values())
    for section, part in gathered.grid.tasks.items():
        models = (*part.models, *part.available)
        for method, w_bit, a_bit, seed in wanted:
            bits = None if w_bit == a_bit == OFF else (bits_name(w_bit, a_bit),)
            seeds = None if seed is None else (seed,)
            filters = Filters((section,), models, (method,), bits, seeds)
            try:
                cells = expand(gathered.grid, filters, options)
            except FimaqError:  # for example, a method that this version does not have
                continue
            for cell in cells:
                folder = known_folder(cell, adapter)
                asked = method in (cell.method, FP) and folder is not None
                if asked and folder in others:
                    found.setdefault(cell.key, cell)
    return [cell for key, cell in found.items() if key not in own]
