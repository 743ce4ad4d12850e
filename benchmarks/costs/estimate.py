"""Expected costs of cells, and estimates of seconds and memory from measured cells alike."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.console import duration
from benchmarks.grid.cell import Cell, Key
from fimaq_core.recipe import Recipe

#: Cost of a step with a loss against one with squared error: the rest of the network runs too.
_STEP_FACTORS = {"prediction": 4.0}
#: Cost of an MLP's step against its block's.
_MLP_SHARE = 0.6
#: Losses without gradient passes, and losses with several per block.
_NO_PASSES, _MANY_PASSES = ("mse", "mae"), ("fisher_diag", "fisher_lr", "fisher_dplr")


def kind(cell: Cell) -> str:
    """Return what dominates a cell's cost; ``fp`` only evaluates."""
    recipe = cell.request.recipe
    if recipe is None:
        return "fp"
    if recipe.reconstruct:
        return "reconstruct"
    return "mlp" if recipe.reconstruct_mlp else "refit" if recipe.refit else "calibrate"


def passes(recipe: Recipe) -> int:
    """Return the gradient passes per block that a recipe's loss takes."""
    if recipe.loss in _NO_PASSES:
        return 0
    return recipe.fisher_k if recipe.loss in _MANY_PASSES else 1


def expected_cost(cell: Cell) -> float:
    """Return a cell's cost against a full-precision evaluation, before anything is measured.

    A rough number: it orders chains, and scales the time of one axis point to another. An image in
    a step of a block is taken to cost as much as an image in a Fisher pass.
    """
    recipe = cell.request.recipe
    if recipe is None:
        return 1.0
    images = 0.0
    if recipe.reconstruct:
        images += _STEP_FACTORS.get(recipe.loss, 1.0) * recipe.steps * recipe.batch_size
        images += passes(recipe) * recipe.calibration_images
    if recipe.reconstruct_mlp:
        images += _MLP_SHARE * recipe.mlp_steps * recipe.mlp_batch
    return 3.0 + (3.0 if recipe.refit else 0.0) + images / 640


#: Numbers of :func:`levels`: the cell itself, cells of its model too, cells of its method too.
OWN, MODEL, METHOD = 1, 3, 4


def levels(cell: Cell) -> list[tuple[object, ...]]:
    """Return the groups of cells that tell something of a cell's cost, the most alike first."""
    return [
        ("cell", *cell.key),
        ("point", cell.section, cell.subject, cell.method, cell.point),
        ("model and method", cell.section, cell.subject, cell.method),
        ("method", cell.section, cell.scope, cell.method),
        ("kind", cell.section, cell.scope, kind(cell)),
        ("kind", kind(cell)),
    ]


@dataclass
class Group:
    """Measured cells of a level."""

    cells: int = 0
    seconds: float = 0.0  #: of all cells together
    relative: float = 0.0  #: the same, against their expected costs
    memory: int = 0  #: largest
    disk: int | None = None  #: of a single cell
    machines: Counter[str] = field(default_factory=Counter)


class Estimator:
    """Keeps measured costs, and predicts those of other cells from cells alike.

    Cells of the same axis point on the same model tell most, then cells of the same method on this
    model, of the same method, and of the same kind, all in the same section and scope; at last
    cells of the same kind anywhere. Between axis points of a method, seconds are scaled by
    :func:`expected_cost`.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[object, ...], Group] = defaultdict(Group)
        self._predicted: dict[Key, float | None] = {}
        self.machines: Counter[str] = Counter()

    def add(
        self,
        cell: Cell,
        seconds: float,
        memory: int = 0,
        disk: int | None = None,
        machine: str = "",
    ) -> None:
        """Note what a cell took."""
        for level in levels(cell):
            group = self._groups[level]
            group.cells += 1
            group.seconds += seconds
            group.relative += seconds / expected_cost(cell)
            group.memory = max(group.memory, memory)
            group.disk = disk if level[0] == "cell" else None
            group.machines[machine] += 1
        self.machines[machine] += 1
        self._predicted.clear()

    def estimate(self, cell: Cell, depth: int | None = None) -> tuple[float, Group] | None:
        """Return seconds and group by the first known of ``depth`` levels; None if none is."""
        for level in levels(cell)[:depth]:
            if level in self._groups:
                group = self._groups[level]
                if level[0] in ("model and method", "method"):
                    return group.relative / group.cells * expected_cost(cell), group
                return group.seconds / group.cells, group
        return None

    def seconds(self, cell: Cell) -> float | None:
        """Return the estimated seconds; None if nothing of the kind is known."""
        if cell.key not in self._predicted:  # asked for every waiting cell twice a second
            found = self.estimate(cell)
            self._predicted[cell.key] = None if found is None else found[0]
        return self._predicted[cell.key]

    def left(
        self, waiting: Iterable[Cell], running: Mapping[Key, tuple[Cell, float]], jobs: int
    ) -> float | None:
        """Return the seconds until ``jobs`` processes are done; None if nothing tells of a cell.

        ``running`` cells come with the seconds that they have taken so far.
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
    """Return how long something still takes, for people: ``about 6 min left``."""
    return "time left not known yet" if left is None else f"about {duration(left)} left"
