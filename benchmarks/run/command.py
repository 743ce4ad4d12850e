"""The commands ``run`` and ``run --plan``, behind their options."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.console import NotReady, terminal_width
from benchmarks.grid.cell import Cell, Key, Places, finished
from benchmarks.grid.preflight import missing
from benchmarks.run.options import RunRequest, make_executor, settled
from fimaq_core.errors import FimaqError
from tasks.common.record import ResultRecord, own_seconds

if TYPE_CHECKING:
    from benchmarks.run.runner import Failure


def chosen_cells(request: RunRequest) -> list[Cell]:
    """Return the cells of a request. Raises FimaqError where the filters leave none."""
    cells = request.cells()
    if not cells:
        raise FimaqError("The filters leave no cell.")
    return cells


def print_plan(request: RunRequest) -> int:
    """Print the plan of a run and return 0."""
    from benchmarks.run.plan import plan_text

    print(plan_text(request, chosen_cells(request), width=terminal_width()))
    return 0


def run_grid(request: RunRequest) -> int:
    """Measure the cells that are not finished, and write tables; see ``run --help``.

    Returns:
        The exit code: 0, or 1 where cells failed or numbers differ from the published table.
    """
    cells, adapter = chosen_cells(request), request.adapter
    found = ((cell.key, finished(cell, adapter)) for cell in cells)
    measured = {key: done[0] for key, done in found if done is not None}
    todo = [cell for cell in cells if request.options.force or cell.key not in measured]
    failures: list[Failure] = []
    if todo:
        messages = missing(todo, adapter)
        if messages:
            lines = [f"error: {message}" for message in messages]
            raise NotReady("\n".join([*lines, *_way_around(request, todo)]))
        request = settled(request)
        failures = _measure(request, {cell.key for cell in todo}, measured)
    else:
        print(f"All {len(cells)} cells are done already.")
    code = _write(request, cells)
    if failures:
        print(f"\n{len(failures)} of {len(cells)} cells failed:", file=sys.stderr)
        for failure in failures:
            log = f" (details: {failure.log})" if failure.log else ""
            print(f"  {failure.cell.label}: {failure.message}{log}", file=sys.stderr)
        print("Finished cells are kept. To run only the failed ones:", file=sys.stderr)
        print(f"  {rerun_command(request, [f.cell for f in failures])}", file=sys.stderr)
    return 1 if failures else code


def _measure(
    request: RunRequest, keys: set[Key], measured: Mapping[Key, ResultRecord]
) -> list[Failure]:
    """Measure the cells with these keys; return those that failed."""
    from benchmarks.run.runner import Runner
    from benchmarks.watch.live import Watch
    from tasks.common.cell.identity import forget

    options, adapter, cells = request.options, request.adapter, request.cells()
    todo = [cell for cell in cells if cell.key in keys]
    runs = options.results / "runs"
    watch = Watch(Console(highlight=False), runs / ".state", request.executor.engine)
    if options.force:
        forget((cell.request for cell in todo), adapter.planned_folder)
        words = "Without --force the same command goes on where it stopped."
        print(f"All earlier results of these cells are removed. {words}")
    # Several runs may share the folder.
    logs = runs / ".logs" / f"{platform.node()}-{os.getpid()}"
    make = partial(make_executor, request, logs)
    with _interrupted_by_sigterm():
        runner = Runner(adapter, watch, make, len(cells) - len(todo), request.executor.retries)
        known = ((cell, measured.get(cell.key)) for cell in cells)
        runner.learn((cell, own_seconds(record)) for cell, record in known if record is not None)
        failures = runner.run(todo)
    if not failures:
        shutil.rmtree(logs, ignore_errors=True)
    return failures


def _write(request: RunRequest, cells: Sequence[Cell]) -> int:
    """Write and print the tables, and the report; return the exit code of a published table."""
    from benchmarks.tables.write import write_published, write_tables  # imports pandas: slow

    grid, options, adapter, table = request.grid, request.options, request.adapter, request.table
    sentence, code = "", 0
    if table is None:
        write_tables(grid, request.filters, options, adapter, cells)
    else:
        sentence, code = write_published(table, grid, options, adapter, cells).conclusion()
    if request.report:
        from benchmarks.report.build import write_report

        path = options.results / "report.html"
        write_report(grid, options, adapter, path, table=table)
        words = "charts, error per block, example predictions; open it in a browser"
        print(f"Report: {path} ({words})")
    for line in (*grid.next, sentence):
        if line:
            print(line)
    return code


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Handle SIGTERM, which schedulers send before the time is up, as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end takes a moment: ignore a second one
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _way_around(request: RunRequest, cells: Sequence[Cell]) -> list[str]:
    """Return a line on sections that cannot run and how to leave them out.

    Where all sections lack something, the line names those without a data folder. A grid with one
    section has no way around.
    """
    by_section: dict[str, list[Cell]] = {}
    for cell in cells:
        by_section.setdefault(cell.section, []).append(cell)
    places = {section: request.grid.tasks[section].data for section in by_section}
    not_given = [name for name in places if _is_not_given(request, places[name])]
    blocked = [name for name, own in by_section.items() if missing(own, request.adapter)]
    if len(blocked) == len(by_section):
        blocked = not_given
    if not blocked or len(by_section) == 1:
        return []
    rest = ",".join(name for name in by_section if name not in blocked)
    names, what = (rest, "the rest") if rest else (blocked[0], "one of them")
    words = [
        f"{name} ({places[name].upper()}=/path or --{places[name]})" if name in not_given else name
        for name in blocked
    ]
    advice = f"To run {what}: TASKS={names} for make, --tasks {names} for a grid."
    return [f"Cannot run: {', '.join(words)}. {advice}"]


def _is_not_given(request: RunRequest, place: str) -> bool:
    return place != "own" and request.options.data.of(place) is None


def rerun_command(request: RunRequest, cells: Sequence[Cell]) -> str:
    """Return the command that runs these cells. It skips finished cells that it names, too."""

    def values(name: str) -> str:
        found = dict.fromkeys(str(getattr(cell, name)) for cell in cells)
        none = {"bits": "fp", "seed": "None"}.get(name)  # of full precision
        return ",".join(value for value in found if value != none)

    relative = os.path.relpath(sys.executable)
    python = "python" if relative.startswith("..") else relative
    option = "--profile" if request.table is None else "--table"
    parts, options = [python, "-m", "benchmarks", "run", option, request.name], request.options
    if options.rehearsal:  # which makes its own data and weights
        parts.append("--rehearse")
        results = options.results.parent
        options = dataclasses.replace(options, data=Places(), weights=None, results=results)
    names = {"tasks": "section", "models": "model", "methods": "method", "bits": "bits"}
    flags: dict[str, object] = {f"--{flag}": values(name) for flag, name in names.items()}
    flags |= {"--seeds": values("seed"), "--axes": ",".join(request.filters.axes or ())}
    flags["--device"] = options.device
    flags |= {f"--{name}": place for name, place in vars(options.data).items()}
    for name in ("weights", "threads", "placement"):
        flags[f"--{name}"] = getattr(options, name)
    given = {flag: value for flag, value in flags.items() if value}
    if options.results != Path("results"):
        given["--results"] = options.results
    for flag, value in (given | request.executor.flags).items():
        parts += [flag, str(value)]
    return shlex.join(parts)
