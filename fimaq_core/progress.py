"""Progress of a run, as the caller receives it."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import SupportsFloat

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.segment import Segment

from fimaq_core.errors import NumericsError
from fimaq_core.terminal import printable

#: Largest number of steps per block for which every step is reported.
FEW_STEPS = 10


@dataclass(frozen=True)
class Progress:
    """Progress of a run: ``done`` of ``total`` units of ``stage``; now in ``block``, if any."""

    stage: str
    done: int
    total: int
    block: str = ""
    loss: float | None = None  # loss of the step just done, if this reports a step
    tape_bytes: int | None = None  # size of the tape, if this reports a finished block


OnProgress = Callable[[Progress], None]
#: Called after every step with its number (from 1) and its loss.
Tick = Callable[[int, SupportsFloat], None]


def silent(_: Progress) -> None:
    """Ignore progress."""


def losses_to(on_progress: OnProgress, begin: Progress, steps: int, what: str, advice: str) -> Tick:
    """Return a function that reports the loss after the last and every 50th of ``steps`` steps.

    With at most :data:`FEW_STEPS` steps it reports every step. ``begin`` is the progress before the
    first step. If a reported loss is NaN or infinite, it raises NumericsError with the name of the
    loss (``what``) and an ``advice``.
    """

    def tick(step: int, loss: SupportsFloat) -> None:
        # Rarely, since a GPU waits while the loss is read.
        if step % 50 and step != steps and steps > FEW_STEPS:
            return
        value = float(loss)
        if not math.isfinite(value):
            raise NumericsError(f"{begin.block}: {what} is {value}; {advice}.")
        on_progress(Progress(begin.stage, begin.done + step, begin.total, begin.block, value))

    return tick


class PrintableConsole(Console):
    r"""Console of rich for text from files: no markup, and invisible characters as escapes.

    Example:
        >>> PrintableConsole().print("[red]\x1b[2J")
        [red]\x1b[2J
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        """Make a console on the standard output or error stream of this moment."""
        stream = sys.stderr if stderr else sys.stdout
        file = getattr(stream, "direct", stream)
        super().__init__(file=file, width=width, markup=False, emoji=False, highlight=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of a renderable with printable text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """Show one bar per stage on a terminal or, with ipywidgets, in a notebook."""
    console = PrintableConsole(stderr=True)
    drawn = console.is_jupyter and find_spec("ipywidgets") is not None
    bars = Bars(
        TextColumn("{task.description:28s}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        disable=not (console.is_terminal or drawn),
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def on_progress(event: Progress) -> None:
        if event.stage not in tasks:
            tasks[event.stage] = bars.add_task(event.stage, total=event.total, detail="")
        detail = "" if event.loss is None else f"loss {event.loss:.4g}"
        bars.update(
            tasks[event.stage],
            total=event.total,
            completed=event.done,
            description=f"{event.stage} {event.block}",
            detail=detail,
        )

    with bars:
        yield on_progress
