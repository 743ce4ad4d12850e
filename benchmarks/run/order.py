"""Which cell runs next: those that share costly parts one after the other, and no slot idle."""

from bisect import insort
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.costs.estimate import expected_cost
from benchmarks.grid.cell import Cell, Key
from fimaq_core.recipe import OFF
from tasks.common import registry
from tasks.common.record import bits_name


def make_chains(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group the cells into chains, each for one slot at first, in the order of their start.

    Cells of one (section, model, bits, seed) share a calibration, and those of several scopes also
    their reconstruction: one after the other, it is computed once and nobody waits for it. The
    whole model, a task's usual scope, comes last: its parts are done by then. Each axis point is
    its own chain; otherwise most slots would be idle in an ablation.

    Full-precision cells come first, since all others of the model use theirs, then models whose
    MLPs are reconstructed, which others share. Then the costliest chain comes first, so that none
    is left over at the end.
    """
    chains: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        shared = (cell.section, cell.model, cell.w_bit, cell.a_bit, cell.seed, cell.point)
        chains.setdefault(shared, []).append(cell)
    for chain in chains.values():
        chain.sort(key=_is_whole)

    def order(chain: list[Cell]) -> tuple[bool, bool, float]:
        first = chain[0]
        cost = -sum(expected_cost(cell) for cell in chain)
        return first.request.recipe is not None, first.bits != bits_name(OFF, OFF), cost

    return sorted(chains.values(), key=order)


def _is_whole(cell: Cell) -> bool:
    return cell.scope in registry.scopes(cell.task)[:1]


@dataclass(eq=False)
class _Chain:
    """Cells that share costly parts.

    Attributes:
        index: place of the chain in the order of their start.
        waiting: cells not started, in their order.
        running: cells being measured.
        owner: the slot that measures the chain, one cell after the other.
        opened: whether one cell is over, well or not: its shared parts exist, or nobody makes them.
    """

    index: int
    waiting: list[Cell]
    running: list[Cell] = field(default_factory=list)
    owner: Hashable | None = None
    opened: bool = False

    def ready(self, backwards: bool = False) -> Cell | None:
        """Return the first (or last) waiting cell whose parts are done; None if there is none."""
        for cell in reversed(self.waiting) if backwards else self.waiting:
            others = [o for o in (*self.waiting, *self.running) if o.method == cell.method]
            if not _is_whole(cell) or all(other.scope == cell.scope for other in others):
                return cell
        return None

    @property
    def cost(self) -> float:
        """Cost of the waiting cells, in the units of `benchmarks.costs.estimate.expected_cost`."""
        return sum(expected_cost(cell) for cell in self.waiting)


class Schedule:
    """The cells that are still to be measured. Slots have any hashable names."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        #: Chains with waiting cells, in the order of their start.
        self._chains = [_Chain(index, chain) for index, chain in enumerate(make_chains(cells))]
        self._of = {cell.key: chain for chain in self._chains for cell in chain.waiting}
        #: (section, model) of full-precision cells that are not over: their other cells wait.
        full = [cell for cell in cells if cell.request.recipe is None]
        self._unmeasured = {(cell.section, cell.model) for cell in full}
        self._aside: dict[Key, Cell] = {}

    def take(self, slot: Hashable) -> Cell | None:
        """Return the next cell for ``slot``, which runs from now on; None if all others must wait.

        That is the next of the slot's chain, else the first of the first free chain, else the last
        of another slot's chain that is past its first cell, the one with most left to do.
        """
        for chain in [chain for chain in self._chains if chain.owner == slot]:
            if (cell := self._startable(chain)) is not None:
                return self._start(chain, cell)
        for chain in self._chains:
            is_free = chain.owner is None and (chain.opened or not chain.running)
            if is_free and (cell := self._startable(chain)) is not None:
                self._disown({slot})
                chain.owner = slot
                return self._start(chain, cell)
        others = [chain for chain in self._chains if chain.owner not in (None, slot)]
        for chain in sorted(others, key=lambda chain: -chain.cost):
            if chain.opened and (cell := self._startable(chain, backwards=True)) is not None:
                return self._start(chain, cell)
        return None

    def _startable(self, chain: _Chain, backwards: bool = False) -> Cell | None:
        cell = chain.ready(backwards)
        if cell is None or cell.request.recipe is None:
            return cell
        return None if (cell.section, cell.model) in self._unmeasured else cell

    def _start(self, chain: _Chain, cell: Cell) -> Cell:
        chain.waiting.remove(cell)
        chain.running.append(cell)
        if not chain.waiting:
            chain.owner = None
            self._chains.remove(chain)
        return cell

    def _disown(self, slots: Collection[Hashable]) -> None:
        for chain in self._chains:
            if chain.owner in slots:
                chain.owner = None

    def over(self, cell: Cell) -> None:
        """A running cell, or one put aside, is measured or has failed."""
        self._stop(cell)
        if cell.request.recipe is None:
            self._unmeasured.discard((cell.section, cell.model))

    def back(self, cell: Cell) -> None:
        """A running cell, or one put aside, waits again, before the others of its chain."""
        chain = self._stop(cell)
        chain.waiting.insert(0, cell)
        if chain not in self._chains:
            insort(self._chains, chain, key=lambda chain: chain.index)

    def put_aside(self, cell: Cell) -> None:
        """Another runner measures a running cell: it is not taken before `back`."""
        self._stop(cell)
        self._aside[cell.key] = cell

    def _stop(self, cell: Cell) -> _Chain:
        chain = self._of[cell.key]
        self._aside.pop(cell.key, None)
        if cell in chain.running:
            chain.running.remove(cell)
            chain.opened = True
        return chain

    def keep(self, slots: Collection[Hashable]) -> None:
        """Only these slots are there: chains of others are free."""
        self._disown({chain.owner for chain in self._chains} - {None, *slots})

    @property
    def aside(self) -> list[Cell]:
        """The cells that were put aside."""
        return list(self._aside.values())

    def waiting(self) -> Iterator[Cell]:
        """Yield the cells that are not running."""
        for chain in self._chains:
            yield from chain.waiting
        yield from self._aside.values()

    def __bool__(self) -> bool:
        return bool(self._chains or self._aside)
