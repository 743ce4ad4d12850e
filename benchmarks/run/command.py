"""Run of a grid: measures its cells, writes its tables, lists failed cells."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.grid.cell import Adapter, Cell, Key, finished
from benchmarks.grid.preflight import missing, not_made
from benchmarks.run.options import RunRequest, make_executor, settled
from fimaq_core.errors import FimaqError
from fimaq_core.progress import PrintableConsole
from tasks.common.record import ResultRecord, own_seconds

if TYPE_CHECKING:
    from benchmarks.run.runner import Failure


def run_grid(request: RunRequest) -> int:
    """Measure the cells that are not finished, and write tables; see ``run --help``.

    Returns:
        The exit code: 0; 1 if cells failed or numbers differ from the published table; 2 if
        records cannot be read.

    Raises:
        FimaqError: data or weights are missing.
    """
    cells, adapter = request.cells(), request.adapter
    measured, unreadable = _records(cells, adapter)
    known = {} if request.options.force else measured | unreadable
    todo = [cell for cell in cells if cell.key not in known]
    absent = {cell.key: message for cell in todo if (message := not_made(cell)) is not None}
    todo = [cell for cell in todo if cell.key not in absent]
    failures: list[Failure] = []
    try:
        if todo:
            messages = missing(todo, adapter)
            if messages:
                lines = ["\nerror: ".join(messages), *_runnable_sections(request, todo)]
                raise FimaqError("\n".join(lines))
            request = settled(request)
            _measure(request, {cell.key for cell in todo}, measured, failures)
        elif not unreadable and not absent:
            print(f"All {len(cells)} cells are done already.")
        code, complete = _write(request, cells)
        for message, count in Counter(absent.values()).items():
            print(f"{count} of {len(cells)} cells were left out. {message}", file=sys.stderr)
    finally:  # also if tables cannot be written, or the run is stopped
        _print_failures(failures, len(cells))
    if unreadable and not request.options.force:
        print(
            f"\n{len(unreadable)} of {len(cells)} cells were not measured, since their records "
            "cannot be read (see above): restore or delete these records. With --force, all cells "
            "of the command are measured again.",
            file=sys.stderr,
        )
    return 1 if failures and complete else code


def _records(
    cells: Sequence[Cell], adapter: Adapter
) -> tuple[dict[Key, ResultRecord], dict[Key, FimaqError]]:
    """Return the records of finished cells, and the reasons why records cannot be read."""
    measured, unreadable = {}, {}
    for cell in cells:
        try:
            done = finished(cell, adapter)
        except FimaqError as error:
            unreadable[cell.key] = error
        else:
            if done is not None:
                measured[cell.key] = done[0]
    return measured, unreadable


def _print_failures(failures: Sequence[Failure], count: int) -> None:
    """Print the failed cells of ``count`` cells on stderr."""
    if not failures:
        return
    print(f"\n{len(failures)} of {count} cells failed:", file=sys.stderr)
    for failure in failures:
        log = f" (details: {failure.log})" if failure.log else ""
        print(f"  {failure.cell.label}: {failure.message}{log}", file=sys.stderr)
    words = "To run the failed cells again, repeat the command without --force"
    print(f"{words}: it skips finished cells.", file=sys.stderr)


def _measure(
    request: RunRequest, keys: set[Key], measured: Mapping[Key, ResultRecord],
    failures: list[Failure],
) -> None:  # fmt: skip
    """Measure the cells with these keys; add to ``failures``. ``measured`` helps to estimate."""
    from benchmarks.run.runner import Runner
    from benchmarks.watch.live import Watch
    from tasks.common.cell.identity import forget

    options, adapter, cells = request.options, request.adapter, request.cells()
    todo = [cell for cell in cells if cell.key in keys]
    runs = options.results / "runs"
    watch = Watch(PrintableConsole(), runs / ".state", options.engine)
    if options.force:
        forget((cell.request for cell in todo), adapter.planned_folder)
        words = "Without --force, the same command continues where it stopped."
        print(f"All earlier results of these cells are removed. {words}")
    # Runs of several machines may share the results folder.
    logs = runs / ".logs" / f"{platform.node()}-{os.getpid()}"
    make = partial(make_executor, request, logs)
    runner = Runner(adapter, watch, make, len(cells) - len(todo), options.retries)
    known = ((cell, measured.get(cell.key)) for cell in cells)
    runner.learn((cell, own_seconds(record)) for cell, record in known if record is not None)
    runner.run(todo, failures)
    if not failures:
        shutil.rmtree(logs, ignore_errors=True)


def _write(request: RunRequest, cells: Sequence[Cell]) -> tuple[int, bool]:
    """Write and print the tables, and the report.

    Returns the exit code, and False if records of the grid cannot be read.
    """
    from benchmarks.tables.write import write_published, write_tables  # imports pandas: slow

    grid, options, adapter, table = request.grid, request.options, request.adapter, request.table
    sentence = ""
    if table is None:
        code = write_tables(grid, request.filters, options, adapter, cells)
        complete = code == 0
    else:
        part = write_published(table, grid, options, adapter, cells)
        (sentence, code), complete = part.conclusion(), not part.damaged
    if request.report:
        from benchmarks.report.page import write_report

        path = options.results / "report.html"
        write_report(grid, options, adapter, path, table=table)
        words = "charts, error per block, example predictions; open it in a browser"
        print(f"Report: {path} ({words})")
    for line in (*grid.next, sentence):
        if line:
            print(line)
    return code, complete


def _runnable_sections(request: RunRequest, cells: Sequence[Cell]) -> list[str]:
    """Return a line with the sections that cannot run, and the options to run the others.

    Empty if no section can run.
    """
    blocked, ready = [], []
    for section in dict.fromkeys(cell.section for cell in cells):
        if missing([cell for cell in cells if cell.section == section], request.adapter):
            place = request.grid.tasks[section].data
            is_given = place == "own" or request.options.data.of(place) is not None
            option = "" if is_given else f" ({place.upper()}=/path or --{place})"
            blocked.append(f"{section}{option}")
        else:
            ready.append(section)
    if not ready:
        return []
    rest = ",".join(ready)
    advice = f"To run the rest: TASKS={rest} for make, --tasks {rest} for a grid."
    return [f"Cannot run: {', '.join(blocked)}. {advice}"]
