"""Tables from records: one row a cell and metric as CSV, and a table for people with mean and spread over seeds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.cells import MAIN_METRIC, Adapter, Cell, finished
from fimaq_core.files import replaced_whole
from fimaq_core.recipe import METHODS, OFF
from tasks.common.record import ResultRecord, bits_name

COLUMNS = [
    "task", "dataset", "model", "method", "variant", "w_bit", "a_bit", "seed", "metric", "value", "stderr", "n", "fp_value",
]  # fmt: skip


#: Name of the bits of what is not quantized.
FULL = bits_name(OFF, OFF)


@dataclass(frozen=True)
class Measured:
    """A finished cell, its record, and the folder where they and the per-sample outcomes are (None: not on disk)."""

    cell: Cell
    record: ResultRecord
    folder: Path | None = None


def collect(cells: Iterable[Cell], adapter: Adapter) -> list[Measured]:
    """Return the finished ones of ``cells`` (each once, in order) with their records."""
    found: dict[object, Measured] = {}
    for cell in cells:
        if cell.key not in found:
            record_and_folder = finished(cell, adapter)
            if record_and_folder is not None:
                found[cell.key] = Measured(cell, *record_and_folder)
    return list(found.values())


def frame(measured: Iterable[Measured], subjects: bool = False) -> pd.DataFrame:
    """Return one row a cell and metric, with :data:`COLUMNS`; percent but for :func:`is_percent`.

    Args:
        measured: the cells.
        subjects: put :attr:`Cell.subject` into the column ``model``, for tables in which scopes stand side by side.
    """
    rows = []
    for item in measured:
        record, model = item.record, item.cell.subject if subjects else item.cell.model
        for name, metric in record.metrics.items():
            full = metric if record.method == "fp" else record.fp_metrics.get(name)
            rows.append((
                record.task, record.dataset.name, model, record.method, record.variant, record.w_bit, record.a_bit, record.seed,
                name, metric.value, metric.stderr, record.n, None if full is None else full.value,
            ))  # fmt: skip
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["seed"] = table["seed"].astype("Int64")
    for column in ("value", "stderr", "fp_value"):
        table[column] = table[column].astype(float)
    return table


def csv_text(table: pd.DataFrame) -> str:
    """Return the table as CSV: numbers with 4 decimals, no seed for full precision."""
    return str(table.to_csv(index=False, float_format="%.4f", lineterminator="\n"))


def with_bits(table: pd.DataFrame) -> pd.DataFrame:
    """Return a copy with a column ``bits``: ``fp``, ``w3a3`` and so on."""
    names = [bits_name(int(w), int(a)) for w, a in zip(table["w_bit"], table["a_bit"], strict=True)]
    return table.assign(bits=names)


def quantized(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with quantized weights or activations, with a column ``bits``."""
    named = with_bits(table)
    return named[named["bits"] != FULL]


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return mean, sample standard deviation (NaN for one seed) and number of seeds a model, method, variant and bits."""
    keys = ["task", "dataset", "model", "method", "variant", "bits", "metric"]
    grouped = with_bits(table).groupby(keys, sort=False)["value"]
    return grouped.agg(mean="mean", sd="std", k="count").reset_index()


def main_metric(task: str, table: pd.DataFrame) -> str:
    """Return the metric that a task's table shows."""
    present = list(dict.fromkeys(table["metric"]))
    wanted = MAIN_METRIC.get(task)
    return wanted if wanted is not None and wanted in present else present[0]


def is_percent(metric: str) -> bool:
    """Whether a metric is a percentage; median ranks are not."""
    return not metric.endswith("median_rank")


def sample_counts(count: int, captions: int | None) -> str:
    """Return ``2000 samples``, or ``1000 images, 5000 captions`` of data that have them."""
    return f"{count} samples" if captions is None else f"{count} images, {captions} captions"


def value_text(mean: float, sd: float) -> str:
    """Return ``88.20 ± 0.40``, or the mean alone where there is one seed only."""
    return f"{mean:.2f}" if pd.isna(sd) else f"{mean:.2f} ± {sd:.2f}"


def unique(values: Iterable[str]) -> list[str]:
    """Return the distinct values in order of first appearance."""
    return list(dict.fromkeys(values))


def in_order(methods: Iterable[str]) -> list[str]:
    """Return the distinct methods in the order of tables: full precision, then as they are registered."""
    known = ["fp", *METHODS]
    return sorted(unique(methods), key=lambda name: known.index(name) if name in known else len(known))


def wide(task_table: pd.DataFrame, cells: Sequence[Cell], text: Callable[[float, float], str] = value_text) -> pd.DataFrame:
    """Return the table for people: methods as rows, ``subject bits`` as columns, ``-`` where nothing is measured.

    What has no bits (full precision, methods that quantize nothing) shows its one value under all bits of its subject, and
    full precision, which has no scope, under all subjects of its model.

    Args:
        task_table: rows of one section and metric with subjects (see :func:`frame`), one variant a method and subject.
        cells: the cells the table should cover, measured or not; they give the order.
        text: of a mean and a standard deviation (NaN for one seed).
    """
    texts_by_key = {
        (row["model"], row["method"], row["bits"]): text(row["mean"], row["sd"])
        for row in over_seeds(task_table).to_dict("records")
    }
    methods = in_order(cell.method for cell in cells)
    without_bits = {cell.method for cell in cells if cell.bits == FULL}
    columns: dict[str, list[str]] = {}
    for model in unique(cell.model for cell in cells):
        mine = [cell for cell in cells if cell.model == model]
        for subject in unique(cell.subject for cell in mine if cell.method != "fp") or [model]:
            widths = unique(cell.bits for cell in mine if cell.subject == subject and cell.bits != FULL) or [FULL]
            for bits in widths:
                keys = [
                    (model if method == "fp" else subject, method, FULL if method in without_bits else bits) for method in methods
                ]
                columns[f"{subject} {bits}" if bits != FULL else subject] = [texts_by_key.get(key, "-") for key in keys]
    return pd.DataFrame(columns, index=pd.Index(methods, name="method"))


def markdown(table: pd.DataFrame, words: Sequence[str] = ()) -> str:
    """Return a wide table as Markdown; columns in ``words`` hold words, all others numbers."""
    sides = ["left" if name in words else "right" for name in table.columns]
    return str(table.to_markdown(disable_numparse=True, stralign="right", colalign=("left", *sides)))


def fitting(table: pd.DataFrame, width: int | None, words: Sequence[str] = ()) -> list[str]:
    """Return the table as Markdown, cut between columns into as few parts as fit ``width`` (None: one part)."""
    return [markdown(part, words) for part in cut(table, width, words)]


def cut(table: pd.DataFrame, width: int | None, words: Sequence[str] = ()) -> list[pd.DataFrame]:
    """Return the parts of a table whose Markdown fits ``width``; see :func:`fitting`."""
    parts: list[list[str]] = [[]]
    for column in table.columns:
        wider = [*parts[-1], column]
        if width is not None and parts[-1] and len(markdown(table[wider], words).split("\n")[0]) > width:
            parts.append([column])
        else:
            parts[-1] = wider
    return [table[part] for part in parts]


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replaced_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
