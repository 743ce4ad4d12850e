"""Runs the cells of a grid in the slots of an engine, and keeps going when one fails."""

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.attempts import Again, Attempts
from benchmarks.cells import MAIN_METRIC, Adapter, Cell, Key
from benchmarks.display import Display, Outcome
from benchmarks.engines.base import Engine, Failed, Finished, Message, Slot, make_job
from benchmarks.estimate import Estimator
from benchmarks.schedule import Schedule
from benchmarks.units import duration
from fimaq_core.errors import FimaqError
from fimaq_core.progress import Progress
from tasks.common.lease import Observer
from tasks.common.record import ResultRecord, read_record

#: Makes an engine for so many cells, whose first needs these modules.
MakeEngine = Callable[[int, Sequence[str]], Engine]

#: Seconds between two looks at cells that others measure, between two ticks of a display, and the longest wait for messages.
_LOOK, _TICK, _WAIT = 2.0, 0.5, 0.5

#: Share of the time that may go into estimates.
_ESTIMATING = 0.05


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured, why, and where the details are."""

    cell: Cell
    message: str
    log: Path | None


@dataclass
class _Run:
    """An attempt at a cell."""

    cell: Cell
    attempts: Attempts
    since: float


class Runner:
    """Runs cells; see :meth:`run`."""

    def __init__(self, adapter: Adapter, display: Display, make_engine: MakeEngine, done: int = 0, retries: int = 3) -> None:
        """Make a runner.

        Args:
            adapter: measures the cells.
            display: shows what happens.
            make_engine: makes what the cells run on.
            done: cells of the grid that were finished before, for the count shown.
            retries: see :class:`~benchmarks.attempts.Attempts`.
        """
        self._adapter, self._display, self._make_engine = adapter, display, make_engine
        self._done, self._retries = done, retries
        self._estimator, self._observer = Estimator(), Observer()
        self._failures: list[Failure] = []
        self._schedule = Schedule(())
        self._attempts: dict[Key, Attempts] = {}
        self._folders: dict[Key, Path] = {}
        self._running: dict[Hashable, _Run] = {}
        self._slots: list[Slot] = []
        self._changed = False
        self._looked = self._ticked = self._estimated = 0.0
        self._left: float | None = None

    def learn(self, costs: Iterable[tuple[Cell, float]]) -> None:
        """Take what cells took before, in seconds, for the time that is left of others."""
        for cell, seconds in costs:
            self._estimator.add(cell, seconds)

    def run(self, cells: Sequence[Cell]) -> list[Failure]:
        """Measure ``cells``; return those that failed.

        Raises:
            FimaqError: the engine cannot be used.
            KeyboardInterrupt: broken off by the user; the processes are stopped, finished cells are kept.
        """
        there = [cell for cell in cells if self._is_there(cell)]
        found = {cell.key for cell in there}
        rest = [cell for cell in cells if cell.key not in found]
        self._schedule = Schedule(rest)
        engine: Engine | None = None
        try:
            if rest:
                first = next(self._schedule.waiting())
                engine = self._make_engine(len(rest), self._adapter.imports(first.request))
            self._display.begin(self._done, self._done + len(cells))
            try:
                for cell in there:
                    self._found(cell)
                while engine is not None and (self._schedule or self._running):
                    self._feed(engine)
                    for slot, message in engine.wait(_WAIT):
                        self._hear(slot, message)
                    self._tick()
            finally:
                self._display.close()
        finally:
            if engine is not None:
                engine.close()
        return self._failures

    def _feed(self, engine: Engine) -> None:
        """Give every idle slot its next cell."""
        slots = list(engine.slots())
        if slots != self._slots:
            self._schedule.keep(slots)
            self._slots, self._changed = slots, True
        if len(self._running) < len(slots):
            self._look()
        if not self._changed:
            return
        self._changed = False
        for slot in slots:
            if slot not in self._running:
                cell = self._next(slot)
                if cell is not None:
                    self._start(slot, cell)

    def _next(self, slot: Slot) -> Cell | None:
        """Return a cell for the slot; those that others measured meanwhile are over."""
        while True:
            cell = self._schedule.take(slot)
            if cell is None or not self._is_there(cell):
                return cell
            self._schedule.over(cell)
            self._found(cell)

    def _start(self, slot: Slot, cell: Cell) -> None:
        attempts = self._attempts.setdefault(cell.key, Attempts(cell.request, self._retries))
        attempts.begin()
        self._running[slot] = _Run(cell, attempts, time.monotonic())
        self._display.started(cell, self._done, slot.where)
        adapter, request = self._adapter, attempts.request
        slot.assign(make_job(adapter.run_cell, request, self._beside(cell, "error.log"), adapter.imports(request), cell.label))

    def _look(self) -> None:
        """Look what has become of cells that others measure, since there is nothing else to do."""
        now = time.monotonic()
        aside = self._schedule.aside
        if not aside or now - self._looked < _LOOK:
            return
        self._looked = now
        for cell in aside:
            path = self._beside(cell, "result.json")
            if self._is_there(cell):
                self._schedule.over(cell)
                self._found(cell)
            elif path is None or self._observer.holder(path) is None:
                self._schedule.back(cell)
            else:
                continue
            self._changed = True

    def _beside(self, cell: Cell, name: str) -> Path | None:
        """A file in the cell's folder; None while that is not known."""
        folder = self._folders.get(cell.key)
        if folder is None:
            try:
                folder = self._folders[cell.key] = self._adapter.planned_folder(cell.request)
            except FimaqError:
                return None
        return folder / name

    def _is_there(self, cell: Cell) -> bool:
        """Whether the cell has a record, good or bad."""
        path = self._beside(cell, "result.json")
        return path is not None and path.is_file()

    def _found(self, cell: Cell) -> None:
        """A cell has a record that was not measured here. One that cannot be read is for the user to look at."""
        path = self._beside(cell, "result.json")
        assert path is not None
        try:
            self._ended(cell, Outcome("elsewhere", f"measured elsewhere: {_scores(read_record(path))}"))
        except FimaqError as error:
            self._fail(cell, str(error), None)

    def _hear(self, slot: Slot, message: Message) -> None:
        run = self._running[slot]
        if isinstance(message, Progress):
            run.attempts.heard(message)
            self._display.progress(run.cell, message)
            return
        del self._running[slot]
        self._changed = True
        if isinstance(message, Failed):
            self._lost(run, message)
            return
        self._estimator.add(run.cell, message.seconds)
        self._schedule.over(run.cell)
        self._measured(run.cell, message)

    def _measured(self, cell: Cell, message: Finished) -> None:
        try:
            text = f"{_scores(read_record(message.path))} in {duration(message.seconds)}"
        except FimaqError as error:
            self._fail(cell, f"measured, but {error}", None)
        else:
            self._ended(cell, Outcome("finished", text))

    def _lost(self, run: _Run, failure: Failed) -> None:
        """An attempt came to nothing."""
        if failure.kind == "busy":
            self._schedule.put_aside(run.cell)
            self._looked = time.monotonic()  # whoever measures it has only just been seen
            self._display.retried(run.cell, failure.message)
            return
        verdict = run.attempts.failed(failure)
        if isinstance(verdict, Again):
            self._schedule.back(run.cell)
            self._display.retried(run.cell, verdict.reason)
        else:
            self._schedule.over(run.cell)
            self._fail(run.cell, verdict.message, verdict.log)

    def _fail(self, cell: Cell, message: str, log: Path | None) -> None:
        self._failures.append(Failure(cell, message, log))
        self._ended(cell, Outcome("failed", message, log))

    def _ended(self, cell: Cell, outcome: Outcome) -> None:
        self._done += 1
        self._attempts.pop(cell.key, None)
        self._display.ended(cell, outcome, self._done, self._time_left())

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked < _TICK:
            return
        self._ticked = now
        cells: dict[Key, float | None] = {}
        for run in self._running.values():
            expected = self._estimator.seconds(run.cell)
            cells[run.cell.key] = None if expected is None else max(expected - (now - run.since), 0.0)
        self._display.tick(self._time_left(), cells)

    def _time_left(self) -> float | None:
        """The estimate for the rest of the grid, in seconds. It looks at every cell, so in a big grid it may be a little old."""
        now = time.monotonic()
        if now >= self._estimated:
            running = {run.cell.key: (run.cell, now - run.since) for run in self._running.values()}
            self._left = self._estimator.left(self._schedule.waiting(), running, max(1, len(self._slots)))
            end = time.monotonic()
            self._estimated = end + (end - now) / _ESTIMATING
        return self._left


def _scores(record: ResultRecord) -> str:
    parts = []
    wanted = MAIN_METRIC.get(record.task)
    for name, metric in record.metrics.items():
        if wanted in record.metrics and name != wanted:
            continue
        full = record.fp_metrics.get(name)
        against = "" if full is None or record.method == "fp" else f" (fp {full.value:.1f})"
        parts.append(f"{name} {metric.value:.1f}{against}")
    return ", ".join(parts)
