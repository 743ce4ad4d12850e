"""What cells cost: of finished ones what their records say, of others an estimate from those or from a committed reference."""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.cells import Cell, Key
from benchmarks.estimate import Estimator, levels
from fimaq_core.errors import FimaqError
from tasks.common.record import ResultRecord, own_seconds

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"

_DAMAGED = "The reference costs {} are damaged (`python -m benchmarks reference` makes them)"


class CostRow(BaseModel):
    """A cell's costs: seconds of all its stages, the peak of its memory in bytes, and what it was measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


@dataclass(frozen=True)
class Cost:
    """What a cell takes: ``seconds`` and ``memory`` (bytes, its peak), and from what that is known.

    Attributes:
        source: ``measured``: by itself; ``here``: from finished cells alike; ``reference``: from the committed reference.
    """

    seconds: float
    memory: int
    source: str


class _Known:
    """Costs of one origin, by cell and for cells alike."""

    def __init__(self, rows: Iterable[tuple[Cell, CostRow]]) -> None:
        self.rows: dict[Key, CostRow] = {}
        self.machines: Counter[str] = Counter()
        self._estimator = Estimator()
        self._memory: dict[tuple[str, ...], int] = defaultdict(int)
        for cell, row in rows:
            if cell.key in self.rows:
                continue
            self.rows[cell.key] = row
            self.machines[row.machine] += 1
            self._estimator.add(cell, row.seconds)
            for level in levels(cell):
                self._memory[level] = max(self._memory[level], row.peak_memory_bytes)

    def of_method(self, cell: Cell) -> tuple[float, int] | None:
        """Seconds and memory from cells of the same method, in the same section and scope."""
        seconds = self._estimator.of_method(cell)
        return None if seconds is None else (seconds, self._most(cell))

    def of_kind(self, cell: Cell) -> tuple[float, int] | None:
        """The same from cells of the same kind too, anywhere."""
        seconds = self._estimator.seconds(cell)
        return None if seconds is None else (seconds, self._most(cell))

    def _most(self, cell: Cell) -> int:
        return next((self._memory[level] for level in levels(cell) if level in self._memory), 0)


class Costs:
    """Costs of the cells of a grid; see :meth:`of`."""

    def __init__(self, finished: Sequence[tuple[Cell, CostRow]], reference: Sequence[CostRow], cells: Iterable[Cell]) -> None:
        """Gather what is known.

        Args:
            finished: cells with records, and their costs.
            reference: rows of the committed reference.
            cells: of the whole grid; rows of others are left out.
        """
        rows = {(r.section, r.model, r.scope, r.method, r.bits, r.seed, r.point): r for r in reference}
        named = ((cell, rows.get(_name(cell))) for cell in cells) if rows else ()
        self._here = _Known(finished)
        self._reference = _Known((cell, row) for cell, row in named if row is not None)

    def of(self, cell: Cell) -> Cost | None:
        """Return what a cell cost, or is going to; None if nothing of the kind is known.

        In this order: its own record; finished cells of its method in its section and scope; its row of the reference, or rows
        alike; finished cells that do the same kind of thing.
        """
        own = self._here.rows.get(cell.key)
        if own is not None:
            return Cost(own.seconds, own.peak_memory_bytes, "measured")
        found = self._here.of_method(cell)
        if found is not None:
            return Cost(*found, "here")
        row = self._reference.rows.get(cell.key)
        if row is not None:
            return Cost(row.seconds, row.peak_memory_bytes, "reference")
        found = self._reference.of_method(cell)
        if found is not None:
            return Cost(*found, "reference")
        found = self._here.of_kind(cell)
        return None if found is None else Cost(*found, "here")

    def machines(self, source: str) -> Mapping[str, int]:
        """What the costs of a source (``here``, ``reference``) were measured on, with the cells of each."""
        return (self._here if source == "here" else self._reference).machines


def _name(cell: Cell) -> tuple[object, ...]:
    return (cell.section, cell.model, cell.scope, cell.method, cell.bits, cell.seed, cell.point)
