"""The view of a running grid in a terminal: a bar, a row for each running cell, and what ended scrolling by above."""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from benchmarks.board import Board
from benchmarks.cells import Cell
from benchmarks.display import Outcome
from benchmarks.rows import counts_line, running_table


class LiveView(Board):
    """See the module; drawn anew twice a second by rich's thread."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live = Live(self, console=console, refresh_per_second=2, vertical_overflow="crop")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        yield counts_line(self.counts(), self.elapsed, self.left, width)
        running = self.running()
        if running:
            # The header takes two lines of a narrow terminal, and the cursor one.
            yield running_table(running, width, max(console.size.height - 3, 1))

    def _say(self, cell: Cell, text: str) -> None:
        self._console.print(self.line(cell, text), markup=False)

    def begin(self, done: int, total: int) -> None:
        super().begin(done, total)
        self._live.start(refresh=True)

    def retried(self, cell: Cell, reason: str) -> None:
        super().retried(cell, reason)
        self._say(cell, f"waits again: {reason}")

    def ended(self, cell: Cell, outcome: Outcome, done: int, left: float | None) -> None:
        super().ended(cell, outcome, done, left)
        self._say(cell, outcome.line)

    def close(self) -> None:
        super().close()
        self._live.stop()
