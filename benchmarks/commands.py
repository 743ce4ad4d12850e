"""What the commands do, behind their options."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.cells import Adapter, Cell, Places, RunOptions, finished, finished_record
from benchmarks.engines.options import EngineOptions
from benchmarks.grid import Filters, chosen_axes, expand
from benchmarks.schema import Grid
from fimaq_core.errors import FimaqError
from tasks.common.anew import is_done
from tasks.common.record import own_seconds

if TYPE_CHECKING:
    from benchmarks.published.layout import Layout
    from benchmarks.published.table import PublishedTable


class NotReady(FimaqError):
    """The run cannot start; the text holds whole error lines, printed as they are."""


def run_grid(
    grid: Grid,
    profile: str,
    filters: Filters,
    options: RunOptions,
    adapter: Adapter,
    how: EngineOptions,
    plan: bool,
    report: bool = False,
    table: PublishedTable | None = None,
) -> int:
    """Run a grid and return the exit code. See ``python -m benchmarks run --help``.

    Args:
        profile: what the user called the grid: a profile, or the table.
        table: the published table that the grid is of; its layout replaces the grid's own tables.
    """
    from benchmarks.display import make_display
    from benchmarks.engines.choice import engine_maker, settled
    from benchmarks.engines.local import default_jobs
    from benchmarks.plan import plan_of
    from benchmarks.preflight import missing
    from benchmarks.runner import Runner

    cells = expand(grid, filters, options)
    if not cells:
        raise FimaqError("The filters leave no cell.")
    if plan:
        at_once = how.jobs or grid.jobs or default_jobs(options.threads or grid.threads, options.device or grid.device)
        print(plan_of(grid, filters, options, adapter, cells, at_once, _terminal_width()))
        return 0
    measured = {cell.key: found for cell in cells if (found := finished(cell, adapter)) is not None}
    done = {key for key, (_, folder) in measured.items() if is_done(folder / "result.json", options.force)}
    todo = [cell for cell in cells if cell.key not in done]
    failures = []
    if todo:
        messages = missing(todo, adapter)
        if messages:
            raise NotReady(
                "\n".join([*(f"error: {message}" for message in messages), *_way_around(grid, todo, options, adapter)])
            )
        threads = options.threads or grid.threads
        options = settled(options, how, options.device or grid.device, threads)
        todo_keys = {cell.key for cell in todo}
        todo = [cell for cell in expand(grid, filters, options) if cell.key in todo_keys]
        display = make_display(Console(highlight=False), options.results / "runs" / ".state", how.name)
        if options.force:
            print(
                f"Measuring again, as run {options.force}: broken off, it goes on with --force={options.force} (FORCE= for make)."
            )
        logs = options.results / "runs" / ".logs" / f"{platform.node()}-{os.getpid()}"  # several may run on one folder
        make_engine = engine_maker(options, how, threads, grid.jobs, logs)
        with _ended_as_by_hand():
            runner = Runner(adapter, display, make_engine, len(cells) - len(todo), how.retries)
            runner.learn((cell, own_seconds(measured[cell.key][0])) for cell in cells if cell.key in measured)
            failures = runner.run(todo)
        if not failures:
            shutil.rmtree(logs, ignore_errors=True)
    else:
        print(f"All {len(cells)} cells are done already.")
    layout = None
    if table is None:
        write_tables(grid, filters, options, adapter, cells)
    else:
        layout = write_published(table, grid, options, adapter, cells)
    if report:
        from benchmarks.report.build import write_report

        path = options.results / "report.html"
        write_report(grid, options, adapter, path, table=table)
        print(f"Report: {path} (charts, error per block, example predictions; open it in a browser)")
    for line in grid.next:
        print(line)
    sentence, code = ("", 0) if layout is None else layout.conclusion()
    if sentence:
        print(sentence)
    if failures:
        print(f"\n{len(failures)} of {len(cells)} cells failed:", file=sys.stderr)
        for failure in failures:
            log = f" (details: {failure.log})" if failure.log else ""
            kept = " The table keeps its former value." if finished_record(failure.cell, adapter) else ""
            print(f"  {failure.cell.label}: {failure.message}{log}{kept}", file=sys.stderr)
        print("Finished cells are kept. To run only the failed ones:", file=sys.stderr)
        again = rerun_command(
            profile,
            [f.cell for f in failures],
            options,
            how,
            filters.axes,
            "--profile" if table is None else "--table",
        )
        print(f"  {again}", file=sys.stderr)
    return 1 if failures else code


@contextmanager
def _ended_as_by_hand() -> Iterator[None]:
    """Let SIGTERM, which schedulers send before time is up, do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only that one hears of signals
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough, and ending takes a moment
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _way_around(grid: Grid, cells: Sequence[Cell], options: RunOptions, adapter: Adapter) -> list[str]:
    """Say which sections cannot run, and how to leave those out; nothing where there is one section only.

    They are those whose data were not given and, unless all the others lack something, those that lack something all the same:
    weights, or parts of a folder that serves several sections.
    """
    from benchmarks.preflight import missing

    sections = list(dict.fromkeys(cell.section for cell in cells))
    data = {section: grid.tasks[section].data for section in sections}
    blocked = [section for section in sections if data[section] != "own" and options.data.of(data[section]) is None]
    given = [section for section in sections if section not in blocked]
    lacking = [section for section in given if missing([cell for cell in cells if cell.section == section], adapter)]
    if lacking == given:
        lacking = []
    if not (blocked or lacking) or len(sections) == 1:
        return []
    rest = [section for section in given if section not in lacking]
    names, what = (",".join(rest), "the rest") if rest else (blocked[0], "one of them")
    words = []
    if blocked:
        wanted = (f"{section} ({data[section].upper()}=/path or --{data[section]})" for section in blocked)
        words.append(f"Data not given: {', '.join(wanted)}.")
    if lacking:
        words.append(f"Not all there: {', '.join(lacking)}.")
    return [" ".join([*words, f"To run {what}: TASKS={names} for make, --tasks {names} for a grid."])]


def write_tables(grid: Grid, filters: Filters, options: RunOptions, adapter: Adapter, cells: Sequence[Cell]) -> None:
    """Write the profile's table files, print the table of ``cells`` and compare it with the reference.

    The files cover the whole grid's finished cells and this run's: a run with filters never shrinks them.
    """
    from benchmarks import latex, reference, summary, tables

    full = expand(grid, Filters(), options)
    known = {cell.key for cell in full}
    # The grid's own cells win: a run with filtered axes knows fewer places of the same cell.
    everything = [*full, *(cell for cell in cells if cell.key not in known)]
    if filters.active:
        # In the grid's order, also where this run went beyond it: group by model as the grid does.
        order = {model: index for index, model in enumerate(dict.fromkeys(cell.model for cell in everything))}
        everything.sort(key=lambda cell: (list(grid.tasks).index(cell.section), order[cell.model]))
    measured = tables.collect(everything, adapter)
    folder = options.results / "tables"
    tables.write_text(folder / f"{grid.name}.csv", tables.csv_text(tables.frame(measured)[tables.COLUMNS]))
    tables.write_text(folder / f"{grid.name}.md", summary.report(title(grid), measured, everything, axes=grid.axes))
    tables.write_text(folder / f"{grid.name}.tex", latex.report(grid.name, measured, everything, grid.axes))
    keys = {cell.key for cell in cells}
    mine = [item for item in measured if item.cell.key in keys]
    width = _terminal_width()
    print()
    print(summary.report(title(grid), mine, cells, width, chosen_axes(grid, filters)))
    for line in reference.compare(grid, mine):
        print(line)
    print(f"Table: {folder / f'{grid.name}.csv'} and {folder / f'{grid.name}.md'}")


def write_published(
    table: PublishedTable,
    grid: Grid,
    options: RunOptions,
    adapter: Adapter,
    cells: Sequence[Cell],
) -> Layout:
    """Write the files of a published table, print what of it ``cells`` measure, and return that.

    The files cover the whole table and this run's cells: a run with filters never shrinks them.
    """
    from benchmarks import tables
    from benchmarks.published import text
    from benchmarks.published.layout import Layout

    full = expand(grid, Filters(), options)
    measured = tables.collect([*full, *cells], adapter)
    paths = text.write(Layout(table, measured), options.results / "tables")
    keys = {cell.key for cell in cells}
    mine = [item for item in measured if item.cell.key in keys]
    layout = Layout(table, mine, {cell.name for cell in cells})
    print()
    print(text.markdown(layout, _terminal_width()))
    print(f"Table: {', '.join(map(str, paths))}")
    return layout


def _terminal_width() -> int | None:
    return Console().width if sys.stdout.isatty() else None


def title(grid: Grid) -> str:
    """Return the heading of a grid's table."""
    return f"Profile {grid.name}" + (f": {grid.description}" if grid.description else "")


def rerun_command(
    profile: str,
    cells: Sequence[Cell],
    options: RunOptions,
    how: EngineOptions,
    axes: Sequence[str] | None = None,
    option: str = "--profile",
) -> str:
    """Return the command that runs just these cells. It may name finished ones beside them, which are skipped."""

    def values(name: str) -> str:
        chosen = cells
        if name == "bits":
            chosen = [cell for cell in cells if cell.bits != "fp"]
        elif name == "seed":
            chosen = [cell for cell in cells if cell.seed is not None]
        found = [getattr(cell, name) for cell in chosen]
        return ",".join(dict.fromkeys(str(value) for value in found))

    parts = [_python(), "-m", "benchmarks", "run", option, profile]
    if options.rehearsal:  # which makes its data and weights
        parts.append("--rehearse")
        options = dataclasses.replace(options, data=Places(), weights=None, results=options.results.parent)
    for flag, value in (
        ("--tasks", values("section")), ("--models", values("model")), ("--methods", values("method")),
        ("--bits", values("bits")), ("--seeds", values("seed")), ("--axes", ",".join(axes or ())), ("--device", options.device),
        *((f"--{place.name}", getattr(options.data, place.name)) for place in dataclasses.fields(options.data)),
        ("--weights", options.weights), ("--threads", options.threads), ("--placement", options.placement), *how.flags,
    ):  # fmt: skip
        if value or flag == "--retries":
            parts += [flag, str(value)]
    if options.results != Path("results"):
        parts += ["--results", str(options.results)]
    if options.force:
        parts.append(f"--force={options.force}")
    return shlex.join(parts)


def _python() -> str:
    relative = os.path.relpath(sys.executable)
    return "python" if relative.startswith("..") else relative


def run_reference(grid: Grid, options: RunOptions, adapter: Adapter, add: bool = False) -> int:
    """Write the reference of a finished grid, or ``add`` another processor's cells to it, and return the exit code."""
    from benchmarks import reference, summary, tables

    cells = expand(grid, Filters(), options)
    measured = tables.collect(cells, adapter)
    if not measured if add else len(measured) < len(cells):
        raise FimaqError(
            f"Only {len(measured)} of {len(cells)} cells of '{grid.name}' are measured, and a reference needs all: "
            f"run `make reproduce-table PROFILE={grid.name}` first."
        )
    if add:
        print(f"wrote {reference.add_processor(grid, measured)}")
        return 0
    for path in reference.write_reference(grid, measured, summary.report(title(grid), measured, cells, axes=grid.axes)):
        print(f"wrote {path}")
    return 0


def run_diff(results: Path, show_all: bool, nothing: int = 2) -> int:
    """Compare all records with published numbers, print and write the table, and return the exit code.

    Args:
        results: root of what runs wrote.
        show_all: also list what has no published number.
        nothing: the exit code where nothing is comparable.
    """
    from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

    from benchmarks import diff, tables
    from benchmarks.results.scores import read_records

    found, problems = read_records(results / "runs")
    records = [record for _, record in found]
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if not records:
        print(f"Nothing is comparable yet: nothing is measured under {results / 'runs'}. Run `make reproduce-table` first.")
        return nothing
    table = diff.diff(records)
    path = results / "tables" / "diff.csv"
    tables.write_text(path, tables.csv_text(table))
    judged = table[table["verdict"] != diff.NOT_COMPARABLE]
    shown = table if show_all else table[table["published"].notna()]
    if not shown.empty:
        columns = [name for name in diff.COLUMNS if name not in ("task", "dataset", "seeds")]
        print(tabulate(shown[columns].fillna("").values.tolist(), headers=columns, floatfmt=".2f"))
        print()
    hidden = table[~table.index.isin(shown.index)]
    for reason, count in hidden["reason"].value_counts().items():
        print(f"{count} measured values: {reason}.")
    if judged.empty:
        print(
            "Nothing is comparable yet: no measured number is on the same data, weights, settings and bits as a published one. "
            "For that: make reproduce-table TABLE=fimaq IMAGENET=/path/to/imagenet"
        )
        return nothing
    counts = ", ".join(f"{count} {verdict}" for verdict, count in judged["verdict"].value_counts().items())
    print(f"{len(judged)} comparisons: {counts}. Table: {path}")
    return 0 if (judged["verdict"] == diff.REPRODUCED).all() else 1
