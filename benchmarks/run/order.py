"""Order of the cells: cells that share costly parts follow each other, and no slot is idle."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence

from benchmarks.costs.estimate import expected_cost
from benchmarks.grid.cell import Cell, Key
from fimaq_core.recipe import OFF
from tasks.common import registry
from tasks.common.record import bits_name


def make_chains(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group cells into chains in the order of their start. One slot runs one chain at first.

    The cells of a chain have the same section, model, bits, seed and axis point. They share a
    calibration, and cells of several scopes also share a reconstruction, which is computed once.
    The whole model comes last in its chain: its parts are done by then. Each axis point is its own
    chain; otherwise most slots would be idle in an ablation.

    Full-precision cells come first, because all other cells of their model use them. Models with
    reconstructed MLPs, which others share, come next. Then the costliest chain comes first, so that
    no long chain remains at the end.
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


class CellQueue:
    """Queue of the cells that are not over. Slots have any hashable names.

    A cell is waiting, running in a slot, put aside (another runner measures it), or over.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        chains = make_chains(cells)
        self._chain = {cell.key: index for index, chain in enumerate(chains) for cell in chain}
        self._waiting = [cell for chain in chains for cell in chain]
        self._aside: dict[Key, Cell] = {}
        #: Chains of the running cells, and chains with a cell that has run: their shared parts
        #: exist, or no process makes them.
        self._running: dict[Key, int] = {}
        self._opened: set[int] = set()
        #: Chain that each slot works on.
        self._at: dict[Hashable, int] = {}
        #: Cells that others wait for: full precision, by (section, model); parts of a model, by
        #: (chain, method).
        full = [cell for cell in cells if cell.request.recipe is None]
        parts = [cell for cell in cells if not _is_whole(cell)]
        self._full = {(cell.section, cell.model) for cell in full}
        self._parts = Counter((self._chain[cell.key], cell.method) for cell in parts)

    def take(self, slot: Hashable) -> Cell | None:
        """Return the next cell of `slot`, which runs from now on; None if all cells must wait.

        The first choice is the next cell of the slot's chain, then the first cell of a chain
        without a slot. The last choice is the last cell of the costliest chain of another slot,
        once one cell of this chain has run.
        """
        ready = [(cell, self._chain[cell.key]) for cell in self._waiting if self._is_ready(cell)]
        for cell, chain in ready:
            if chain == self._at.get(slot):
                return self._start(cell)
        owned, running = set(self._at.values()), set(self._running.values())
        for cell, chain in ready:
            if chain not in owned and (chain in self._opened or chain not in running):
                self._at[slot] = chain
                return self._start(cell)
        costs: dict[int, float] = defaultdict(float)
        for cell in self._waiting:
            costs[self._chain[cell.key]] += expected_cost(cell)
        others = [item for item in reversed(ready) if item[1] in self._opened]
        cell, _ = max(others, key=lambda item: costs[item[1]], default=(None, 0))
        return cell and self._start(cell)

    def _is_ready(self, cell: Cell) -> bool:
        if _is_whole(cell) and self._parts[self._chain[cell.key], cell.method]:
            return False
        return cell.request.recipe is None or (cell.section, cell.model) not in self._full

    def _start(self, cell: Cell) -> Cell:
        self._waiting.remove(cell)
        self._running[cell.key] = self._chain[cell.key]
        return cell

    def _stop(self, cell: Cell) -> None:
        self._aside.pop(cell.key, None)
        if self._running.pop(cell.key, None) is not None:
            self._opened.add(self._chain[cell.key])

    def over(self, cell: Cell) -> None:
        """Remove a running cell: it has a record or has failed."""
        self._stop(cell)
        if cell.request.recipe is None:
            self._full.discard((cell.section, cell.model))
        if not _is_whole(cell):
            self._parts[self._chain[cell.key], cell.method] -= 1

    def back(self, cell: Cell) -> None:
        """Let a cell that ran or was put aside wait again, before the others of its chain."""
        self._stop(cell)
        chain = self._chain[cell.key]
        place = bisect_left(self._waiting, chain, key=lambda other: self._chain[other.key])
        self._waiting.insert(place, cell)

    def put_aside(self, cell: Cell) -> None:
        """Put a running cell aside until `back`: another runner measures it."""
        self._stop(cell)
        self._aside[cell.key] = cell

    def keep(self, slots: Collection[Hashable]) -> None:
        """Free the chains of all slots but these."""
        self._at = {slot: chain for slot, chain in self._at.items() if slot in slots}

    @property
    def aside(self) -> list[Cell]:
        """Cells that were put aside."""
        return list(self._aside.values())

    def waiting(self) -> Iterator[Cell]:
        """Yield the cells that wait or were put aside."""
        yield from self._waiting
        yield from self._aside.values()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._aside)
