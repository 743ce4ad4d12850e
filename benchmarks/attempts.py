"""What becomes of a cell whose attempt failed: tried again as it was, tried again with less memory, or given up."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.engines.base import Failed
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
        request: of the next attempt; memory that ran out has changed it, in ways that change nothing of the result.
        retries: attempts in a row whose process may die without getting further; 0 gives up at the first failure.
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
        """The attempt says where it is."""
        place = (progress.stage, progress.block)
        if place != self._last:
            self._last, self._stepping = place, False
        self._stepping |= progress.loss is not None
        if place not in self._places and not progress.stage.startswith("wait for "):
            self._places.add(place)
            self._grew = True

    def failed(self, failure: Failed) -> Again | GivenUp:
        """The attempt has failed. Not for cells that are busy: those have not been tried."""
        if failure.kind == "memory":
            return self._lighter(failure)
        if failure.kind == "died":
            return self._died(failure)
        if failure.kind == "error" and self.retries and not self._errors:
            self._errors += 1
            return Again(f"{failure.message}; tried once more in a fresh process")
        return GivenUp(failure.message, failure.log)

    def _died(self, failure: Failed) -> Again | GivenUp:
        # One that got further goes on from its last finished block: however often that happens, it ends.
        self._fruitless = 0 if self._grew else self._fruitless + 1
        if self.retries and self._fruitless < self.retries:
            return Again(failure.message)
        if self._fruitless > 1:
            return GivenUp(f"{failure.message}, {self._fruitless} times without getting further", failure.log)
        return GivenUp(failure.message, failure.log)

    def _lighter(self, failure: Failed) -> Again | GivenUp:
        """Take the next step to less memory."""
        request, gpu = self.request, self.request.device.startswith("cuda")
        if gpu and request.placement == "device":
            return self._changed(replace(request, placement="host"), "what blocks take in and give is kept in host memory")
        if self._stepping and self._last[0] in _OPTIMISING:
            return GivenUp(f"memory ran out ({failure.message}) {self._advice()}", failure.log)
        batch = request.eval_batch // 2
        if batch:
            images = "one image" if batch == 1 else f"{batch} images"
            return self._changed(replace(request, eval_batch=batch), f"forward passes take {images} at a time")
        return GivenUp(f"memory ran out ({failure.message}), even one image at a time. {self._ways_out()}", failure.log)

    def _changed(self, request: CellRequest, what: str) -> Again:
        note = f"memory ran out: {what}"
        self.request = replace(request, notes=(*request.notes, note))
        return Again(note)

    def _advice(self) -> str:
        stage, block = self._last
        return (
            f"in an optimisation step ({' '.join(part for part in (stage, block) if part)}). The recipe's batch decides the "
            f"result, so it is not made smaller. {self._ways_out()} Another batch_size is another recipe with other results."
        )

    def _ways_out(self) -> str:
        ways = ["run fewer cells at a time (JOBS=1 or --jobs 1)"]
        if self.request.placement != "disk":
            ways.insert(0, "keep less in memory (PLACEMENT=disk or --placement disk)")
        if self.request.device.startswith("cuda"):
            ways.append("use a GPU with more memory")
        text = ", ".join(ways[:-1]) + (", or " if len(ways) > 1 else "") + ways[-1]
        return f"{text[0].upper()}{text[1:]}."
