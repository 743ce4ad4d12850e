"""What follows a failed attempt at a cell: another one, one with less memory, or giving up."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.run.executor import Failed
from fimaq_core.progress import Progress
from tasks.common.request import CellRequest

#: Stages whose progress has a loss: in optimisation steps, whose batch decides the result.
_OPTIMISING = ("reconstruct", "reconstruct MLPs")


@dataclass(frozen=True)
class Again:
    """The cell is to be tried again."""

    reason: str


@dataclass(frozen=True)
class GivenUp:
    """The cell has failed."""

    message: str
    log: Path | None


@dataclass
class Attempts:
    """All attempts at one cell so far.

    Attributes:
        request: of the next attempt. Memory that ran out has changed it, without any effect on the
            result.
        retries: attempts in a row whose process may die without getting further; 0 gives up at the
            first failure.
    """

    request: CellRequest
    retries: int
    _places: set[tuple[str, str]] = field(default_factory=set)
    _grew: bool = False
    _last: tuple[str, str] = ("", "")
    _stepping: bool = False
    _fruitless: int = 0
    _errors: int = 0

    def begin(self) -> None:
        """An attempt starts."""
        self._grew, self._last, self._stepping = False, ("", ""), False

    def heard(self, progress: Progress) -> None:
        """The attempt has come this far."""
        place = (progress.stage, progress.block)
        if place != self._last:
            self._last, self._stepping = place, False
        self._stepping |= progress.loss is not None
        if place not in self._places and not progress.stage.startswith("wait for "):
            self._places.add(place)
            self._grew = True

    def failed(self, failure: Failed) -> Again | GivenUp:
        """The attempt has failed. Not for busy cells: those have not been tried."""
        if failure.kind == "memory":
            return self._lighter(failure)
        if failure.kind == "died":
            return self._died(failure)
        if failure.kind == "error" and self.retries and not self._errors:
            self._errors += 1
            return Again(f"{failure.message}; tried once more in a fresh process")
        return GivenUp(failure.message, failure.log)

    def _died(self, failure: Failed) -> Again | GivenUp:
        # An attempt that got further goes on from its last block: however often, that ends.
        self._fruitless = 0 if self._grew else self._fruitless + 1
        if self.retries and self._fruitless < self.retries:
            return Again(failure.message)
        times = f", {self._fruitless} times without getting further"
        return GivenUp(failure.message + (times if self._fruitless > 1 else ""), failure.log)

    def _lighter(self, failure: Failed) -> Again | GivenUp:
        """Take the next step to less memory."""
        request, reason = self.request, f"memory ran out ({failure.message})"
        if request.device.startswith("cuda") and request.placement == "device":
            what = "what blocks take in and give is kept in host memory"
            return self._changed(replace(request, placement="host"), what)
        if self._stepping and self._last[0] in _OPTIMISING:
            place = " ".join(part for part in self._last if part)
            return GivenUp(
                f"{reason} in an optimisation step ({place}). The recipe's batch decides the "
                f"result, so it is not made smaller. {self._ways_out()} Another batch_size is "
                "another recipe with other results.",
                failure.log,
            )
        batch = request.eval_batch // 2
        if batch:
            images = "one image" if batch == 1 else f"{batch} images"
            what = f"forward passes take {images} at a time"
            return self._changed(replace(request, eval_batch=batch), what)
        message = f"{reason}, even one image at a time. {self._ways_out()}"
        return GivenUp(message, failure.log)

    def _changed(self, request: CellRequest, what: str) -> Again:
        note = f"memory ran out: {what}"
        self.request = replace(request, notes=(*request.notes, note))
        return Again(note)

    def _ways_out(self) -> str:
        ways = ["run fewer cells at a time (JOBS=1 or --jobs 1)"]
        if self.request.placement != "disk":
            ways.insert(0, "keep less in memory (PLACEMENT=disk or --placement disk)")
        if self.request.device.startswith("cuda"):
            ways.append("use a GPU with more memory")
        text = ", ".join(ways[:-1]) + (", or " if len(ways) > 1 else "") + ways[-1]
        return f"{text[0].upper()}{text[1:]}."
