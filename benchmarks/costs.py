"""Seconds, memory and disk of cells: measured, or estimated from the best source there is.

Sources in their order: finished cells here, the committed reference, a rehearsal, published
minutes. Times of CPUs and of GPUs are never mixed.
"""

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.cells import Cell, Key
from benchmarks.estimate import METHOD, MODEL, Estimator
from benchmarks.names import PUBLISHED, StudyName, load_names
from benchmarks.units import duration
from fimaq_core.documents import problems
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import Recipe, make_recipe
from tasks.common import registry
from tasks.common.record import ResultRecord, own_seconds
from tasks.common.strict import Strict

Device = Literal["cpu", "gpu"]
Source = Literal["measured", "here", "reference", "rehearsal", "published", "alike"]

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"
#: Sources for people, in the order of trust.
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


class CostRow(Strict):
    """Costs of a cell: seconds of all its stages, bytes of memory, and what they were measured on."""

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
    """Costs of a cell estimated from a rehearsal of it, with the bytes of disk it will take."""

    model_config = ConfigDict(extra="ignore")

    disk_bytes: int = Field(ge=0)


class _Rehearsal(BaseModel):
    cells: list[RehearsedRow]


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
    writer = csv.DictWriter(text, list(CostRow.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return text.getvalue()


def read_costs(path: Path) -> list[CostRow]:
    """Read a file that :func:`costs_text` made; nothing where there is none.

    Raises:
        FimaqError: it cannot be read, or a row does not fit.
    """

    def parse(content: bytes) -> list[CostRow]:
        rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
        return [CostRow.model_validate({**row, "seed": row.get("seed") or None}) for row in rows]

    return _read(path, "reference costs", "`python -m benchmarks reference` makes them", parse)


def read_rehearsal(path: Path) -> list[RehearsedRow]:
    """Read the estimates of a rehearsal; nothing where there is none. Raises as above."""
    fix = "delete it or rehearse anew"
    return _read(path, "rehearsal", fix, lambda text: _Rehearsal.model_validate_json(text).cells)


def _read(path: Path, what: str, fix: str, parse: Callable[[bytes], list[Any]]) -> list[Any]:
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValidationError as error:
        why = problems(error, CostRow).partition(". ")[0].rstrip(".")
        raise FimaqError(f"Cannot read the {what} {path}: {why} ({fix}).") from error
    except (OSError, UnicodeDecodeError, csv.Error, TypeError) as error:
        raise FimaqError(f"Cannot read the {what} {path}: {error} ({fix}).") from error


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
    """Costs from one source on one kind of device."""

    def __init__(self, source: Source, device: Device, pairs: Iterable[_Pair]) -> None:
        self.source, self.device = source, device
        self._rows: dict[Key, CostRow] = {}
        self._estimator = Estimator()
        for cell, row in pairs:
            if row.device_kind == device and cell.key not in self._rows:
                self._rows[cell.key] = row
                self._estimator.add(cell, row.seconds, row.peak_memory_bytes)
        self.machines = Counter(row.machine for row in self._rows.values())

    def own(self, cell: Cell) -> Cost | None:
        """Return the cell's own costs."""
        row = self._rows.get(cell.key)
        if row is None:
            return None
        source: Source = "measured" if self.source == "here" else self.source
        disk = row.disk_bytes if isinstance(row, RehearsedRow) else None
        return Cost(row.seconds, row.peak_memory_bytes, source, self.device, disk, row.machine)

    def alike(self, cell: Cell, depth: int | None = None) -> Cost | None:
        """Return an estimate from cells alike, see :meth:`Estimator.estimate`."""
        found = self._estimator.estimate(cell, depth)
        if found is None:
            return None
        return Cost(*found, self.source, self.device, note="; ".join(self.machines))


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
        pairs: list[tuple[Source, Sequence[_Pair]]] = [("here", finished)]
        for source, found in rows:
            own = [(named[row.name], row) for row in found if row.name in named]
            if source == "rehearsal":
                own = [(cell, row) for cell, row in own if has_known_settings(cell)]
            pairs.append((source, own))
        self._known: dict[Device, list[_Known]] = {"cpu": [], "gpu": []}
        for device, known in self._known.items():
            known += [_Known(source, device, own) for source, own in pairs]

    def of(self, cell: Cell) -> Cost | None:
        """Return what a cell cost, or is going to cost; None if nothing tells.

        Its own record comes first. The next are, in this order: finished cells of its method in
        its section and scope; its row of the reference, or rows alike; its row of the rehearsal,
        or rows of its model and method; published minutes; finished cells that do the same kind
        of work. Costs from the kind of device that the cell is to run on come before all others,
        and a cost says which it is from. Published minutes come without memory: it is then that
        of the next of these.
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
        here = {device: self._known[device][0] for device in devices}
        found: list[Cost | None] = [here[device].own(cell) for device in devices]
        for device in devices:
            for known in self._known[device]:
                # A rehearsal of another model tells less than published minutes.
                depth = MODEL if known.source == "rehearsal" else METHOD
                found += [known.own(cell), known.alike(cell, depth)]
            if device == "gpu":
                found.append(published_cost(cell, published_minutes().get(cell.model, ())))
            found.append(here[device].alike(cell))
        return filter(None, found)

    def machines(self, source: Source) -> Mapping[str, int]:
        """Return what the costs of a source were measured on, with the number of cells of each."""
        every = (known for each in self._known.values() for known in each)
        return sum((one.machines for one in every if one.source == source), Counter())


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


@dataclass(frozen=True)
class Minutes:
    """Published minutes of a whole quantization on one GPU, a row of ``cost.csv``.

    Attributes:
        method: the method's id here.
        bits: of weights and activations; None where the source does not state them.
        images: calibration images, where the study is one of their number.
        place: the device and the source, for people.
        evidence, study: ranks; the smallest is taken first.
    """

    method: str
    minutes: float
    bits: tuple[int, int] | None
    images: int | None
    place: str
    evidence: int
    study: int


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
            bits=(int(row["w_bit"]), int(row["a_bit"])) if row["w_bit"] and row["a_bit"] else None,
            images=study.images,
            place=f"an {study.device} ({source})",
            evidence=_EVIDENCE.index(row["evidence"]),
            study=-studies.index(row["study"]),  # the newest is listed last
        )
        found[model.id].append(time)
        found[model.tag].append(time)
    return found


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
    usual, released = registry.defaults(cell.task), _is_released(cell)
    recipes = {time.method: make_recipe(time.method, usual) for time in times}

    def order(time: Minutes) -> tuple[object, ...]:
        same = time.method == recipe.method
        mlp = recipe.reconstruct_mlp != recipes[time.method].reconstruct_mlp
        w_bits, a_bits = time.bits or (99, 99)  # unstated bits are the farthest
        bits = abs(w_bits - recipe.w_bits) + abs(a_bits - recipe.a_bits)
        images = time.images not in (None, recipe.calibration_images)
        return not (same and released), not same, mlp, time.evidence, bits, images, time.study

    def fits(time: Minutes) -> bool:
        own = released and time.method == recipe.method
        return own or _work(recipe) == _work(recipes[time.method])

    best = min(filter(fits, times), key=order, default=None)
    if best is None:
        return None
    if released and best.method == recipe.method:
        return Cost(60 * best.minutes, None, "published", "gpu", note=best.place)
    return Cost(60 * best.minutes, None, "alike", "gpu", note=f"{best.method} on {best.place}")


def _work(recipe: Recipe) -> tuple[object, ...]:
    """Return what decides how long a recipe takes; of MLPs only where nothing else is done."""
    if recipe.reconstruct:
        return "blocks", recipe.steps, recipe.batch_size
    return ("MLPs", recipe.mlp_steps, recipe.mlp_batch) if recipe.reconstruct_mlp else ("ranges",)
