"""Table of methods with and without parts: one per bit-width, with means over all models."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pandas as pd

from benchmarks.grid.names import load_names
from benchmarks.results import scores
from benchmarks.results.outcomes import CompareError, compare
from benchmarks.results.scores import FULL, Cells, Damaged, Items, Measured, rows_of, unique
from benchmarks.tables.formats import markdown
from benchmarks.tables.settings import settings_lines
from benchmarks.tables.summary import data_lines
from fimaq_core.recipe import METHODS
from fimaq_core.terminal import one_line
from tasks.common.record import WAIT

#: Method whose time is the unit of the column ``time``.
UNIT = "fimaq"
NOTE = (
    "Scores in percent: mean ± sd over seeds; `-` is not measured. `mean`: over the models of the "
    "row. Their number is in brackets if some are missing; compare such a row by its differences "
    "only. A difference is a mean over the models and seeds that both rows have, paired by test "
    "sample, ± its standard error (from samples, and from seeds where there are several), with the "
    "number of models in brackets. `- base`: to the same method without the part. `- best`: to the "
    "best published method, which is named below the table. `time`: seconds of a cell, with all "
    f"stages that it shares with other cells, divided by those of `{UNIT}` on the same models."
)


class Gap(NamedTuple):
    """Mean difference of two rows over models, in points."""

    mean: float
    se: float
    models: int

    def text(self) -> str:
        """Return ``+0.50 ± 0.10 (4)``."""
        return f"{self.mean:+.2f} ± {self.se:.2f} ({self.models})"


def frontier_markdown(
    title: str,
    measured: Items,
    cells: Cells,
    width: int | None = None,
    damaged: Sequence[Damaged] = (),
) -> str:
    """Return the tables of ``cells``, measured or not, as Markdown.

    Tables wider than the ``width`` of a terminal are split. ``damaged`` are cells with unreadable
    records, which are named below the tables.
    """
    parts = [f"# {title}"]
    for bits in unique(cell.bits for cell in cells if cell.bits != FULL):
        mine = [item for item in measured if item.cell.bits in (bits, FULL)]
        planned = [cell for cell in cells if cell.bits in (bits, FULL)]
        table, best = frontier_table(mine, planned)
        parts += [f"## {bits}", *markdown(table, width)]
        parts += [] if best is None else [f"Best published method at {bits}: {best}."]
    lines = []
    for section, mine, planned in scores.by_section(measured, cells):
        own = [item for item in mine if not item.cell.point]
        lines += [f"{section}: {line}" for line in (*data_lines(mine), *settings_lines(own))]
        keys = {cell.key for cell in planned}
        if len(mine) < len(keys):
            made = next((f" Make its data: {c.made_by}" for c in planned if c.made_by), "")
            words = f"{len(keys) - len(mine)} of {len(keys)} cells are not measured."
            lines.append(f"{section}: {words}{'' if mine else made}")
    lines += [one.line for one in damaged]
    return "\n\n".join([*parts, NOTE, "\n".join(f"- {one_line(line)}" for line in lines)]) + "\n"


def frontier_table(measured: Items, cells: Cells) -> tuple[pd.DataFrame, str | None]:
    """Return the table of one bit-width and the row of the best published method, if any.

    Args:
        measured, cells: of one bit-width, and of full precision.

    Returns:
        One row per method and point that has a measured cell. Columns: the subjects; ``mean``,
        ``- base``, ``- best``, ``time``; texts.
    """
    subjects = unique(cell.subject for cell in cells if cell.bits != FULL)
    rows = {row: _by_subject(measured, row, subjects) for row in rows_of(cells)}
    rows = {row: found for row, found in rows.items() if found}
    methods = {item.cell.row: item.cell.method for item in measured}
    seconds, best, lines = whole_seconds(measured), best_published(rows), {}
    for row, found in rows.items():
        means = {subject: _mean(items) for subject, items in found.items()}
        texts = {
            name: scores.value_text(*means[name]) if name in means else "-" for name in subjects
        }
        share = "" if len(means) == len(subjects) else f" ({len(means)})"
        texts["mean"] = f"{sum(mean for mean, _ in means.values()) / len(means):.2f}{share}"
        base = rows.get(methods[row], {}) if methods[row] != row else {}
        for name, other in (("- base", base), ("- best", rows.get(best or row, {}))):
            gap = None if row == best or methods[row] == "fp" else difference(found, other)
            texts[name] = "-" if gap is None else gap.text()
        texts["time"] = _time(found, rows.get(UNIT, {}), seconds)
        lines[row] = texts
    columns = [*subjects, "mean", "- base", "- best", "time"]
    return pd.DataFrame(lines.values(), index=pd.Index(lines, name="method"), columns=columns), best


#: Finished cells of one row by subject.
Row = dict[str, list[Measured]]


def _by_subject(measured: Items, row: str, subjects: Iterable[str]) -> Row:
    """Return the finished cells of a row by subject; full precision is of all subjects."""
    mine = [item for item in measured if item.cell.row == row]
    found: Row = {}
    for subject in subjects:
        model = subject.partition(" [")[0]
        own = [it for it in mine if it.cell.subject == subject or it.cell.subject == model]
        if own:
            found[subject] = own
    return found


def _mean(items: Items) -> tuple[float, float]:
    """Return mean and standard deviation (NaN for one seed) of the main metric over seeds."""
    table = scores.scores(items)
    values = table.loc[table["metric"] == scores.main_metric(items[0].cell.task, table), "value"]
    return float(values.mean()), float(values.std())


def best_published(rows: dict[str, Row]) -> str | None:
    """Return the row of the published method with the greatest mean, of those without parts.

    The means are over the models that all these methods have. None if they have none in common.
    """
    ids = {method.id for method in load_names().methods.values()}
    known = {row: found for row, found in rows.items() if row in METHODS and row in ids}
    common = set.intersection(*map(set, known.values())) if known else set()
    if not common:
        return None
    return max(known, key=lambda row: sum(_mean(known[row][name])[0] for name in common))


def difference(row: Row, other: Row) -> Gap | None:
    """Return ``row`` minus ``other``, averaged over the models that both have; None if none.

    The error of a model is that of the mean over its test samples, and the spread of its seeds'
    differences where there are several. Models count as independent.
    """
    found: list[tuple[float, float]] = []
    for subject in row.keys() & other.keys():
        mine, theirs = ({it.record.seed: it for it in own[subject]} for own in (row, other))
        seeds = [seed for seed in mine if seed in theirs]
        try:
            pair = compare([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            each = [compare([mine[seed]], [theirs[seed]]).difference for seed in seeds]
        except CompareError:
            continue
        gaps = pd.Series(each)
        spread = gaps.sem() if len(gaps) > 1 else 0.0
        found.append((pair.difference, math.hypot(pair.se, spread)))
    if not found:
        return None
    mean = sum(gap for gap, _ in found) / len(found)
    return Gap(mean, math.hypot(*(se for _, se in found)) / len(found), len(found))


def whole_seconds(measured: Items) -> dict[Measured, float]:
    """Return the seconds of each finished cell, as if it had made all files that it reused.

    A reused stage counts the seconds of the cell that made the same file; if that cell is not in
    ``measured``, it counts the seconds of loading.
    """
    made = {}
    for item in measured:
        for stage, seconds in item.record.seconds.items():
            made[_stage(item, stage)] = seconds
    found = {}
    for item in measured:
        own = ((name, s) for name, s in item.record.seconds.items() if name != WAIT)
        whole = (made.get(_stage(item, name.removesuffix(" (reused)")), s) for name, s in own)
        found[item] = sum(whole)
    return found


def _stage(item: Measured, stage: str) -> tuple[object, ...]:
    """Return the identity of a stage's file; cells with the same identity share the file."""
    cell, recipe = item.cell, item.cell.request.recipe
    fields = "mlp" if "MLP" in stage else "ranges" if "calibrate" in stage else "all"
    digest = None if recipe is None else recipe.digest(fields)  # type: ignore[arg-type]
    return cell.section, cell.subject, cell.seed, stage, digest


def _time(row: Row, unit: Row, seconds: dict[Measured, float]) -> str:
    """Return the time of a row divided by that of the unit on the same models and seeds."""
    mine, theirs = ({(it.cell.subject, it.cell.seed): it for own in r.values() for it in own}
                    for r in (row, unit))  # fmt: skip
    both = [key for key in mine if key in theirs]
    if not both:
        return "-"
    sums = (sum(seconds[own[key]] for key in both) for own in (mine, theirs))
    return f"{next(sums) / next(sums):.2f}"
