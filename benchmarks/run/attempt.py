"""Decisions after a failed attempt at a cell: try again, with less memory, or give up."""

import time
from dataclasses import dataclass, field, replace

from benchmarks.grid.cell import Cell
from benchmarks.run.executor import Failed
from fimaq_core.progress import Progress
from tasks.common.request import CellRequest

#: Stages whose progress has a loss: in optimisation steps, whose batch decides the result.
_OPTIMISING = ("reconstruct", "reconstruct MLPs")


@dataclass
class Attempts:
    """All attempts at one cell so far.

    Attributes:
        cell: the cell.
        retries: attempts in a row whose process may die without getting further; 0 gives up at the
            first failure.
        request: of the next attempt. Memory that ran out has changed it, without any effect on the
            result.
        since: when the present attempt started.
    """

    cell: Cell
    retries: int
    request: CellRequest
    since: float = 0.0
    _places: set[tuple[str, str]] = field(default_factory=set)
    _grew: bool = False
    _last: tuple[str, str] = ("", "")
    _stepping: bool = False
    _fruitless: int = 0
    _errors: int = 0

    def begin(self) -> None:
        """An attempt starts."""
        self._grew, self._last, self._stepping = False, ("", ""), False
        self.since = time.monotonic()

    def heard(self, progress: Progress) -> None:
        """The attempt has come this far."""
        place = (progress.stage, progress.block)
        if place != self._last:
            self._last, self._stepping = place, False
        self._stepping |= progress.loss is not None
        if place not in self._places and not progress.stage.startswith("wait for "):
            self._places.add(place)
            self._grew = True

    def failed(self, failure: Failed) -> tuple[bool, str]:
        """Return whether the cell is tried again after a failed attempt, and the reason."""
        again, reason = False, failure.message
        if failure.kind == "memory":
            return self._lighter(reason)
        if failure.kind == "error":
            self._errors += 1
            again = bool(self.retries) and self._errors == 1
            reason += "; tried once more in a fresh process" if again else ""
        elif failure.kind == "died":
            # An attempt that got further goes on from its last block: however often, that ends.
            self._fruitless = 0 if self._grew else self._fruitless + 1
            again = bool(self.retries) and self._fruitless < self.retries
            if not again and self._fruitless > 1:
                reason += f", {self._fruitless} times without getting further"
        return again, reason

    def _lighter(self, reason: str) -> tuple[bool, str]:
        """Take the next step to less memory."""
        request, reason = self.request, f"memory ran out ({reason})"
        batch = request.eval_batch // 2
        if request.device.startswith("cuda") and request.placement == "device":
            what = "what blocks take in and give is kept in host memory"
            request = replace(request, placement="host")
        elif self._stepping and self._last[0] in _OPTIMISING:
            place = " ".join(part for part in self._last if part)
            return False, (
                f"{reason} in an optimisation step ({place}). The recipe's batch decides the "
                f"result, so it is not made smaller. {self._ways_out()} Another batch_size is "
                "another recipe with other results."
            )
        elif batch:
            images = "one image" if batch == 1 else f"{batch} images"
            what = f"forward passes take {images} at a time"
            request = replace(request, eval_batch=batch)
        else:
            return False, f"{reason}, even one image at a time. {self._ways_out()}"
        note = f"memory ran out: {what}"
        self.request = replace(request, notes=(*request.notes, note))
        return True, note

    def _ways_out(self) -> str:
        ways = ["run fewer cells at a time (JOBS=1 or --jobs 1)"]
        if self.request.placement != "disk":
            ways.insert(0, "keep less in memory (PLACEMENT=disk or --placement disk)")
        if self.request.device.startswith("cuda"):
            ways.append("use a GPU with more memory")
        text = ", ".join(ways[:-1]) + (", or " if len(ways) > 1 else "") + ways[-1]
        return f"{text[0].upper()}{text[1:]}."
