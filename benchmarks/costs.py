"""Costs of cells: measured ones of finished cells, estimates of others.

Estimates come from finished cells, a committed reference, a rehearsal, or published minutes.
"""

import csv
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.cells import Cell, Key
from benchmarks.estimate import Estimator, levels
from benchmarks.published.minutes import Minutes, published_minutes
from benchmarks.units import duration
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import Recipe, make_recipe
from tasks.common import registry
from tasks.common.record import ResultRecord, own_seconds
from tasks.common.strict import Strict

Device = Literal["cpu", "gpu"]
Source = Literal["measured", "here", "reference", "rehearsal", "published", "alike"]

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"

_DAMAGED = "The reference costs {} are damaged (`python -m benchmarks reference` makes them)"


class CostRow(Strict):
    """A cell's costs: seconds of all its stages, the peak of its memory in bytes, and what it was measured on."""

    section: str
    model: str
    scope: str
    method: str
    bits: str
    seed: int | None
    point: str
    seconds: float = Field(ge=0, le=1e10, allow_inf_nan=False)
    peak_memory_bytes: int = Field(ge=0, le=1 << 60)
    device: str
    threads: int = Field(ge=0)

    @property
    def machine(self) -> str:
        """What it was measured on, for people."""
        return f"{self.device}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    @property
    def device_kind(self) -> Device:
        """Kind of the device: the name of a CPU begins with ``cpu``."""
        return "cpu" if self.device.startswith("cpu") else "gpu"

    @property
    def name(self) -> tuple[object, ...]:
        """What tells the cells of a grid apart."""
        return self.section, self.model, self.scope, self.method, self.bits, self.point, self.seed


class RehearsedRow(CostRow):
    """Estimated costs of a cell from a small run of it, with the disk that the cell will take."""

    model_config = ConfigDict(extra="ignore")

    disk_bytes: int = Field(ge=0)


class _Rehearsal(BaseModel):
    cells: list[RehearsedRow]


def cost_row(cell: Cell, record: ResultRecord) -> CostRow:
    """Return the costs of a finished cell."""
    where = record.environment
    return CostRow(
        section=cell.section, model=cell.model, scope=cell.scope, method=cell.method, bits=cell.bits, seed=cell.seed,
        point=cell.point, seconds=round(own_seconds(record), 3), peak_memory_bytes=record.peak_memory_bytes,
        device=where.device, threads=where.threads,
    )  # fmt: skip


def costs_path(profile: str, folder: Path = REFERENCE) -> Path:
    """The file with the reference costs of a profile, by its grid's name."""
    return folder / f"{profile}.costs.csv"


def costs_text(rows: Iterable[CostRow]) -> str:
    """Return the rows as CSV; no seed for full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(CostRow.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return text.getvalue()


def read_costs(path: Path) -> list[CostRow]:
    """Read a file that :func:`costs_text` made; nothing where there is none.

    Raises:
        FimaqError: it cannot be read, or a row does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise FimaqError(f"Cannot read the reference costs {path}: {error}.") from error
    try:
        found = csv.DictReader(io.StringIO(text, newline=""))
        return [CostRow.model_validate({**row, "seed": row.get("seed") or None}) for row in found]
    except (csv.Error, TypeError) as error:
        raise FimaqError(f"{_DAMAGED.format(path)}: {error}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise FimaqError(f"{_DAMAGED.format(path)}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def read_rehearsal(path: Path) -> list[RehearsedRow]:
    """Read the estimates of a rehearsal; nothing where there is none.

    Raises:
        FimaqError: the file cannot be read, or it holds something else.
    """
    try:
        return _Rehearsal.model_validate_json(path.read_bytes()).cells
    except FileNotFoundError:
        return []
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise FimaqError(
            f"Cannot read the rehearsal {path}: {first}. Delete it or rehearse anew.",
        ) from error


Rows = Sequence[tuple[Source, Sequence[CostRow]]]
_Pair = tuple[Cell, CostRow]


def other_rows(grids: Iterable[str], results: Path, folder: Path) -> tuple[Rows, list[str]]:
    """Return the costs that are not from finished cells here, the most trusted first, and warnings.

    Args:
        grids: names of the grids.
        results: root of what runs and rehearsals write.
        folder: holds the committed reference and the committed rehearsal.
    """
    files: Sequence[tuple[Source, Callable[[Path], Sequence[CostRow]], Path]] = (
        *(("reference", read_costs, costs_path(grid, folder)) for grid in grids),
        ("rehearsal", read_rehearsal, results / "rehearsal" / "rehearsal.json"),
        ("rehearsal", read_rehearsal, folder / "rehearsal.json"),
    )
    rows: list[tuple[Source, Sequence[CostRow]]] = []
    notes = []
    for source, read, path in files:
        try:
            rows.append((source, read(path)))
        except FimaqError as error:
            notes.append(f"warning: {error}")
    return rows, notes


@dataclass(frozen=True)
class Cost:
    """Time and memory of a cell, and where they are known from.

    Attributes:
        memory: peak in bytes; None where it is not known.
        source: ``measured``: the cell's own record; ``here``: finished cells alike; ``reference``
            and ``rehearsal``: the cell's row there, or rows alike; ``published``: minutes of its
            method on its model; ``alike``: published minutes of a method that does the same work.
        device: kind of the device it was measured on.
        disk: bytes; None where it is not known.
        note: what it was measured on, for people; of published minutes with their source.
        memory_note: the same of memory and disk, where these are from elsewhere.
    """

    seconds: float
    memory: int | None
    source: Source
    device: Device
    disk: int | None = None
    note: str = ""
    memory_note: str = ""

    @property
    def origin(self) -> str:
        """Where it is known from, for people."""
        words = _WORDS[self.source]
        if self.source in ("published", "alike"):
            between = "on" if self.source == "published" else "of"
            return f"{words}: {duration(self.seconds)} {between} {self.note}"
        return f"{words}, {self.note}"


class _Known:
    """Costs of one source on one kind of device, by cell and for cells alike."""

    def __init__(self, source: Source, device: Device, rows: Iterable[_Pair]) -> None:
        self.source, self.device = source, device
        self.machines: Counter[str] = Counter()
        self._rows: dict[Key, CostRow] = {}
        self._estimator = Estimator()
        self._memory: dict[tuple[str, ...], int] = defaultdict(int)
        for cell, row in rows:
            if cell.key in self._rows:
                continue
            self._rows[cell.key] = row
            self.machines[row.machine] += 1
            self._estimator.add(cell, row.seconds)
            for level in levels(cell):
                self._memory[level] = max(self._memory[level], row.peak_memory_bytes)

    def of_cell(self, cell: Cell) -> Cost | None:
        """Return the cell's own costs."""
        row = self._rows.get(cell.key)
        if row is None:
            return None
        source: Source = "measured" if self.source == "here" else self.source
        disk = row.disk_bytes if isinstance(row, RehearsedRow) else None
        return Cost(row.seconds, row.peak_memory_bytes, source, self.device, disk, row.machine)

    def of_method(self, cell: Cell) -> Cost | None:
        """Estimate from cells of the same method, in the same section and scope.

        From a rehearsal only where the model is the same too: else published minutes tell more.
        """
        rehearsed = self.source == "rehearsal"
        estimate = self._estimator.of_model if rehearsed else self._estimator.of_method
        return self._cost(cell, estimate(cell))

    def of_kind(self, cell: Cell) -> Cost | None:
        """Estimate from cells of the same kind too, anywhere."""
        return self._cost(cell, self._estimator.seconds(cell))

    def _cost(self, cell: Cell, seconds: float | None) -> Cost | None:
        if seconds is None:
            return None
        found = (self._memory[level] for level in levels(cell) if level in self._memory)
        machines = "; ".join(self.machines)
        return Cost(seconds, next(found, 0), self.source, self.device, note=machines)


class Costs:
    """Costs of the cells of a grid; see :meth:`of`."""

    def __init__(self, finished: Sequence[_Pair], rows: Rows, cells: Iterable[Cell]) -> None:
        """Gather what is known.

        Args:
            finished: cells with records, and their costs.
            rows: costs from elsewhere, see :func:`other_rows`.
            cells: of the whole grid; rows of others are left out.
        """
        named: dict[tuple[object, ...], Cell] = {}
        if any(found for _, found in rows):
            named = {(*cell.name, cell.seed): cell for cell in cells}
        self._known: dict[Device, list[_Known]] = {"cpu": [], "gpu": []}
        pairs: list[tuple[Source, Sequence[_Pair]]] = [("here", finished)]
        for source, found in rows:
            own = [(named[row.name], row) for row in found if row.name in named]
            if source == "rehearsal":
                own = [(cell, row) for cell, row in own if _as_rehearsed(cell)]
            pairs.append((source, own))
        for device, known in self._known.items():
            for source, all_pairs in pairs:
                mine = [(cell, row) for cell, row in all_pairs if row.device_kind == device]
                known.append(_Known(source, device, mine))

    def of(self, cell: Cell) -> Cost | None:
        """Return what a cell cost, or is going to cost; None if nothing tells.

        Its own record comes first. The next are, in this order: finished cells of its method in
        its section and scope; its row of the reference, or rows alike; its row of the rehearsal,
        or rows of its model and method; published minutes; finished cells that do the same kind
        of work. Costs from the kind of device that the cell is to run on come before all others,
        and a cost says which it is from. Published minutes come without memory: it is then that
        of the next of these.
        """
        devices: tuple[Device, ...] = ("gpu", "cpu")
        if device_kind(cell) == "cpu":
            devices = ("cpu", "gpu")
        own = (self._known[device][0].of_cell(cell) for device in devices)
        estimates = (self._estimates(cell, device) for device in devices)
        known = (cost for cost in itertools.chain(own, *estimates) if cost is not None)
        best = next(known, None)
        if best is None or best.memory is not None:
            return best
        other = next((cost for cost in known if cost.memory is not None), None)
        if other is None:
            return best
        return replace(best, memory=other.memory, disk=other.disk, memory_note=f"{_WORDS[other.source]}, {other.note}")

    def _estimates(self, cell: Cell, device: Device) -> Iterable[Cost | None]:
        here = self._known[device][0]
        for known in self._known[device]:
            yield known.of_cell(cell)
            yield known.of_method(cell)
        if device == "gpu":
            yield published_cost(cell, published_minutes().get(cell.model, ()))
        yield here.of_kind(cell)

    def machines(self, source: Source) -> Mapping[str, int]:
        """Return what the costs of a source were measured on, with the number of cells of each."""
        found: Counter[str] = Counter()
        for known in (*self._known["cpu"], *self._known["gpu"]):
            if known.source == source:
                found += known.machines
        return found


#: Names of sources for people, in the order of trust.
_WORDS: dict[Source, str] = {
    "measured": "measured", "here": "from finished cells", "reference": "from the reference",
    "rehearsal": "rehearsed", "published": "published", "alike": "published, method alike",
}  # fmt: skip


def origins(costs: Iterable[Cost]) -> str:
    """Return the sources of costs for people, with the number of cells of each."""
    counts = Counter(cost.source for cost in costs)
    return "; ".join(f"{counts[name]} {words}" for name, words in _WORDS.items() if counts[name])


def device_kind(cell: Cell) -> Device:
    """Return the kind of device that a cell is to run on; ``auto`` hopes for a GPU."""
    return "cpu" if cell.request.device == "cpu" else "gpu"


def published_cost(cell: Cell, times: Sequence[Minutes]) -> Cost | None:
    """Return published minutes of the cell's method, else of a method that does the same work.

    The same method comes first, then the best evidence, the nearest bits, and the newest study:
    studies are never averaged. Methods do the same work if both reconstruct with the same steps,
    or neither does.

    Args:
        times: published for the cell's model.

    Returns:
        None for full precision, and where no method of ``times`` does the same work.
    """
    recipe = cell.request.recipe
    if recipe is None or not times:
        return None
    usual = registry.defaults(cell.task)
    recipes = {time.method: make_recipe(time.method, usual) for time in times}
    own = {method: method == recipe.method and _released(cell) for method in recipes}

    def order(time: Minutes) -> tuple[object, ...]:
        mlp = recipe.reconstruct_mlp != recipes[time.method].reconstruct_mlp
        images = time.images not in (None, recipe.calibration_images)
        bits = time.distance(recipe.w_bits, recipe.a_bits)
        unlike = not own[time.method], time.method != recipe.method, mlp
        return *unlike, time.evidence, bits, images, time.study

    work = _work(recipe)
    fit = (time for time in times if own[time.method] or work == _work(recipes[time.method]))
    best = min(fit, key=order, default=None)
    if best is None:
        return None
    if own[best.method]:
        return Cost(60 * best.minutes, None, "published", "gpu", note=best.place)
    return Cost(60 * best.minutes, None, "alike", "gpu", note=f"{best.method} on {best.place}")


def _released(cell: Cell) -> bool:
    """Return whether a cell has its method's released settings, as its task has them."""
    recipe = cell.request.recipe
    return recipe is None or not recipe.changes(registry.defaults(cell.task))


def _as_rehearsed(cell: Cell) -> bool:
    """Return whether a rehearsed cell of this name has these settings: released, or a named point."""
    return bool(cell.point) or _released(cell)


def _work(recipe: Recipe) -> tuple[object, ...]:
    """Return what decides how long a recipe takes; of MLPs only where nothing else is done."""
    if recipe.reconstruct:
        return "blocks", recipe.steps, recipe.batch_size
    return ("MLPs", recipe.mlp_steps, recipe.mlp_batch) if recipe.reconstruct_mlp else ("ranges",)
