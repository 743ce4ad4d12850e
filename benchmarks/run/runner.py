"""Runs the cells of a grid in the slots of an executor, and goes on when one fails."""

import pickle
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.console import duration
from benchmarks.costs.estimate import Estimator
from benchmarks.grid.cell import MAIN_METRIC, Adapter, Cell, Key
from benchmarks.run.attempt import Attempts
from benchmarks.run.executor import Executor, Failed, MakeExecutor, Message, Started
from benchmarks.run.order import Schedule
from benchmarks.watch.live import Watch
from fimaq_core.errors import FimaqError
from fimaq_core.progress import Progress
from tasks.common.cell.lease import Observer
from tasks.common.record import ResultRecord, read_record

#: Seconds between two looks at cells that others measure, and the longest wait for messages.
_LOOK, _WAIT = 2.0, 0.5

#: Share of the time that may go into estimates.
_ESTIMATING = 0.05


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured, why, and where the details are."""

    cell: Cell
    message: str
    log: Path | None


class Runner:
    """Runs cells; see `run`."""

    def __init__(
        self, adapter: Adapter, watch: Watch, make_executor: MakeExecutor, done: int, retries: int
    ) -> None:  # fmt: skip
        """Make a runner.

        Args:
            adapter: measures the cells.
            watch: shows what happens.
            make_executor: makes what the cells run on.
            done: cells of the grid that were finished before, for the count shown.
            retries: see `benchmarks.run.attempt.Attempts`.
        """
        self._adapter, self._watch, self._make_executor = adapter, watch, make_executor
        self._done, self._retries = done, retries
        self._estimator, self._observer = Estimator(), Observer()
        self._failures: list[Failure] = []
        self._schedule = Schedule(())
        self._attempts: dict[Key, Attempts] = {}
        self._folders: dict[Key, Path] = {}
        #: By slot.
        self._running: dict[str, Attempts] = {}
        self._slots: list[str] = []
        self._changed = False
        self._looked = self._ticked = self._estimated = 0.0
        self._left: float | None = None

    def learn(self, costs: Iterable[tuple[Cell, float]]) -> None:
        """Use the seconds that cells took before to estimate the time of others."""
        for cell, seconds in costs:
            self._estimator.add(cell, seconds)

    def run(self, cells: Sequence[Cell]) -> list[Failure]:
        """Measure ``cells``; return those that failed.

        Raises:
            FimaqError: the executor cannot be used.
            KeyboardInterrupt: broken off by the user; the processes are stopped, finished cells
                are kept.
        """
        there = {cell.key: cell for cell in cells if self._is_there(cell)}
        rest = [cell for cell in cells if cell.key not in there]
        self._schedule = Schedule(rest)
        executor: Executor | None = None
        try:
            if rest:
                own = self._adapter.run_cell.__module__
                needed = [name for cell in rest for name in self._adapter.imports(cell.request)]
                executor = self._make_executor(len(rest), list(dict.fromkeys([*needed, own])))
            try:
                self._watch.tell("begin", over=self._done, total=self._done + len(cells))
                for cell in there.values():
                    self._found(cell)
                while executor is not None and (self._schedule or self._running):
                    self._feed(executor)
                    for slot, message in executor.wait(_WAIT):
                        self._hear(slot, message)
                    self._tick()
            finally:
                self._watch.close()
        finally:
            if executor is not None:
                executor.close()
        return self._failures

    def _feed(self, executor: Executor) -> None:
        """Give each idle slot its next cell."""
        slots = list(executor.slots())
        if slots != self._slots:
            self._schedule.keep(slots)
            self._slots, self._changed = slots, True
        if len(self._running) < len(slots):
            self._look()
        if not self._changed:
            return
        self._changed = False
        for slot in slots:
            if slot not in self._running and (cell := self._next(slot)) is not None:
                self._start(executor, slot, cell)

    def _next(self, slot: str) -> Cell | None:
        """Return a cell for the slot; those that others measured meanwhile are over."""
        while (cell := self._schedule.take(slot)) is not None and self._is_there(cell):
            self._schedule.over(cell)
            self._found(cell)
        return cell

    def _start(self, executor: Executor, slot: str, cell: Cell) -> None:
        new = Attempts(cell, self._retries, cell.request)
        attempts = self._running[slot] = self._attempts.setdefault(cell.key, new)
        attempts.begin()
        work = self._adapter.run_cell, attempts.request, self._beside(cell, "error.log")
        executor.start(slot, cell.label, pickle.dumps(work))

    def _look(self) -> None:
        """See what has become of cells that others measure, since slots are idle."""
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
        """Return a file in the cell's folder; None while that is not known."""
        if cell.key not in self._folders:
            try:
                self._folders[cell.key] = self._adapter.planned_folder(cell.request)
            except FimaqError:
                return None
        return self._folders[cell.key] / name

    def _is_there(self, cell: Cell) -> bool:
        """Return whether the cell has a record, good or bad."""
        path = self._beside(cell, "result.json")
        return path is not None and path.is_file()

    def _found(self, cell: Cell) -> None:
        """A cell has a record that was not measured here; the user must see to a damaged one."""
        path = self._beside(cell, "result.json")
        assert path is not None
        try:
            self._ended(cell, "elsewhere", f"measured elsewhere: {_scores(read_record(path))}")
        except FimaqError as error:
            self._fail(cell, str(error), None)

    def _hear(self, slot: str, message: Message) -> None:
        run = self._running[slot]
        cell = run.cell
        if isinstance(message, Started):
            run.since = time.monotonic()
            self._watch.tell("started", cell, where=message.where)
        elif isinstance(message, Progress):
            run.heard(message)
            self._watch.progress(cell, message)
        else:
            del self._running[slot]
            self._changed = True
            if isinstance(message, Failed):
                self._lost(run, message)
                return
            self._estimator.add(cell, message.seconds)
            self._schedule.over(cell)
            try:
                scores = _scores(read_record(message.path))
            except FimaqError as error:
                self._fail(cell, f"measured, but {error}", None)
            else:
                self._ended(cell, "finished", f"{scores} in {duration(message.seconds)}")

    def _lost(self, run: Attempts, failure: Failed) -> None:
        """An attempt came to nothing."""
        cell = run.cell
        if failure.kind == "busy":
            self._schedule.put_aside(cell)
            self._looked = time.monotonic()  # whoever measures it has only just been seen
            self._watch.tell("retried", cell, text=failure.message)
            return
        again, reason = run.failed(failure)
        if again:
            self._schedule.back(cell)
            self._watch.tell("retried", cell, text=reason)
        else:
            self._schedule.over(cell)
            self._fail(cell, reason, failure.log)

    def _fail(self, cell: Cell, message: str, log: Path | None) -> None:
        self._failures.append(Failure(cell, message, log))
        self._ended(cell, "failed", message, log)

    def _ended(self, cell: Cell, outcome: str, text: str, log: Path | None = None) -> None:
        self._done += 1
        self._attempts.pop(cell.key, None)
        facts = {"outcome": outcome, "text": text, "log": log and str(log)}
        self._watch.tell("ended", cell, over=self._done, left=self._time_left(), **facts)

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked < _WAIT:
            return
        self._ticked = now
        cells: dict[str, float] = {}
        for run in self._running.values():
            expected = self._estimator.seconds(run.cell)
            if expected is not None:
                cells[run.cell.label] = max(expected - (now - run.since), 0.0)
        self._watch.tell("tick", left=self._time_left(), cells=cells)

    def _time_left(self) -> float | None:
        """Estimate the seconds for the rest of the grid; in a big grid not at each call."""
        now = time.monotonic()
        if now >= self._estimated:
            running = {run.cell.key: (run.cell, now - run.since) for run in self._running.values()}
            jobs = max(1, len(self._slots))
            self._left = self._estimator.left(self._schedule.waiting(), running, jobs)
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
