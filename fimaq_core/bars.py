"""Progress bars for a run's reports."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from fimaq_core.progress import Progress, Report


@contextmanager
def progress_bars() -> Iterator[Report]:
    """Show one bar per stage on a terminal or, with ipywidgets, in a notebook."""
    console = Console(stderr=True)
    drawn = console.is_jupyter and find_spec("ipywidgets") is not None
    bars = Bars(
        TextColumn("{task.description:28s}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        disable=not (console.is_terminal or drawn),
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def report(event: Progress) -> None:
        if event.stage not in tasks:
            tasks[event.stage] = bars.add_task(event.stage, total=event.total, detail="")
        bars.update(
            tasks[event.stage],
            total=event.total,
            completed=event.done,
            description=f"{event.stage} {event.block}",
            detail="" if event.loss is None else f"loss {event.loss:.4g}",
        )

    with bars:
        yield report
