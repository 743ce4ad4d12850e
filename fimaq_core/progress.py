"""Progress of a run, as its caller hears it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsFloat

from fimaq_core.errors import NumericsError

#: Up to so many optimisation steps per block, each of them is reported.
FEW_STEPS = 10


@dataclass(frozen=True)
class Progress:
    """A moment of a run: ``done`` of ``total`` units of ``stage``, inside ``block`` if any."""

    stage: str
    done: int
    total: int
    block: str = ""
    loss: float | None = None  # of the optimisation step just made, else None
    tape_bytes: int | None = None  # of the tape behind a finished block, else None


Report = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Report to nobody."""


def losses_to(report: Report, begin: Progress, steps: int, what: str, advice: str) -> Callable[[int, SupportsFloat], None]:
    """Make a function that reports the loss of a step (from 1) now and then.

    It raises NumericsError for a loss that is NaN or infinite: ``what`` it is, and the ``advice``.
    ``begin`` is the moment before the first step.
    """

    def tick(step: int, loss: SupportsFloat) -> None:
        # Reading the loss makes a GPU wait, so it happens rarely; a few steps are for finding out
        # how long one takes.
        if step % 50 and step != steps and steps > FEW_STEPS:
            return
        value = float(loss)
        if not math.isfinite(value):
            raise NumericsError(f"{begin.block}: {what} is {value}; {advice}.")
        report(Progress(begin.stage, begin.done + step, begin.total, begin.block, value))

    return tick
