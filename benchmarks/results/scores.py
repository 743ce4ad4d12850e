"""Scores: one table with a row per cell and metric, and its statistics over seeds."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.console import csv_cell
from benchmarks.grid.cell import MAIN_METRIC, Adapter, Cell, Key, finished
from fimaq_core.errors import FimaqError
from fimaq_core.files import cause_of, replaced_whole
from fimaq_core.recipe import METHODS, OFF
from fimaq_core.terminal import one_line, printable
from tasks.common.fidelity import UNITS
from tasks.common.record import ResultRecord, bits_name, is_percent, read_record

#: Columns of the CSV files in ``results/tables``.
COLUMNS = [
    "task", "dataset", "model", "method", "variant", "w_bit", "a_bit", "seed", "metric", "value",
    "stderr", "n", "fp_value",
]  # fmt: skip
#: Columns of exports: 10⁶ bytes of the file; percentage of the multiply-adds with two quantized
#: operands that run in integers; time of the float32 export divided by the time of this file.
EXPORT_COLUMNS = ["size_mb", "integer_coverage", "speed"]
#: Columns that are equal for cells that differ in their seed only.
CELL = ["task", "dataset", "model", "method", "variant", "bits", "metric"]
#: Pairs of metrics that share the cells of one small table, by the title of this table.
METRIC_PAIRS = {
    "Image to text / text to image R@1": ("i2t_R@1", "t2i_R@1"),
    "Box / mask AP": ("AP_box", "AP_mask"),
}
#: Methods that stop after calibration or after a closed-form refit.
CALIBRATION_ONLY = ("rtn", "repq", "ptq4vit", "adalog", "erq")
#: Methods that optimise blocks.
RECONSTRUCTION = ("brecq", "qdrop", "pdquant", "aphq", "fimaq", "lsvit", "adalog-recon")
#: Name of the bits of full precision.
FULL = bits_name(OFF, OFF)


@dataclass(frozen=True, eq=False)
class Measured:
    """A finished cell with its record."""

    cell: Cell
    record: ResultRecord
    folder: Path | None = None  #: folder of the record; None if the record is not on disk


class Damaged(NamedTuple):
    """A cell with a record that cannot be read."""

    cell: Cell
    message: str  #: reason and remedy in one line

    @property
    def line(self) -> str:
        """Line below tables and on stderr."""
        return f"Not shown: {self.cell.label}, whose record cannot be used. {self.message}"


class Collected(NamedTuple):
    """Cells with records, in order."""

    measured: list[Measured]
    damaged: list[Damaged]

    def only(self, cells: Iterable[Cell]) -> "Collected":
        """Return the part that belongs to ``cells``."""
        keys = {cell.key for cell in cells}
        measured, damaged = ([it for it in own if it.cell.key in keys] for own in self)
        return Collected(measured, damaged)


Items = Sequence[Measured]
Cells = Sequence[Cell]


def collect(cells: Iterable[Cell], adapter: Adapter) -> Collected:
    """Return the cells that have a record, each once. Cells without a record are left out."""
    distinct: dict[Key, Cell] = {}
    for cell in cells:
        distinct.setdefault(cell.key, cell)
    found, share = Collected([], []), Shared()
    for cell in distinct.values():
        try:
            done = finished(cell, adapter)
        except FimaqError as error:
            found.damaged.append(Damaged(cell, one_line(str(error))))
        else:
            if done is not None:
                record, folder = done
                found.measured.append(Measured(cell, share(record), folder))
    return found


class Shared:
    """Keeps equal parts of records only once: calibration, module map and data set.

    Thousands of records of a grid would fill the memory otherwise.
    """

    def __init__(self) -> None:
        self._parts: dict[str, object] = {}

    def __call__(self, record: ResultRecord) -> ResultRecord:
        """Return an equal record that shares its parts with earlier ones."""
        parts = {}
        for name in ("calibration", "modules", "dataset", "environment"):
            part = getattr(record, name)
            if part is not None:
                parts[name] = self._parts.setdefault(part.model_dump_json(), part)
        return record.model_copy(update=parts)


def read_records(root: Path) -> tuple[list[tuple[Path, ResultRecord]], list[str]]:
    """Return all records under ``root`` with their files, and a message for each unreadable one."""
    paths, problems = record_files(root)
    records, share = [], Shared()
    for path in paths:
        try:
            records.append((path, share(read_record(path))))
        except FimaqError as error:
            problems.append(one_line(str(error)))
    return records, problems


def record_files(root: Path) -> tuple[list[Path], list[str]]:
    """Return the record files below ``root``, and a message for each folder that cannot be read.

    Links are followed, and each folder is searched once.
    """
    paths: list[Path] = []
    problems: list[str] = []
    seen: set[str] = set()

    def refused(error: OSError) -> None:
        place = Path(error.filename)
        problems.append(one_line(f"Cannot read {place}: {cause_of(error, place)}."))

    if not os.path.lexists(root):
        return [], []
    for folder, folders, files in os.walk(root, onerror=refused, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in (*folders, *files):
            path = Path(folder, name)
            if name == "result.json":
                paths.append(path)
            elif path.is_symlink() and not path.exists():
                problems.append(one_line(f"Cannot read {path}: it is a link to nothing."))
    return sorted(paths), problems


def by_section(measured: Items, cells: Cells) -> Iterator[tuple[str, list[Measured], list[Cell]]]:
    """Yield each section of ``cells`` with its finished cells and with all its cells."""
    for section in unique(cell.section for cell in cells):
        mine = [item for item in measured if item.cell.section == section]
        yield section, mine, [cell for cell in cells if cell.section == section]


def seeds_of(measured: Iterable[Measured]) -> list[int]:
    """Return the distinct seeds in ascending order."""
    return sorted({item.record.seed for item in measured if item.record.seed is not None})


def scope_of(record: ResultRecord) -> str:
    """Return the scope in a record; empty for full precision and for older records."""
    return str((record.recipe or {}).get("scope") or "")


def scores(measured: Iterable[Measured], fidelity: bool = False) -> pd.DataFrame:
    """Return the table of scores of finished cells, with figures of ``fidelity`` if True.

    Returns:
        The columns of :func:`record_scores`, and the ``model``, ``subject``, ``mark``, ``point``
        and ``row`` of each :class:`~benchmarks.grid.cell.Cell`.
    """
    items = list(measured)
    table = record_scores((item.record for item in items), fidelity)
    cells = [items[place].cell for place in table["item"]]
    names = ("model", "subject", "mark", "point", "row")
    return table.assign(**{name: [getattr(cell, name) for cell in cells] for name in names})


def record_scores(records: Iterable[ResultRecord], fidelity: bool = False) -> pd.DataFrame:
    """Return one row per record and metric, and per figure of ``fidelity`` if True.

    Returns:
        :data:`COLUMNS`; :data:`EXPORT_COLUMNS`, empty where a record is not of an export; ``bits``
        as a name; ``item``, the index of the record in ``records``.
        ``value``, ``stderr`` (standard error over samples) and ``fp_value`` (full precision) are
        in percent, except for median ranks.
    """
    rows = []
    for item, record in enumerate(records):
        shared = (
            record.task, record.dataset.name, record.model, record.method, record.variant,
            record.w_bit, record.a_bit, record.seed,
        )  # fmt: skip
        figures = _export_figures(record)
        for name, figure in record.fidelity.items() if fidelity else ():
            score = (name, figure.value, figure.stderr, record.n, None)
            rows.append((*shared, *score, *figures, item))
        for name, metric in record.metrics.items():
            full = metric if record.method == "fp" else record.fp_metrics.get(name)
            score = (name, metric.value, metric.stderr, record.n, full and full.value)
            rows.append((*shared, *score, *figures, item))
    table = pd.DataFrame(rows, columns=[*COLUMNS, *EXPORT_COLUMNS, "item"])
    numbers = dict.fromkeys(("value", "stderr", "fp_value", *EXPORT_COLUMNS), float)
    largest = max((seed for seed in table["seed"] if seed is not None), default=0)
    seeds = "Int64" if largest < 2**63 else "UInt64"
    return with_bits(table.astype({"seed": seeds, **numbers}))


def _export_figures(record: ResultRecord) -> tuple[float | None, float | None, float | None]:
    """Return the values of :data:`EXPORT_COLUMNS`."""
    own = record.exported
    if own is None:
        return None, None, None
    covered = 100 * own.integer_macs / own.quantized_macs if own.quantized_macs else None
    return own.bytes / 1e6, covered, own.speed


def csv_columns(table: pd.DataFrame) -> list[str]:
    """Return :data:`COLUMNS`, and :data:`EXPORT_COLUMNS` if the table has exports."""
    return COLUMNS + (EXPORT_COLUMNS if table["size_mb"].notna().any() else [])


def with_bits(table: pd.DataFrame) -> pd.DataFrame:
    """Return a copy with the column ``bits``: ``fp``, ``w3a3`` and so on."""
    pairs = zip(table["w_bit"], table["a_bit"], strict=True)
    return table.assign(bits=[bits_name(int(w), int(a)) for w, a in pairs])


def over_seeds(table: pd.DataFrame, by: Sequence[str] = CELL) -> pd.DataFrame:
    """Return one row per group of scores that are equal in the columns ``by``.

    Returns:
        ``by``; ``mean``; ``sd``, the standard deviation over seeds (NaN for one seed); ``seeds``,
        their number; ``sampling``, the standard error from the finite number of samples, which all
        seeds share; ``se``, the standard error of the mean from both causes.
    """
    groups = table.assign(square=table["stderr"] ** 2).groupby(list(by), sort=False, dropna=False)
    found = groups.agg(
        mean=("value", "mean"),
        sd=("value", "std"),
        seeds=("value", "count"),
        sampling=("square", "mean"),
    ).reset_index()
    sampling, spread = found["sampling"] ** 0.5, found["sd"] / found["seeds"] ** 0.5
    return found.assign(sampling=sampling, se=np.hypot(sampling, spread.fillna(0.0)))


def differences(scores: pd.DataFrame, base: pd.DataFrame) -> "pd.Series[float]":
    """Return ``scores`` minus ``base`` for each model and seed that both have."""
    both = scores.merge(base, on=["model", "seed"], suffixes=("", "_base"))
    return both["value"] - both["value_base"]


def difference_text(differences: "pd.Series[float]", metric: str = "") -> str:
    """Return the mean with its standard error, ``+0.50 ± 0.10``; no error for one difference."""
    form = ".3g" if metric in UNITS else ".2f"
    error = f" ± {differences.sem():{form}}" if len(differences) > 1 else ""
    return f"{differences.mean():+{form}}{error}"


def value_text(mean: float, sd: float, metric: str = "") -> str:
    """Return ``88.20 ± 0.40``, or three digits if ``metric`` has :data:`UNITS`; NaN: no ``sd``."""
    form, error = (".3g", ".2g") if metric in UNITS else (".2f", ".2f")
    return f"{mean:{form}}" if pd.isna(sd) else f"{mean:{form}} ± {sd:{error}}"


def main_metric(task: str, table: pd.DataFrame, asked: str | None = None) -> str:
    """Return the metric that the main table of a task shows: that ``asked`` for if it is there."""
    present = unique(table["metric"])
    wanted = asked if asked in present else MAIN_METRIC.get(task)
    return wanted if wanted in present else present[0]


def metric_title(metric: str) -> str:
    """Return a metric's name with its unit."""
    unit = UNITS.get(metric, "percent" if is_percent(metric) else "")
    return f"{metric} ({unit})" if unit else metric


def sample_counts(count: int, captions: int | None) -> str:
    """Return ``2000 samples``, or ``1000 images, 5000 captions``."""
    return f"{count} samples" if captions is None else f"{count} images, {captions} captions"


def count(number: int, noun: str) -> str:
    """Return ``1 model``, ``2 models``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def unique(values: Iterable[str]) -> list[str]:
    """Return the distinct values in order of first appearance."""
    return list(dict.fromkeys(values))


def in_order(methods: Iterable[str]) -> list[str]:
    """Return the distinct methods in the order of tables: full precision, then the registry's."""
    known = ["fp", *METHODS]
    places = {name: place for place, name in enumerate(known)}
    return sorted(unique(methods), key=lambda name: places.get(name, len(known)))


def rows_of(cells: Iterable[Cell]) -> list[str]:
    """Return the row names of a table: methods in order, each followed by its points."""
    names = {cell.row: cell.method for cell in cells}
    methods = in_order(names.values())
    return sorted(names, key=lambda name: (methods.index(names[name]), name != names[name]))


class Column(NamedTuple):
    """Column of a table: a subject, its model, and the bits."""

    subject: str
    model: str
    bits: str


def columns_of(cells: Cells) -> list[Column]:
    """Return the columns of tables: model by model its subjects, each at all its bits."""
    columns = []
    for model in unique(cell.model for cell in cells):
        mine = [cell for cell in cells if cell.model == model]
        for subject in unique(cell.subject for cell in mine if cell.method != "fp") or [model]:
            own = [cell.bits for cell in mine if cell.subject == subject and cell.bits != FULL]
            columns += [Column(subject, model, bits) for bits in unique(own) or [FULL]]
    return columns


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV with 4 decimals, see `benchmarks.console.csv_cell`."""
    return str(table.map(csv_cell).to_csv(index=False, float_format="%.4f", lineterminator="\n"))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Invisible characters become escapes."""
    with replaced_whole(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8", newline="")
