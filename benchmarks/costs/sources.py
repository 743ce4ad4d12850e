"""Seconds, memory and disk of cells, measured or estimated from the most trusted source.

The sources are, in this order: finished cells here, the committed reference, rehearsals, and
minutes in publications. An estimate uses times of CPUs or times of GPUs, never both.
"""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.console import plain
from benchmarks.costs.estimate import METHOD, MODEL, OWN, Estimator
from benchmarks.grid.cell import Adapter, Cell, CellName, Key, finished
from benchmarks.grid.names import PUBLISHED, load_names
from fimaq_core.errors import FimaqError, first_problem
from fimaq_core.recipe import Recipe, make_recipe
from tasks.common import registry
from tasks.common.record import ResultRecord, own_seconds

Device = Literal["cpu", "gpu"]

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
#: Sources of costs, the most trusted first.
SOURCES = MEASURED, FINISHED, COMMITTED, REHEARSED, TIMED, TIMED_SIMILAR = (
    "measured", "from finished cells", "from the reference", "rehearsed", "published",
    "published, similar method",
)  # fmt: skip
#: Kinds of evidence, the best first; `published/README.md` explains them.
_EVIDENCE = ("primary", "cited", "user-reported", "secondary", "aggregator")


class CostRow(BaseModel):
    """Costs of a cell (seconds of all stages, bytes of memory and disk) on a machine."""

    model_config = ConfigDict(frozen=True)

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
    disk_bytes: int = Field(0, ge=0, exclude=True)

    @property
    def key(self) -> Key:
        """Identity of the cell in its grid."""
        return CellName(*(getattr(self, name) for name in CellName._fields)), self.seed


def cost_row(cell: Cell, record: ResultRecord) -> CostRow:
    """Return the costs of a finished cell."""
    return CostRow(
        **cell.name._asdict(),
        seed=cell.seed,
        seconds=round(own_seconds(record), 3),
        peak_memory_bytes=record.peak_memory_bytes,
        device=record.environment.device,
        threads=record.environment.threads,
    )


def costs_path(profile: str, folder: Path = REFERENCE) -> Path:
    """Return the path of the reference costs of a profile."""
    return folder / f"{profile}.costs.csv"


def costs_text(rows: Iterable[CostRow]) -> str:
    """Return the rows as CSV; the seed of full precision is empty."""
    text = io.StringIO()
    names = [name for name in CostRow.model_fields if name != "disk_bytes"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return text.getvalue()


def read_costs(path: Path) -> list[CostRow]:
    """Read reference costs (CSV) or a rehearsal (JSON); return no rows if there is no file.

    Raises:
        FimaqError: the file cannot be read, or a row is wrong.
    """
    what, fix = "reference costs", "`python -m benchmarks reference` makes them"
    if path.suffix == ".json":
        what, fix = "rehearsal", "delete it, or rehearse again"
    try:
        text = path.read_text(encoding="utf-8")
        found = csv.DictReader(io.StringIO(text, newline=""))
        rows = json.loads(text)["cells"] if path.suffix == ".json" else list(found)
        if any(None in row for row in rows):
            raise ValueError("a line has more fields than the first")
        return [CostRow.model_validate({**row, "seed": row.get("seed") or None}) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else error
        raise FimaqError(f"Cannot read the {what} {path}: {why} ({fix}).") from error


@dataclass(frozen=True)
class Cost:
    """Time, memory and disk of a cell, and their source."""

    seconds: float
    source: str  #: one of :data:`SOURCES`
    device: Device  #: kind of device of the measurement
    origin: str  #: the source, and its machine or publication
    memory: int | None = None  #: peak in bytes
    disk: int | None = None  #: bytes


class Costs:
    """Costs of the cells of a grid.

    Example:
        >>> costs, warnings = gather(cells, adapter, ["paper"], Path("results"))
        >>> cost = costs.of(cells[0])
        >>> cost.seconds, cost.origin
        (2880.0, 'published, an H800 (GLF-Q Table 7)')
    """

    def __init__(self, cells: Iterable[Cell], rows: Iterable[tuple[str, CostRow]]) -> None:
        """Take the cells of a whole grid, and pairs of source and row, most trusted first."""
        self.unreadable: dict[Key, str] = {}  #: cells with unreadable records, and the reasons
        named = {cell.key: cell for cell in cells}
        self._known: dict[tuple[str, str], Estimator] = defaultdict(Estimator)
        for source, row in rows:
            cell = named.get(row.key)
            if cell is None or (source == REHEARSED and not has_known_settings(cell)):
                continue
            # The name of a CPU begins with "cpu".
            estimator = self._known[source, "cpu" if row.device.startswith("cpu") else "gpu"]
            if estimator.estimate(cell, OWN) is None:
                machine = f"{row.device}, {row.threads} thread{'' if row.threads == 1 else 's'}"
                memory, disk = row.peak_memory_bytes, row.disk_bytes
                estimator.add(cell, row.seconds, memory=memory, disk=disk, machine=machine)

    def of(self, cell: Cell) -> Cost | None:
        """Return the cost of a cell; None if no source has one.

        A finished cell has its measured cost. For other cells, the first of these sources counts:

        1. finished cells of the same method, section and scope;
        2. such cells in the committed reference;
        3. a rehearsal of the same model and method;
        4. published minutes on a GPU, with memory and disk from the next source that has them;
        5. finished cells with the same kind of work.

        The kind of device on which the cell will run is tried before the other kind.
        """
        found = [cost for cost in self._costs(cell) if cost is not None]
        if not found:
            return None
        best = found[0]
        other = next((cost for cost in found if cost.memory is not None), best)
        if other is best:
            return best
        origin = f"{best.origin}; memory {other.origin}"
        return replace(best, memory=other.memory, disk=other.disk, origin=origin)

    def _costs(self, cell: Cell) -> Iterator[Cost | None]:
        devices: tuple[Device, ...] = ("cpu", "gpu")
        devices = devices if device_kind(cell) == "cpu" else devices[::-1]
        for device in devices:
            yield self._estimate(cell, device, FINISHED, OWN)
        for device in devices:
            # Published minutes are better than a rehearsal of another model.
            for source, depth in ((FINISHED, METHOD), (COMMITTED, METHOD), (REHEARSED, MODEL)):
                yield self._estimate(cell, device, source, depth)
            if device == "gpu":
                yield published_cost(cell, published_minutes().get(cell.model, ()))
            yield self._estimate(cell, device, FINISHED, None)

    def _estimate(self, cell: Cell, device: Device, source: str, depth: int | None) -> Cost | None:
        found = self._known[source, device].estimate(cell, depth)
        if found is None:
            return None
        seconds, sums = found
        word = MEASURED if depth == OWN else source
        origin = f"{word}, {'; '.join(sums.machines)}"
        return Cost(seconds, word, device, origin, sums.memory, sums.disk or None)


def gather(
    cells: Sequence[Cell], adapter: Adapter, profiles: Iterable[str], results: Path,
    reference: Path = REFERENCE,
) -> tuple[Costs, list[str]]:  # fmt: skip
    """Return the costs of whole grids from all sources, and one warning per unreadable file.

    The warnings include those of ``Costs.unreadable``.

    ``reference`` is the folder with the costs of ``profiles`` and a rehearsal. The user's own
    rehearsal is in ``results``.
    """
    rows: list[tuple[str, CostRow]] = []
    unreadable: dict[Key, str] = {}
    for cell in cells:
        try:
            done = finished(cell, adapter)
        except FimaqError as error:
            unreadable[cell.key] = f"{cell.label}: {plain(str(error))}"
        else:
            rows += [(FINISHED, cost_row(cell, done[0]))] if done is not None else []
    files = [(COMMITTED, costs_path(name, reference)) for name in profiles]
    files += [(REHEARSED, place / "rehearsal.json") for place in (results / "rehearsal", reference)]
    warnings = [f"warning: {message}" for message in unreadable.values()]
    for source, path in files:
        try:
            rows += [(source, row) for row in read_costs(path)]
        except FimaqError as error:
            warnings.append(f"warning: {error}")
    costs = Costs(cells, rows)
    costs.unreadable = unreadable
    return costs, warnings


def device_kind(cell: Cell) -> Device:
    """Return the kind of device on which a cell will run; ``auto`` counts as a GPU."""
    return "cpu" if cell.request.device == "cpu" else "gpu"


def has_known_settings(cell: Cell) -> bool:
    """Return True for the released settings of a method, and for settings of an axis point."""
    return bool(cell.point) or _is_released(cell)


def _is_released(cell: Cell) -> bool:
    recipe = cell.request.recipe
    return recipe is None or not recipe.changes(registry.defaults(cell.task))


class Minutes(NamedTuple):
    """Published minutes of a whole quantization on one GPU; a row of `cost.csv`."""

    method: str  #: id of the method here
    minutes: float
    place: str  #: device and source as text


@cache
def published_minutes(path: Path = PUBLISHED / "cost.csv") -> Mapping[str, Sequence[Minutes]]:
    """Return published run times by the model's id and by ``model.tag``, best evidence first."""
    names = load_names()
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "minutes"]
    found: dict[str, list[Minutes]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _EVIDENCE.index(row["evidence"])):
        model, method = names.models.get(row["model"]), names.methods.get(row["method"])
        if model is not None and method is not None:
            source = re.sub(r" paper full text \([^)]*\)", "", row["source"])
            place = f"an {names.studies.get(row['study'], 'unstated GPU')} ({source})"
            own = method.comparable.get(row["variant"], method.id)
            for name in (model.id, model.tag):
                found[name].append(Minutes(own, float(row["value"]), place))
    return found


def published_cost(cell: Cell, times: Sequence[Minutes]) -> Cost | None:
    """Return the published minutes of a cell's method, or of another method with the same work.

    ``times`` are those of the cell's model. None for full precision, and if no time fits.
    """
    recipe = cell.request.recipe
    if recipe is None:
        return None
    usual, released = registry.defaults(cell.task), _is_released(cell)
    fitting = [
        time
        for time in times
        if (released and time.method == recipe.method)
        or _work(make_recipe(time.method, usual)) == _work(recipe)
    ]
    best = min(fitting, key=lambda time: time.method != recipe.method, default=None)
    if best is None:
        return None
    if released and best.method == recipe.method:
        return Cost(60 * best.minutes, TIMED, "gpu", f"{TIMED}, {best.place}")
    origin = f"{TIMED} for {best.method}, {best.place}"
    return Cost(60 * best.minutes, TIMED_SIMILAR, "gpu", origin)


def _work(recipe: Recipe) -> tuple[object, ...]:
    """Return the settings that determine the run time of a recipe."""
    if recipe.reconstruct:
        return "blocks", recipe.steps, recipe.batch_size
    return ("MLPs", recipe.mlp_steps, recipe.mlp_batch) if recipe.reconstruct_mlp else ("ranges",)
