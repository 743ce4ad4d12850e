"""The run of a grid, behind the options of its command."""

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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.console import NotReady
from benchmarks.grid.cell import Adapter, Cell, Places, RunOptions, finished
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import Grid
from benchmarks.run.options import ExecutorOptions
from fimaq_core.errors import FimaqError
from tasks.common.record import own_seconds

if TYPE_CHECKING:
    from benchmarks.published.table import PublishedTable


def run_grid(
    grid: Grid,
    profile: str,
    filters: Filters,
    options: RunOptions,
    adapter: Adapter,
    how: ExecutorOptions,
    plan: bool,
    report: bool = False,
    table: PublishedTable | None = None,
) -> int:
    """Run a grid and return the exit code. See ``python -m benchmarks run --help``.

    Args:
        profile: what the user called the grid: a profile, or the table.
        table: the published table that the grid is of; its layout replaces the grid's own tables.
    """
    from benchmarks.console import terminal_width
    from benchmarks.grid.preflight import missing
    from benchmarks.run.local import default_jobs
    from benchmarks.run.options import make_executor, settled
    from benchmarks.run.plan import plan_of
    from benchmarks.run.runner import Runner
    from benchmarks.watch.live import Watch

    cells = expand(grid, filters, options)
    if not cells:
        raise FimaqError("The filters leave no cell.")
    if plan:
        at_once = (
            how.jobs
            or grid.jobs
            or default_jobs(options.threads or grid.threads, options.device or grid.device)
        )
        print(plan_of(grid, filters, options, adapter, cells, at_once, terminal_width()))
        return 0
    measured = {cell.key: found for cell in cells if (found := finished(cell, adapter)) is not None}
    todo = [cell for cell in cells if options.force or cell.key not in measured]
    failures = []
    if todo:
        messages = missing(todo, adapter)
        if messages:
            raise NotReady(
                "\n".join(
                    [
                        *(f"error: {message}" for message in messages),
                        *_way_around(grid, todo, options, adapter),
                    ]
                )
            )
        threads = options.threads or grid.threads
        options = settled(options, how, options.device or grid.device, threads)
        todo_keys = {cell.key for cell in todo}
        todo = [cell for cell in expand(grid, filters, options) if cell.key in todo_keys]
        watch = Watch(Console(highlight=False), options.results / "runs" / ".state", how.name)
        if options.force:
            from tasks.common.cell.identity import forget

            forget((cell.request for cell in todo), adapter.planned_folder)
            print(
                "What was there of these cells is removed. Without --force the same command goes on where it stopped."
            )
        logs = (
            options.results / "runs" / ".logs" / f"{platform.node()}-{os.getpid()}"
        )  # several may run on one folder
        made = partial(make_executor, options, how, threads, grid.jobs, logs)
        with _ended_as_by_hand():
            runner = Runner(adapter, watch, made, len(cells) - len(todo), how.retries)
            runner.learn(
                (cell, own_seconds(measured[cell.key][0])) for cell in cells if cell.key in measured
            )
            failures = runner.run(todo)
        if not failures:
            shutil.rmtree(logs, ignore_errors=True)
    else:
        print(f"All {len(cells)} cells are done already.")
    from benchmarks.tables.write import write_published, write_tables  # pandas takes its time

    layout = None
    if table is None:
        write_tables(grid, filters, options, adapter, cells)
    else:
        layout = write_published(table, grid, options, adapter, cells)
    if report:
        from benchmarks.report.page import write_report

        path = options.results / "report.html"
        write_report(grid, options, adapter, path, table=table)
        print(
            f"Report: {path} (charts, error per block, example predictions; open it in a browser)"
        )
    for line in grid.next:
        print(line)
    sentence, code = ("", 0) if layout is None else layout.conclusion()
    if sentence:
        print(sentence)
    if failures:
        print(f"\n{len(failures)} of {len(cells)} cells failed:", file=sys.stderr)
        for failure in failures:
            log = f" (details: {failure.log})" if failure.log else ""
            print(f"  {failure.cell.label}: {failure.message}{log}", file=sys.stderr)
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


def _way_around(
    grid: Grid, cells: Sequence[Cell], options: RunOptions, adapter: Adapter
) -> list[str]:
    """Say which sections cannot run, and how to leave those out; nothing where there is one section only.

    They are those whose data were not given and, unless all the others lack something, those that lack something all the same:
    weights, or parts of a folder that serves several sections.
    """
    from benchmarks.grid.preflight import missing

    sections = list(dict.fromkeys(cell.section for cell in cells))
    data = {section: grid.tasks[section].data for section in sections}
    blocked = [
        section
        for section in sections
        if data[section] != "own" and options.data.of(data[section]) is None
    ]
    given = [section for section in sections if section not in blocked]
    lacking = [
        section
        for section in given
        if missing([cell for cell in cells if cell.section == section], adapter)
    ]
    if lacking == given:
        lacking = []
    if not (blocked or lacking) or len(sections) == 1:
        return []
    rest = [section for section in given if section not in lacking]
    names, what = (",".join(rest), "the rest") if rest else (blocked[0], "one of them")
    words = []
    if blocked:
        wanted = (
            f"{section} ({data[section].upper()}=/path or --{data[section]})" for section in blocked
        )
        words.append(f"Data not given: {', '.join(wanted)}.")
    if lacking:
        words.append(f"Not all there: {', '.join(lacking)}.")
    return [
        " ".join([*words, f"To run {what}: TASKS={names} for make, --tasks {names} for a grid."])
    ]


def rerun_command(
    profile: str,
    cells: Sequence[Cell],
    options: RunOptions,
    how: ExecutorOptions,
    axes: Sequence[str] | None = None,
    option: str = "--profile",
) -> str:
    """Return the command that runs just these cells. It may name finished ones beside them, which are skipped."""

    def values(name: str) -> str:
        found = dict.fromkeys(str(getattr(cell, name)) for cell in cells)
        none = {"bits": "fp", "seed": "None"}.get(name)  # of full precision
        return ",".join(value for value in found if value != none)

    parts = [_python(), "-m", "benchmarks", "run", option, profile]
    if options.rehearsal:  # which makes its data and weights
        parts.append("--rehearse")
        options = dataclasses.replace(
            options, data=Places(), weights=None, results=options.results.parent
        )
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
    return shlex.join(parts)


def _python() -> str:
    relative = os.path.relpath(sys.executable)
    return "python" if relative.startswith("..") else relative
