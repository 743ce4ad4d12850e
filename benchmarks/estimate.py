"""How long the rest of a grid will take, from the cells measured so far."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean

from benchmarks.cells import Cell, Key


def kind(cell: Cell) -> str:
    """Return what dominates a cell's cost: ``fp`` (evaluation only), ``calibrate`` or ``reconstruct``."""
    recipe = cell.request.recipe
    if recipe is None:
        return "fp"
    return "reconstruct" if recipe.reconstruct else "calibrate"


def expected_cost(cell: Cell) -> float:
    """Return a cell's cost against a full-precision evaluation, before anything is measured. Rough: it only orders."""
    recipe = cell.request.recipe
    if recipe is None:
        return 1.0
    if not recipe.reconstruct:
        return 3.0
    fisher = 1.4 if recipe.loss.startswith("fisher") else 1.0
    return 3.0 + fisher * recipe.steps * recipe.batch_size / 640


class Estimator:
    """Keeps measured seconds and predicts the rest."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)

    def add(self, cell: Cell, seconds: float) -> None:
        """Note how long a cell took."""
        for level in _levels(cell):
            self._seconds[level].append(seconds)

    def seconds(self, cell: Cell) -> float | None:
        """Predict a cell: from its method on its model, else its method, else cells of its kind; None if unknown."""
        for level in _levels(cell):
            if self._seconds[level]:
                return fmean(self._seconds[level])
        return None

    def left(self, waiting: Iterable[Cell], running: Mapping[Key, tuple[Cell, float]], jobs: int) -> float | None:
        """Predict the seconds until all is done; None while a kind of cell that is still to come was never measured.

        Args:
            waiting: cells not started.
            running: cells at work with the seconds they have taken so far.
            jobs: processes at work.
        """
        total = longest = 0.0
        for cell, elapsed in [*((cell, 0.0) for cell in waiting), *running.values()]:
            expected = self.seconds(cell)
            if expected is None:
                return None
            rest = max(expected - elapsed, 0.0)
            total, longest = total + rest, max(longest, rest)
        return max(total / jobs, longest)


def _levels(cell: Cell) -> list[tuple[str, ...]]:
    return [("both", cell.model, cell.method), ("method", cell.method), ("kind", kind(cell))]


def duration(seconds: float) -> str:
    """Return a length of time for people: ``24 s``, ``6 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
