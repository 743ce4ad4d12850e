"""Seconds, memory and disk of cells: measured, or estimated from the best source there is.

Sources in their order: finished cells here, the committed reference, a rehearsal, published
minutes. Times of CPUs and of GPUs are never mixed.
"""

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.console import duration
from benchmarks.costs.estimate import METHOD, MODEL, OWN, Estimator, Group
from benchmarks.grid.cell import Cell
from benchmarks.grid.names import PUBLISHED, StudyName, load_names
from fimaq_core.errors import FimaqError, first_problem
from fimaq_core.recipe import Recipe, make_recipe
from tasks.common import registry
from tasks.common.record import ResultRecord, own_seconds

Device = Literal["cpu", "gpu"]
Source = Literal["measured", "here", "reference", "rehearsal", "published", "alike"]

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
#: Sources for people, in the order of trust. ``here``: finished cells alike; ``published``:
#: minutes of the cell's method on its model; ``alike``: of a method that does the same work.
_WORDS: dict[Source, str] = {
    "measured": "measured",
    "here": "from finished cells",
    "reference": "from the reference",
    "rehearsal": "rehearsed",
    "published": "published",
    "alike": "published, method alike",
}
#: Kinds of evidence, the best first; see the README beside ``cost.csv``.
_EVIDENCE = ("primary", "cited", "user-reported", "secondary", "aggregator")


class CostRow(BaseModel):
    """Costs of a cell: seconds of all stages, bytes of memory and disk, and the machine."""

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
    disk_bytes: int | None = Field(None, ge=0, exclude=True)

    @property
    def machine(self) -> str:
        """The device it was measured on, for people."""
        return f"{self.device}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    @property
    def device_kind(self) -> Device:
        """Kind of the device: the name of a CPU begins with ``cpu``."""
        return "cpu" if self.device.startswith("cpu") else "gpu"

    @property
    def name(self) -> tuple[object, ...]:
        """Fields that tell the cells of a grid apart."""
        return self.section, self.model, self.scope, self.method, self.bits, self.point, self.seed


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
    """The file with the reference costs of a profile, by its grid's name."""
    return folder / f"{profile}.costs.csv"


def costs_text(rows: Iterable[CostRow]) -> str:
    """Return the rows as CSV; no seed for full precision."""
    text = io.StringIO()
    names = [name for name in CostRow.model_fields if name != "disk_bytes"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return text.getvalue()


def read_costs(path: Path) -> list[CostRow]:
    """Read a file that :func:`costs_text` or a rehearsal made; nothing where there is none.

    Raises:
        FimaqError: it cannot be read, or a row does not fit.
    """
    what, fix = "reference costs", "`python -m benchmarks reference` makes them"
    if path.suffix == ".json":
        what, fix = "rehearsal", "delete it or rehearse anew"
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


Rows = Sequence[tuple[Source, Sequence[CostRow]]]


def other_rows(grids: Iterable[str], results: Path, folder: Path) -> tuple[Rows, list[str]]:
    """Return the costs that are not from finished cells here, the most trusted first, and warnings.

    Rehearsals are below ``results``, and committed in ``folder`` beside the references.
    """
    files: list[tuple[Source, Path]] = [("reference", costs_path(grid, folder)) for grid in grids]
    files += [("rehearsal", results / "rehearsal" / "rehearsal.json")]
    files += [("rehearsal", folder / "rehearsal.json")]
    rows: list[tuple[Source, Sequence[CostRow]]] = []
    notes = []
    for source, path in files:
        try:
            rows.append((source, read_costs(path)))
        except FimaqError as error:
            notes.append(f"warning: {error}")
    return rows, notes


@dataclass(frozen=True)
class Cost:
    """Time, memory and disk of a cell, and where they are known from."""

    seconds: float
    memory: int | None  #: peak in bytes
    source: Source
    device: Device  #: kind of the device it was measured on
    disk: int | None = None
    note: str = ""  #: the machine, for people; of published minutes with their source
    memory_note: str = ""  #: the same of memory and disk, where these are from elsewhere

    @property
    def origin(self) -> str:
        """Where it is known from, for people."""
        words = _WORDS[self.source]
        if self.source in ("published", "alike"):
            between = "on" if self.source == "published" else "of"
            return f"{words}: {duration(self.seconds)} {between} {self.note}"
        return f"{words}, {self.note}"


class Costs:
    """Costs of the cells of a grid; see :meth:`of`."""

    def __init__(
        self, finished: Iterable[tuple[Cell, CostRow]], rows: Rows, cells: Iterable[Cell]
    ) -> None:
        """Gather costs of finished cells, and :func:`other_rows` of ``cells``, the whole grid."""
        named = {(*cell.name, cell.seed): cell for cell in cells} if any(r for _, r in rows) else {}
        self._known: dict[Device, list[tuple[Source, Estimator]]] = {"cpu": [], "gpu": []}
        self._add("here", finished)
        for source, found in rows:
            own = [(named[row.name], row) for row in found if row.name in named]
            if source == "rehearsal":
                own = [(cell, row) for cell, row in own if has_known_settings(cell)]
            self._add(source, own)

    def _add(self, source: Source, pairs: Iterable[tuple[Cell, CostRow]]) -> None:
        for known in self._known.values():
            known.append((source, Estimator()))
        for cell, row in pairs:
            _, estimator = self._known[row.device_kind][-1]
            if estimator.estimate(cell, OWN) is None:
                memory, disk = row.peak_memory_bytes, row.disk_bytes
                estimator.add(cell, row.seconds, memory, disk, row.machine)

    def of(self, cell: Cell) -> Cost | None:
        """Return what a cell cost, or is going to cost; None if nothing tells.

        Its own record comes first. The next are, in this order: finished cells of its method in
        its section and scope; its row of the reference, or rows alike; its row of the rehearsal,
        or rows of its model and method; published minutes; finished cells that do the same kind
        of work. Costs from the kind of device that the cell is to run on come before all others.
        Published minutes come without memory: it is then that of the next of these.
        """
        known = self._costs(cell)
        best = next(known, None)
        if best is None or best.memory is not None:
            return best
        other = next((cost for cost in known if cost.memory is not None), None)
        if other is None:
            return best
        note = f"{_WORDS[other.source]}, {other.note}"
        return replace(best, memory=other.memory, disk=other.disk, memory_note=note)

    def _costs(self, cell: Cell) -> Iterator[Cost]:
        devices: tuple[Device, ...] = ("cpu", "gpu")
        if device_kind(cell) == "gpu":
            devices = ("gpu", "cpu")
        for device in devices:
            yield from _cost("measured", device, self._known[device][0][1].estimate(cell, OWN))
        for device in devices:
            for source, estimator in self._known[device]:
                # A rehearsal of another model tells less than published minutes.
                depth = MODEL if source == "rehearsal" else METHOD
                yield from _cost(source, device, estimator.estimate(cell, depth))
            if device == "gpu":
                found = published_cost(cell, published_minutes().get(cell.model, ()))
                yield from () if found is None else (found,)
            yield from _cost("here", device, self._known[device][0][1].estimate(cell))

    def machines(self, source: Source) -> Mapping[str, int]:
        """Return what the costs of a source were measured on, with the number of cells of each."""
        every = (pair for each in self._known.values() for pair in each)
        return sum((estimator.machines for name, estimator in every if name == source), Counter())


def _cost(source: Source, device: Device, found: tuple[float, Group] | None) -> Iterator[Cost]:
    if found is not None:
        seconds, group = found
        note = "; ".join(group.machines)
        yield Cost(seconds, group.memory, source, device, group.disk, note)


def origins(costs: Iterable[Cost]) -> str:
    """Return the sources of costs for people, with the number of cells of each."""
    counts = Counter(cost.source for cost in costs)
    return "; ".join(f"{counts[name]} {words}" for name, words in _WORDS.items() if counts[name])


def device_kind(cell: Cell) -> Device:
    """Return the kind of device that a cell is to run on; ``auto`` hopes for a GPU."""
    return "cpu" if cell.request.device == "cpu" else "gpu"


def has_known_settings(cell: Cell) -> bool:
    """Return whether a cell has its method's released settings, or those of a named point."""
    return bool(cell.point) or _is_released(cell)


def _is_released(cell: Cell) -> bool:
    recipe = cell.request.recipe
    return recipe is None or not recipe.changes(registry.defaults(cell.task))


class Minutes(NamedTuple):
    """Published minutes of a whole quantization on one GPU, a row of ``cost.csv``."""

    method: str  #: the method's id here
    minutes: float
    bits: tuple[int, int]  #: far from all others where the source does not state them
    images: int | None  #: calibration images, where the study is one of their number
    place: str  #: the device and the source, for people
    rank: int  #: of the evidence, the best first
    study: int  #: the newest first


@cache
def published_minutes(path: Path = PUBLISHED / "cost.csv") -> Mapping[str, Sequence[Minutes]]:
    """Return the run times of a file by the model's id and by its ``model.tag``, in file order."""
    names = load_names()
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "minutes"]
    studies = list(dict.fromkeys(row["study"] for row in rows))
    found: dict[str, list[Minutes]] = defaultdict(list)
    for row in rows:
        model, method = names.models.get(row["model"]), names.methods.get(row["method"])
        if model is None or method is None:
            continue
        study = names.studies.get(row["study"], StudyName())
        source = re.sub(r" paper full text \([^)]*\)", "", row["source"])
        time = Minutes(
            method=method.comparable.get(row["variant"], method.id),
            minutes=float(row["value"]),
            bits=(int(row["w_bit"] or 99), int(row["a_bit"] or 99)),
            images=study.images,
            place=f"an {study.device} ({source})",
            rank=_EVIDENCE.index(row["evidence"]),
            study=-studies.index(row["study"]),  # the newest is listed last
        )
        found[model.id].append(time)
        found[model.tag].append(time)
    return found


def published_cost(cell: Cell, times: Sequence[Minutes]) -> Cost | None:
    """Return published minutes of the cell's method, else of a method that does the same work.

    The same method comes first, then the best evidence, the nearest bits, and the newest study:
    studies are never averaged. Methods do the same work if both reconstruct with the same steps,
    or neither does. None for full precision, and where none of the model's ``times`` fits.
    """
    recipe = cell.request.recipe
    if recipe is None:
        return None
    usual, released = registry.defaults(cell.task), _is_released(cell)
    ranked = []
    for time in times:
        other, same = make_recipe(time.method, usual), time.method == recipe.method
        if (same and released) or _work(other) == _work(recipe):
            mlp = other.reconstruct_mlp != recipe.reconstruct_mlp
            bits = abs(time.bits[0] - recipe.w_bits) + abs(time.bits[1] - recipe.a_bits)
            images = time.images not in (None, recipe.calibration_images)
            unlike = (not (same and released), not same, mlp)
            ranked.append(((*unlike, time.rank, bits, images, time.study), time))
    if not ranked:
        return None
    best = min(ranked, key=lambda pair: pair[0])[1]
    if released and best.method == recipe.method:
        return Cost(60 * best.minutes, None, "published", "gpu", note=best.place)
    return Cost(60 * best.minutes, None, "alike", "gpu", note=f"{best.method} on {best.place}")


def _work(recipe: Recipe) -> tuple[object, ...]:
    """Return what decides how long a recipe takes; of MLPs only where nothing else is done."""
    if recipe.reconstruct:
        return "blocks", recipe.steps, recipe.batch_size
    return ("MLPs", recipe.mlp_steps, recipe.mlp_batch) if recipe.reconstruct_mlp else ("ranges",)
