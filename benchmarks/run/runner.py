"""Runs the cells of a grid in the slots of an executor, also when some cells fail."""

import pickle
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.console import duration
from benchmarks.costs.estimate import Estimator
from benchmarks.grid.cell import MAIN_METRIC, Adapter, Cell, Key, finished, known_folder
from benchmarks.run.executor import Executor, Failed, MakeExecutor, Message, Started
from benchmarks.run.order import CellQueue
from benchmarks.watch.live import Watch
from fimaq_core.errors import FimaqError
from fimaq_core.progress import Progress
from tasks.common.cell.lease import Observer
from tasks.common.record import ResultRecord, read_record
from tasks.common.request import CellRequest

#: Seconds between two checks of the cells that other runners measure.
_CHECK = 2.0
#: Seconds between two ticks of the watch, and the longest wait for messages.
_WAIT = 0.5
#: Stages with optimisation steps; the progress of a step has a loss.
_OPTIMISING = ("reconstruct", "reconstruct MLPs")
_ADVICE = (
    "Keep less in memory (PLACEMENT=disk or --placement disk), run fewer cells at a time "
    "(JOBS=1 or --jobs 1), or use a device with more memory."
)


@dataclass(frozen=True)
class Failure:
    """A failed cell, the reason, and the file with the details."""

    cell: Cell
    message: str
    log: Path | None


@dataclass
class Attempts:
    """All attempts at one cell, and the decision whether it is tried again."""

    cell: Cell
    #: Limit of attempts in a row whose process dies without progress; 0: no second attempt. The
    #: default stands in :class:`benchmarks.grid.cell.RunOptions`.
    retries: int
    request: CellRequest  #: request of the next attempt; the results do not depend on the attempt
    since: float = 0.0  #: start of the present attempt, by `time.monotonic`
    _reached: set[tuple[str, str]] = field(default_factory=set)  # (stage, block) of all attempts
    _has_progress: bool = False  # the present attempt reached a new (stage, block)
    _last: Progress | None = None
    _deaths: int = 0  # in a row, without progress
    _errors: int = 0

    def begin(self) -> None:
        """Begin the next attempt."""
        self._has_progress, self._last, self.since = False, None, time.monotonic()

    def note(self, progress: Progress) -> None:
        """Note the progress of the present attempt."""
        place = (progress.stage, progress.block)
        self._last = progress
        if place not in self._reached and not progress.stage.startswith("wait for "):
            self._reached.add(place)
            self._has_progress = True

    def after(self, failure: Failed) -> tuple[bool, str]:
        """Return True if the cell is tried again after a failure, and the reason for the user."""
        again, reason = False, failure.message
        if failure.kind == "memory":
            return self._with_less_memory(reason)
        if failure.kind == "error":
            self._errors += 1
            again = self._errors == 1 and self.retries > 0
            reason += "; tried once more in a new process" if again else ""
        elif failure.kind == "died":
            # The next attempt goes on after the last finished block, so progress resets the count.
            self._deaths = 0 if self._has_progress else self._deaths + 1
            again = self._deaths < self.retries
            if not again and self._deaths > 1:
                reason += f", {self._deaths} times without progress"
        return again, reason

    def _with_less_memory(self, reason: str) -> tuple[bool, str]:
        """Change the request so that it needs less memory. Return the values of `after`."""
        request, batch = self.request, self.request.eval_batch // 2
        if request.device.startswith("cuda") and request.placement == "device":
            note = "memory ran out: inputs and outputs of blocks are kept in host memory"
            request = replace(request, placement="host")
        elif self._last and self._last.loss is not None and self._last.stage in _OPTIMISING:
            return False, (
                f"memory ran out ({reason}) in an optimisation step ({self._last.stage} "
                f"{self._last.block}). The recipe's batch_size is kept: another one gives other "
                f"results, so it is another recipe. {_ADVICE}"
            )
        elif batch:
            note = f"memory ran out: the batch of forward passes is reduced to {batch}"
            request = replace(request, eval_batch=batch)
        else:
            return False, f"memory ran out ({reason}), even for one image. {_ADVICE}"
        self.request = replace(request, notes=(*request.notes, note))
        return True, note


class Runner:
    """Runs cells, and estimates how long the rest takes; see `run`."""

    def __init__(
        self, adapter: Adapter, watch: Watch, make_executor: MakeExecutor, done: int, retries: int
    ) -> None:  # fmt: skip
        """Make a runner for a grid with `done` finished cells. `retries`: see `Attempts`."""
        self._adapter, self._watch, self._make_executor = adapter, watch, make_executor
        self._ended, self._retries = done, retries
        self._estimator, self._observer = Estimator(), Observer()
        self._failures: list[Failure] = []
        self._queue = CellQueue(())
        self._attempts: dict[Key, Attempts] = {}
        self._folders: dict[Key, Path | None] = {}
        self._slots: list[str] = []
        self._running: dict[str, Attempts] = {}  # by slot
        self._is_changed = False  # True: an idle slot may find a cell
        self._checked = self._ticked = 0.0  # by `time.monotonic`

    def learn(self, costs: Iterable[tuple[Cell, float]]) -> None:
        """Base the estimates on finished cells and their seconds."""
        for cell, seconds in costs:
            self._estimator.add(cell, seconds)

    def run(self, cells: Sequence[Cell]) -> list[Failure]:
        """Measure `cells`; return the failures.

        Raises:
            FimaqError: the executor cannot be used.
            KeyboardInterrupt: the user stopped the run. All processes end; finished cells are kept.
        """
        self._queue = CellQueue(cells)
        imports = [name for cell in cells for name in self._adapter.imports(cell.request)]
        imports = list(dict.fromkeys([*imports, self._adapter.run_cell.__module__]))
        executor = self._make_executor(len(cells), imports)
        with closing(executor), closing(self._watch):
            self._watch.tell("begin", over=self._ended, total=self._ended + len(cells))
            self._feed(executor)
            while self._queue or self._running:
                for slot, message in executor.wait(_WAIT):
                    self._handle(slot, message)
                self._tick()
                self._feed(executor)
        return self._failures

    def _feed(self, executor: Executor) -> None:
        """Start the next cell in each idle slot."""
        slots = list(executor.slots())
        if slots != self._slots:
            self._queue.keep_slots(slots)
            self._slots, self._is_changed = slots, True
        if len(self._running) < len(slots):
            self._check_aside()
        if not self._is_changed:
            return
        self._is_changed = False
        for slot in slots:
            if slot not in self._running and (cell := self._next(slot)) is not None:
                first = Attempts(cell, self._retries, cell.request)
                attempts = self._running[slot] = self._attempts.setdefault(cell.key, first)
                attempts.begin()
                path = self._record_path(cell)
                log = path and path.with_name("error.log")
                work = pickle.dumps((self._adapter.run_cell, attempts.request, log))
                executor.start(slot, cell.label, work)

    def _next(self, slot: str) -> Cell | None:
        """Return the next cell of a slot. Cells that another runner has measured end here."""
        while (cell := self._queue.take(slot)) is not None:
            try:
                done = finished(cell, self._adapter)
            except FimaqError as error:  # the user decides about a damaged record
                self._fail(cell, str(error))
                continue
            if done is None:
                return cell
            self._end(cell, "elsewhere", f"measured elsewhere: {_scores(done[0])}")
        return None

    def _check_aside(self) -> None:
        """Put back the cells that no other runner measures any more."""
        now = time.monotonic()
        if now - self._checked < _CHECK:
            return
        self._checked = now
        for cell in self._queue.aside:
            path = self._record_path(cell)
            if path is None or path.is_file() or not self._observer.holder(path):
                self._queue.put_back(cell)
                self._is_changed = True

    def _record_path(self, cell: Cell) -> Path | None:
        """Return the path of a cell's record, finished or not; None if its folder is not known."""
        folder = self._folders.get(cell.key) or known_folder(cell, self._adapter)
        self._folders[cell.key] = folder
        return folder and folder / "result.json"

    def _handle(self, slot: str, message: Message) -> None:
        """React to a message of the cell that runs in a slot."""
        attempts = self._running[slot]
        cell = attempts.cell
        if isinstance(message, Started):
            attempts.since = time.monotonic()
            self._watch.tell("started", cell, where=message.where)
            return
        if isinstance(message, Progress):
            attempts.note(message)
            self._watch.progress(cell, message)
            return
        del self._running[slot]
        self._is_changed = True
        if isinstance(message, Failed):
            self._react(attempts, message)
            return
        self._estimator.add(cell, message.seconds)
        try:
            scores = _scores(read_record(message.path))
        except FimaqError as error:
            self._fail(cell, f"measured, but {error}")
        else:
            self._end(cell, "finished", f"{scores} in {duration(message.seconds)}")

    def _react(self, attempts: Attempts, failure: Failed) -> None:
        """Let a cell wait again after a failed attempt, or end it as failed."""
        cell = attempts.cell
        again, reason = True, failure.message
        if failure.kind == "busy":
            self._queue.put_aside(cell)
            self._checked = time.monotonic()
        else:
            again, reason = attempts.after(failure)
            if again:
                self._queue.put_back(cell)
        if again:
            self._watch.tell("retried", cell, text=reason)
        else:
            self._fail(cell, reason, failure.log)

    def _fail(self, cell: Cell, message: str, log: Path | None = None) -> None:
        self._failures.append(Failure(cell, message, log))
        self._end(cell, "failed", message, log)

    def _end(self, cell: Cell, outcome: str, text: str, log: Path | None = None) -> None:
        self._queue.remove(cell)
        self._ended += 1
        self._attempts.pop(cell.key, None)
        facts = {"outcome": outcome, "text": text, "log": log and str(log)}
        self._watch.tell("ended", cell, over=self._ended, left=self._time_left(), **facts)

    def _tick(self) -> None:
        """Tell the watch the estimated seconds that are left, at most once per `_WAIT`."""
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
        """Return the estimated seconds until the grid is done; None if nothing is known."""
        now = time.monotonic()
        running = {run.cell.key: (run.cell, now - run.since) for run in self._running.values()}
        return self._estimator.left(self._queue.waiting(), running, max(1, len(self._slots)))


def _scores(record: ResultRecord) -> str:
    """Return the main metric of a record as text; all metrics if the main one is missing."""
    wanted = MAIN_METRIC.get(record.task)
    parts = []
    for name, metric in record.metrics.items():
        if name == wanted or wanted not in record.metrics:
            full = None if record.method == "fp" else record.fp_metrics.get(name)
            against = "" if full is None else f" (fp {full.value:.1f})"
            parts.append(f"{name} {metric.value:.1f}{against}")
    return ", ".join(parts)
