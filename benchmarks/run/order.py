"""Order of the cells: cells that share costly parts follow each other, and no slot is idle."""

from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterator, Sequence

from benchmarks.costs.estimate import expected_cost
from benchmarks.grid.cell import EXPORT, Cell, Key
from fimaq_core.recipe import OFF
from tasks.common import registry
from tasks.common.record import bits_name


def make_chains(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells as chains, in the order in which the chains start.

    A chain begins in one slot. Its cells have the same section, model, bits, seed and axis point,
    so they share a calibration. Cells of several scopes also share reconstructions; the scope of
    the whole model comes last, after its parts. An export follows the cell that it exports. Each
    axis point is its own chain; otherwise most slots would be idle in an ablation.

    Full-precision cells start first, because all other cells of their model use them. Models
    that only have reconstructed MLPs come next, because other cells use these MLPs. Then the
    costliest chain is first, so that no long chain remains at the end.
    """
    chains: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        point = "" if cell.point == EXPORT else cell.point
        shared = (cell.section, cell.model, cell.w_bit, cell.a_bit, cell.seed, point)
        chains.setdefault(shared, []).append(cell)
    for chain in chains.values():
        chain.sort(key=lambda cell: cell.scope in registry.scopes(cell.task)[:1])

    def order(chain: list[Cell]) -> tuple[bool, bool, float]:
        first = chain[0]
        cost = -sum(expected_cost(cell) for cell in chain)
        return first.request.recipe is not None, first.bits != bits_name(OFF, OFF), cost

    return sorted(chains.values(), key=order)


class CellQueue:
    """Queue of the cells without a result. The name of a slot is any hashable value.

    A cell waits, runs in a slot, is put aside (another runner measures it), or is removed.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        chains = make_chains(cells)
        self._chain = {cell.key: index for index, chain in enumerate(chains) for cell in chain}
        self._waiting = [cell for chain in chains for cell in chain]
        self._running: dict[Key, int] = {}  # chains of the running cells
        self._opened: set[int] = set()  # chains in which a cell has run, so shared parts are made
        self._at: dict[Hashable, int] = {}  # chain of each slot
        self._aside: dict[Key, Cell] = {}
        self._open = {cell.key for cell in cells}  # cells that have neither a record nor failed

    def take(self, slot: Hashable) -> Cell | None:
        """Return the next cell of `slot`, which runs from now on; None if all cells must wait.

        The first choice is a cell of the slot's chain. The second choice is a cell of a chain
        without a slot. The last choice is a cell of a chain in which another cell has run.
        """
        owned, running = set(self._at.values()), set(self._running.values())

        def rank(cell: Cell) -> int:
            """Return 0, 1 or 2 for the three choices, and 3 if the cell must wait."""
            chain = self._chain[cell.key]
            if not self._open.isdisjoint(cell.needs):
                return 3
            if chain == self._at.get(slot):
                return 0
            is_free = chain not in owned and chain not in running
            return 1 if is_free else 2 if chain in self._opened else 3

        cell = min(self._waiting, key=rank, default=None)
        if cell is None or (lowest := rank(cell)) == 3:
            return None
        self._waiting.remove(cell)
        self._running[cell.key] = self._chain[cell.key]
        if lowest == 1:
            self._at[slot] = self._chain[cell.key]
        return cell

    def _stop(self, cell: Cell) -> None:
        self._aside.pop(cell.key, None)
        if self._running.pop(cell.key, None) is not None:
            self._opened.add(self._chain[cell.key])

    def remove(self, cell: Cell) -> None:
        """Remove a running cell, which has a record or has failed."""
        self._stop(cell)
        self._open.discard(cell.key)

    def put_back(self, cell: Cell) -> None:
        """Let a cell that ran or was put aside wait again, before the others of its chain."""
        self._stop(cell)
        chain = self._chain[cell.key]
        place = bisect_left(self._waiting, chain, key=lambda other: self._chain[other.key])
        self._waiting.insert(place, cell)

    def put_aside(self, cell: Cell) -> None:
        """Put a running cell aside until `put_back`, because another runner measures it."""
        self._stop(cell)
        self._aside[cell.key] = cell

    def keep_slots(self, slots: Collection[Hashable]) -> None:
        """Free the chains of all other slots, which no longer exist."""
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
