"""Attempts at a cell: after a failure, try again, try with less memory, or give up."""

import time
from dataclasses import dataclass, field, replace

from benchmarks.grid.cell import Cell
from benchmarks.run.executor import Failed
from fimaq_core.progress import Progress
from tasks.common.request import CellRequest

#: Stages whose progress has the loss of an optimisation step.
_OPTIMISING = ("reconstruct", "reconstruct MLPs")
_ADVICE = (
    "Keep less in memory (PLACEMENT=disk or --placement disk), run fewer cells at a time "
    "(JOBS=1 or --jobs 1), or use a device with more memory."
)


@dataclass
class Attempts:
    """All attempts at one cell.

    Attributes:
        cell: the cell.
        retries: limit of attempts in a row whose process dies without progress; 0 gives up at the
            first failure.
        request: request of the next attempt. Less memory may be asked for, with equal results.
        since: start of the present attempt, by `time.monotonic`.
    """

    cell: Cell
    retries: int
    request: CellRequest
    since: float = 0.0
    _reached: set[tuple[str, str]] = field(default_factory=set)  # stages and blocks so far
    _is_further: bool = False  # the present attempt has reached a new one
    _last: Progress | None = None
    _fruitless: int = 0
    _errors: int = 0

    def begin(self) -> None:
        """Begin the next attempt."""
        self._is_further, self._last, self.since = False, None, time.monotonic()

    def heard(self, progress: Progress) -> None:
        """Note the progress of the present attempt."""
        place = (progress.stage, progress.block)
        self._last = progress
        if place not in self._reached and not progress.stage.startswith("wait for "):
            self._reached.add(place)
            self._is_further = True

    def failed(self, failure: Failed) -> tuple[bool, str]:
        """Return True to try the cell again after a failure, and the reason for people."""
        again, reason = False, failure.message
        if failure.kind == "memory":
            return self._with_less_memory(reason)
        if failure.kind == "error":
            self._errors += 1
            again = bool(self.retries) and self._errors == 1
            reason += "; tried once more in a new process" if again else ""
        elif failure.kind == "died":
            # Attempts with progress are not counted: each goes on after the last finished block.
            self._fruitless = 0 if self._is_further else self._fruitless + 1
            again = self._fruitless < self.retries
            if not again and self._fruitless > 1:
                reason += f", {self._fruitless} times without progress"
        return again, reason

    def _with_less_memory(self, reason: str) -> tuple[bool, str]:
        """Change the request so that it needs less memory; see `failed`."""
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
