"""Runs the cells of a grid in worker processes and keeps going when one fails."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from benchmarks.cells import MAIN_METRIC, Adapter, Cell, Key
from benchmarks.display import Display, Outcome
from benchmarks.estimate import Estimator, duration, expected_cost
from benchmarks.worker import Failed, Finished, Worker
from fimaq_core.errors import FimaqError
from fimaq_core.progress import Progress
from fimaq_core.recipe import OFF
from tasks.common import registry
from tasks.common.record import bits_name, read_record
from tasks.common.request import Missing, describe_missing


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured, why, and where the details are."""

    cell: Cell
    message: str
    log: Path | None


def default_jobs(threads: int | None, device: str) -> int:
    """Return how many cells run at a time: what the cores allow on CPU; one on a GPU."""
    if device != "cpu" or threads is None:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def missing(cells: Sequence[Cell], adapter: Adapter) -> list[str]:
    """Return one message for every kind of data or weights that the cells need and that are not there.

    And one for every request that makes no sense, such as a scope that the task does not have.
    """
    found: list[Missing] = []
    errors: dict[str, None] = {}
    for cell in {(cell.section, cell.model): cell for cell in cells}.values():
        try:
            found += adapter.preflight(cell.request)
        except FimaqError as error:
            errors.setdefault(str(error))
    if not found and not errors:  # else a cell's folder may not be known
        for cell in {(cell.section, cell.scope): cell for cell in cells}.values():
            try:
                adapter.planned_folder(cell.request)
            except FimaqError as error:
                errors.setdefault(str(error))
    return [*errors, *(describe_missing(found) or "").splitlines()]


def make_chains(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group the cells into chains, each for one worker, in the order in which they should start.

    Cells of one (section, model, bits, seed) share a calibration, and those of several scopes also what they reconstruct:
    measured one after the other in one worker, it is computed once. The whole model, a task's usual scope, comes last there: by
    then its parts are done. Axis points are chains of their own, or an ablation would keep no more workers busy than it has
    models: there each worker calibrates once at worst. Full-precision cells come first, since all others of the model use
    theirs, then models whose MLPs are reconstructed, which others share; then the dearest chain, so that none is left over at
    the end.
    """
    chains: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        chains.setdefault((cell.section, cell.model, cell.w_bit, cell.a_bit, cell.seed, cell.point), []).append(cell)
    for chain in chains.values():
        chain.sort(key=lambda cell: cell.scope in registry.scopes(cell.task)[:1])

    def order(chain: list[Cell]) -> tuple[bool, bool, float]:
        first = chain[0]
        cost = -sum(expected_cost(cell) for cell in chain)
        return first.request.recipe is not None, first.bits != bits_name(OFF, OFF), cost

    return sorted(chains.values(), key=order)


@dataclass
class _Slot:
    """A worker and what it has to do: the present cell and the rest of its chain."""

    worker: Worker
    where: str
    cell: Cell | None = None
    since: float = 0.0
    rest: list[Cell] = field(default_factory=list)


class Runner:
    """Runs cells; see :meth:`run`."""

    def __init__(self, adapter: Adapter, display: Display, jobs: int, threads: int | None, logs: Path, done: int = 0) -> None:
        """Make a runner.

        Args:
            adapter: measures the cells.
            display: shows what happens.
            jobs: worker processes.
            threads: CPU threads of each; None leaves the libraries' choice.
            logs: folder for what workers print.
            done: cells of the grid that were finished before, for the count shown.
        """
        self._adapter, self._display, self._jobs, self._threads = adapter, display, max(1, jobs), threads
        self._logs, self._done = logs, done
        self._estimator = Estimator()
        self._failures: list[Failure] = []
        self._waiting: list[list[Cell]] = []
        self._slots: list[_Slot] = []

    def run(self, cells: Sequence[Cell]) -> list[Failure]:
        """Measure ``cells``; return those that failed.

        Raises:
            KeyboardInterrupt: broken off by the user; the workers are stopped, finished cells are kept.
        """
        self._waiting = make_chains(cells)
        jobs = min(self._jobs, len(self._waiting))
        self._display.begin(self._done, self._done + len(cells))
        try:
            for number in range(1, jobs + 1):
                worker = Worker(number, self._threads, self._logs / f"worker-{number}.log")
                self._slots.append(_Slot(worker, f"worker {number}"))
            self._feed()
            while any(slot.cell is not None for slot in self._slots):
                busy = {slot.worker.connection: slot for slot in self._slots if slot.cell is not None}
                for connection in wait(list(busy), timeout=0.5):
                    self._hear(busy[connection])  # type: ignore[index]
                self._feed()
                self._display.tick(self._left(), self._cells_left())
        finally:
            self._display.close()
            for slot in self._slots:
                slot.worker.stop()
        return self._failures

    def _feed(self) -> None:
        """Give every idle worker its next cell."""
        for slot in self._slots:
            if slot.cell is None:
                if not slot.rest:
                    slot.rest = self._next_chain()
                if slot.rest:
                    slot.cell, slot.since = slot.rest.pop(0), time.monotonic()
                    self._display.started(slot.cell, self._done, slot.where)
                    slot.worker.assign(self._adapter.run_cell, slot.cell.request, self._error_log(slot.cell))

    def _next_chain(self) -> list[Cell]:
        """Return the first waiting chain whose full-precision cell is not being measured just now."""
        busy = [slot.cell for slot in self._slots if slot.cell is not None and slot.cell.request.recipe is None]
        measuring = {(cell.section, cell.model) for cell in busy}
        for index, chain in enumerate(self._waiting):
            if (chain[0].section, chain[0].model) not in measuring:
                return self._waiting.pop(index)
        return []

    def _error_log(self, cell: Cell) -> Path | None:
        try:
            return self._adapter.planned_folder(cell.request) / "error.log"
        except FimaqError:
            return None

    def _hear(self, slot: _Slot) -> None:
        cell = slot.cell
        assert cell is not None
        message = slot.worker.receive()
        if isinstance(message, Progress):
            self._display.progress(cell, message)
            return
        slot.cell = None
        self._done += 1
        if isinstance(message, Finished):
            self._estimator.add(cell, message.seconds)
            outcome = Outcome("finished", _outcome(message))
        else:
            outcome = self._failed(cell, message)
        self._display.ended(cell, outcome, self._done, self._left())

    def _failed(self, cell: Cell, message: Failed) -> Outcome:
        self._failures.append(Failure(cell, message.message, message.log))
        return Outcome("failed", message.message, message.log)

    def _cells_left(self) -> dict[Key, float | None]:
        now = time.monotonic()
        found: dict[Key, float | None] = {}
        for slot in self._slots:
            if slot.cell is not None:
                expected = self._estimator.seconds(slot.cell)
                found[slot.cell.key] = None if expected is None else max(expected - (now - slot.since), 0.0)
        return found

    def _left(self) -> float | None:
        now = time.monotonic()
        waiting = [cell for chain in self._waiting for cell in chain] + [cell for slot in self._slots for cell in slot.rest]
        running = {slot.cell.key: (slot.cell, now - slot.since) for slot in self._slots if slot.cell is not None}
        return self._estimator.left(waiting, running, max(1, len(self._slots)))


def _outcome(message: Finished) -> str:
    try:
        record = read_record(message.path)
    except FimaqError as error:
        return f"measured, but {error}"
    parts = []
    wanted = MAIN_METRIC.get(record.task)
    for name, metric in record.metrics.items():
        if wanted in record.metrics and name != wanted:
            continue
        full = record.fp_metrics.get(name)
        against = "" if full is None or record.method == "fp" else f" (fp {full.value:.1f})"
        parts.append(f"{name} {metric.value:.1f}{against}")
    return f"{', '.join(parts)} in {duration(message.seconds)}"
