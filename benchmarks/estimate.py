"""How long the rest of a grid will take, from the cells measured so far."""

from collections.abc import Iterable, Mapping

from benchmarks.cells import Cell, Key
from benchmarks.units import duration
from fimaq_core.recipe import Recipe

#: Cost of a step against one of squared error: the rest of the network runs behind each block for this loss.
_STEP_FACTORS = {"prediction": 4.0}

#: Cost of an MLP's step against its block's.
_MLP_SHARE = 0.6


def kind(cell: Cell) -> str:
    """Return what dominates a cell's cost: ``fp`` (evaluation only), ``reconstruct``, ``mlp``, ``refit`` or ``calibrate``."""
    recipe = cell.request.recipe
    if recipe is None:
        return "fp"
    if recipe.reconstruct:
        return "reconstruct"
    return "mlp" if recipe.reconstruct_mlp else "refit" if recipe.refit else "calibrate"


def expected_cost(cell: Cell) -> float:
    """Return a cell's cost against a full-precision evaluation, before anything is measured.

    Rough: it orders chains, and scales what one axis point took to what another will. Images through a block's step and
    images through a Fisher pass (forward and backward through what follows the block) are taken to cost the same.
    """
    recipe = cell.request.recipe
    if recipe is None:
        return 1.0
    images = 0.0
    if recipe.reconstruct:
        images += _STEP_FACTORS.get(recipe.loss, 1.0) * recipe.steps * recipe.batch_size
        images += _passes(recipe) * recipe.calibration_images
    if recipe.reconstruct_mlp:
        images += _MLP_SHARE * recipe.mlp_steps * recipe.mlp_batch
    return 3.0 + (3.0 if recipe.refit else 0.0) + images / 640


def _passes(recipe: Recipe) -> int:
    """Return the gradient passes a block that a recipe's loss takes."""
    if recipe.loss in ("mse", "mae"):
        return 0
    return recipe.fisher_k if recipe.loss in ("fisher_diag", "fisher_lr", "fisher_dplr") else 1


class Estimator:
    """Keeps measured seconds and predicts the rest."""

    def __init__(self) -> None:
        #: By group: how many cells, the sum of their seconds, and of their seconds against expected costs.
        self._sums: dict[tuple[str, ...], tuple[int, float, float]] = {}
        self._predicted: dict[Key, float | None] = {}

    def add(self, cell: Cell, seconds: float) -> None:
        """Note how long a cell took."""
        relative = seconds / expected_cost(cell)
        for level in levels(cell):
            count, total, relatives = self._sums.get(level, (0, 0.0, 0.0))
            self._sums[level] = count + 1, total + seconds, relatives + relative
        self._predicted.clear()

    def seconds(self, cell: Cell) -> float | None:
        """Predict a cell: from its axis point on its model, else its method on its model, else its method, else its kind.

        All of these in its section and scope, its kind at last anywhere. Within a method, what other points took is scaled by
        their expected costs. None if nothing of the kind is known.
        """
        # Asked for every waiting cell twice a second.
        if cell.key not in self._predicted:
            self._predicted[cell.key] = self._from(cell, levels(cell))
        return self._predicted[cell.key]

    def of_method(self, cell: Cell) -> float | None:
        """Predict a cell as :meth:`seconds` does, but from cells of its method only."""
        return self._from(cell, [level for level in levels(cell) if level[0] != "kind"])

    def of_model(self, cell: Cell) -> float | None:
        """Predict a cell as :meth:`of_method` does, but from cells of its model only."""
        return self._from(cell, levels(cell)[:2])

    def _from(self, cell: Cell, groups: Iterable[tuple[str, ...]]) -> float | None:
        for level in groups:
            count, total, relatives = self._sums.get(level, (0, 0.0, 0.0))
            if count and level[0] in ("model and method", "method"):
                return relatives / count * expected_cost(cell)
            if count:
                return total / count
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


def levels(cell: Cell) -> list[tuple[str, ...]]:
    """Return the groups of cells that tell something of a cell's cost, those most like it first."""
    return [
        ("point", cell.section, cell.subject, cell.method, cell.point),
        ("model and method", cell.section, cell.subject, cell.method),
        ("method", cell.section, cell.scope, cell.method),
        ("kind", cell.section, cell.scope, kind(cell)),
        ("kind", kind(cell)),
    ]


def time_left(left: float | None) -> str:
    """Return how long something still takes for people: ``about 6 min left``."""
    return "time left not known yet" if left is None else f"about {duration(left)} left"
