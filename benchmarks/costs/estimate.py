"""Estimates of seconds and memory of a cell from measured cells that are similar to it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.console import duration
from benchmarks.grid.cell import EXPORT, Cell, Key
from fimaq_core.recipe import Recipe

#: Cost of a step relative to the squared error. The prediction loss also runs all later blocks.
_STEP_FACTORS = {"prediction": 4.0, "prediction_pdquant": 5.0}
#: Cost of a step of an MLP relative to a step of its block.
_MLP_SHARE = 0.6
#: Cost of an export, as of :func:`expected_cost`.
_EXPORT_COST = 5.0
#: Losses without gradient passes, and losses with several gradient passes per block.
_NO_PASSES, _MANY_PASSES = ("mse", "mae", "mse_adalog"), ("fisher_diag", "fisher_lr", "fisher_dplr")


def kind(cell: Cell) -> str:
    """Return the kind of work that takes most of a cell's time; ``fp`` is evaluation alone."""
    recipe = cell.request.recipe
    if recipe is None or cell.home:
        return "fp"
    if recipe.reconstruct:
        return "reconstruct"
    return "mlp" if recipe.reconstruct_mlp else "refit" if recipe.refit else "calibrate"


def passes(recipe: Recipe) -> int:
    """Return the number of gradient passes per block that the loss of a recipe needs."""
    if recipe.loss in _NO_PASSES:
        return 0
    return recipe.fisher_k if recipe.loss in _MANY_PASSES else 1


def expected_cost(cell: Cell) -> float:
    """Return a rough cost of a cell; the evaluation in full precision costs 1.

    Assumes that an image costs the same in a step of a block and in a gradient pass.
    """
    recipe = cell.request.recipe
    if recipe is None or cell.home:
        return 1.0
    if cell.point == EXPORT:  # writes the file, checks it and evaluates it
        return _EXPORT_COST
    images = 0.0
    if recipe.reconstruct:
        images += _STEP_FACTORS.get(recipe.loss, 1.0) * recipe.steps * recipe.batch_size
        images += passes(recipe) * recipe.calibration_images
    if recipe.reconstruct_mlp:
        images += _MLP_SHARE * recipe.mlp_steps * recipe.mlp_batch
    images += recipe.finish_steps * recipe.finish_batch
    return 3.0 + (3.0 if recipe.refit else 0.0) + images / 640


#: Numbers of groups of :func:`groups_of` that an estimate may use: up to the cell itself, up to
#: cells of the same model and method, or up to cells of the same method.
OWN, MODEL, METHOD = 1, 3, 4


def groups_of(cell: Cell) -> list[tuple[object, ...]]:
    """Return the groups of similar cells that contain a cell, the most similar first."""
    section, subject, method, scope = cell.section, cell.subject, cell.method, cell.scope
    return [
        ("cell", cell.key),
        ("point", section, subject, method, cell.point),
        ("model", section, subject, method),
        ("method", section, scope, method),
        ("kind in section", section, scope, kind(cell)),
        ("kind", kind(cell)),
    ]


@dataclass
class Sums:
    """Costs of the measured cells of a group."""

    seconds: float = 0.0  #: sum
    expected: float = 0.0  #: sum of :func:`expected_cost`
    memory: int = 0  #: maximum in bytes
    disk: int = 0  #: maximum in bytes; 0 if unknown
    machines: dict[str, None] = field(default_factory=dict)


class Estimator:
    """Estimates costs from measured cells: the first group of :func:`groups_of` that has any.

    Assumes that seconds are proportional to :func:`expected_cost`.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[object, ...], Sums] = defaultdict(Sums)

    def add(
        self, cell: Cell, seconds: float, *, memory: int = 0, disk: int = 0, machine: str = ""
    ) -> None:
        """Add a measured cell; ``memory`` and ``disk`` in bytes."""
        for group in groups_of(cell):
            sums = self._groups[group]
            sums.seconds += seconds
            sums.expected += expected_cost(cell)
            sums.memory, sums.disk = max(sums.memory, memory), max(sums.disk, disk)
            sums.machines[machine] = None

    def estimate(self, cell: Cell, depth: int | None = None) -> tuple[float, Sums] | None:
        """Return seconds and the costs of the group that they come from.

        None if no cell of the first ``depth`` groups (None: of all groups) was measured.
        """
        for group in groups_of(cell)[:depth]:
            if group in self._groups:
                sums = self._groups[group]
                return sums.seconds / sums.expected * expected_cost(cell), sums
        return None

    def seconds(self, cell: Cell) -> float | None:
        """Return the estimated seconds; None if no similar cell was measured."""
        found = self.estimate(cell)
        return None if found is None else found[0]

    def left(
        self, waiting: Iterable[Cell], running: Mapping[Key, tuple[Cell, float]], jobs: int
    ) -> float | None:
        """Return the seconds until ``jobs`` processes finish all cells.

        ``running`` has the seconds since the start of each cell. None if a cell has no estimate.
        """
        total = longest = 0.0
        for cell, elapsed in [*((cell, 0.0) for cell in waiting), *running.values()]:
            expected = self.seconds(cell)
            if expected is None:
                return None
            rest = max(expected - elapsed, 0.0)
            total, longest = total + rest, max(longest, rest)
        return max(total / jobs, longest)


def time_left(left: float | None) -> str:
    """Return remaining seconds as text."""
    return "time left not known yet" if left is None else f"about {duration(left)} left"
