"""Which cell runs next: in chains of cells that share what is dear, and so that no slot is idle while there is work."""

from bisect import insort
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.cells import Cell, Key
from benchmarks.estimate import expected_cost
from fimaq_core.recipe import OFF
from tasks.common import registry
from tasks.common.record import bits_name


def make_chains(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group the cells into chains, each for one slot at first, in the order in which they should start.

    Cells of one (section, model, bits, seed) share a calibration, and those of several scopes also what they reconstruct:
    measured one after the other, it is computed once and nobody waits for it. The whole model, a task's usual scope, comes last
    there: by then its parts are done. Axis points are chains of their own, or an ablation would keep no more slots busy than it
    has models: there each calibrates once at worst. Full-precision cells come first, since all others of the model use theirs,
    then models whose MLPs are reconstructed, which others share; then the dearest chain, so that none is left over at the end.
    """
    chains: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        chains.setdefault((cell.section, cell.model, cell.w_bit, cell.a_bit, cell.seed, cell.point), []).append(cell)
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
    """Cells that share things.

    Attributes:
        index: its place in the order of starting.
        waiting: cells not started, in the order to be measured.
        running: cells being measured.
        owner: the slot that measures it one by one.
        opened: whether one of its cells is over, well or not: what they share is made, or nobody is making it.
    """

    index: int
    waiting: list[Cell]
    running: list[Cell] = field(default_factory=list)
    owner: Hashable | None = None
    opened: bool = False

    def ready(self, backwards: bool = False) -> Cell | None:
        """The first (or last) waiting cell that need not wait for another of the chain; None if there is none."""
        for cell in reversed(self.waiting) if backwards else self.waiting:
            if not _is_whole(cell) or not any(self._is_part(other, cell) for other in (*self.waiting, *self.running)):
                return cell
        return None

    @staticmethod
    def _is_part(other: Cell, whole: Cell) -> bool:
        return other.method == whole.method and other.scope != whole.scope

    @property
    def cost(self) -> float:
        """What is still to do, in the units of :func:`~benchmarks.estimate.expected_cost`."""
        return sum(expected_cost(cell) for cell in self.waiting)


class Schedule:
    """The cells that are still to be measured. Slots are known by any hashable name."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._chains = [_Chain(index, list(chain)) for index, chain in enumerate(make_chains(cells))]
        self._of = {cell.key: chain for chain in self._chains for cell in chain.waiting}
        #: Chains with waiting cells; those that belong to a slot apart.
        self._free = list(self._chains)
        self._owned: dict[Hashable, _Chain] = {}
        #: (section, model) of full-precision cells that are not over: nothing else of these models starts.
        self._unmeasured = {(cell.section, cell.model) for cell in cells if cell.request.recipe is None}
        self._aside: dict[Key, Cell] = {}

    def take(self, slot: Hashable) -> Cell | None:
        """Return the next cell for ``slot``, which is running from now on; None if nothing can be done just now.

        That is the next of its chain, else the first of the first chain that nobody measures, else the last of another slot's
        chain, if that is past its first cell: the one with most left to do.
        """
        own = self._owned.get(slot)
        if own is not None:
            cell = self._startable(own)
            if cell is not None:
                return self._start(own, cell)
        for chain in self._free:
            cell = self._startable(chain) if chain.opened or not chain.running else None
            if cell is not None:
                self._own(slot, chain)
                return self._start(chain, cell)
        others = (chain for owner, chain in self._owned.items() if owner != slot and chain.opened)
        for chain in sorted(others, key=lambda chain: -chain.cost):
            cell = self._startable(chain, backwards=True)
            if cell is not None:
                return self._start(chain, cell)
        return None

    def _startable(self, chain: _Chain, backwards: bool = False) -> Cell | None:
        cell = chain.ready(backwards)
        if cell is None or (cell.request.recipe is not None and (cell.section, cell.model) in self._unmeasured):
            return None
        return cell

    def _start(self, chain: _Chain, cell: Cell) -> Cell:
        chain.waiting.remove(cell)
        chain.running.append(cell)
        if not chain.waiting:
            self._disown(chain)
            if chain in self._free:
                self._free.remove(chain)
        return cell

    def _own(self, slot: Hashable, chain: _Chain) -> None:
        if slot in self._owned:
            self._disown(self._owned[slot])
        self._free.remove(chain)
        self._owned[slot] = chain
        chain.owner = slot

    def _disown(self, chain: _Chain) -> None:
        if chain.owner is not None:
            del self._owned[chain.owner]
            chain.owner = None
            self._offer(chain)

    def _offer(self, chain: _Chain) -> None:
        if chain.waiting and chain.owner is None and chain not in self._free:
            insort(self._free, chain, key=lambda chain: chain.index)

    def over(self, cell: Cell) -> None:
        """A running cell, or one put aside, is measured or has failed."""
        self._stop(cell)
        self._aside.pop(cell.key, None)
        if cell.request.recipe is None:
            self._unmeasured.discard((cell.section, cell.model))

    def back(self, cell: Cell) -> None:
        """A running cell, or one put aside, waits again, before the others of its chain."""
        chain = self._stop(cell)
        self._aside.pop(cell.key, None)
        chain.waiting.insert(0, cell)
        self._offer(chain)

    def put_aside(self, cell: Cell) -> None:
        """A running cell is being measured by another runner: it is not taken before it is put back."""
        self._stop(cell)
        self._aside[cell.key] = cell

    def _stop(self, cell: Cell) -> _Chain:
        chain = self._of[cell.key]
        if cell in chain.running:
            chain.running.remove(cell)
            chain.opened = True
        return chain

    def keep(self, slots: Sequence[Hashable]) -> None:
        """Only these slots are there: chains of others belong to nobody."""
        for slot in set(self._owned) - set(slots):
            self._disown(self._owned[slot])

    @property
    def aside(self) -> list[Cell]:
        """The cells that were put aside."""
        return list(self._aside.values())

    def waiting(self) -> Iterator[Cell]:
        """The cells that are not running."""
        for chain in (*self._free, *self._owned.values()):
            yield from chain.waiting
        yield from self._aside.values()

    def __bool__(self) -> bool:
        return bool(self._free or self._owned or self._aside)
