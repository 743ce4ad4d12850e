"""What a run tells its caller while it works."""

from collections.abc import Callable
from dataclasses import dataclass

#: Up to so many optimisation steps per block, each of them is reported.
FEW_STEPS = 10


@dataclass(frozen=True)
class Progress:
    """A moment of a run: ``done`` of ``total`` units of ``stage``, inside ``block`` where there is one.

    ``loss`` is that of the optimisation step just made, None elsewhere. ``tape_bytes`` are those of
    the tape behind a finished block, None elsewhere.
    """

    stage: str
    done: int
    total: int
    block: str = ""
    loss: float | None = None
    tape_bytes: int | None = None


Report = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Report to nobody."""
