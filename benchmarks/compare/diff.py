"""Comparison of measured with published numbers: one verdict and one reason per pair."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.compare import alike
from benchmarks.compare.alike import STRONG, changes_of, differing, facts, mismatch, published_rows
from benchmarks.compare.statistics import half_width
from benchmarks.grid.cell import EXPORT
from benchmarks.grid.names import UNSTATED, Names, load_names
from benchmarks.results import scores
from tasks.common.record import ResultRecord, bits_name

#: Columns of ``diff.csv``.
COLUMNS = [
    "task", "dataset", "model", "method", "bits", "metric", "measured", "se", "seeds", "published",
    "variant", "source", "evidence", "difference", "verdict", "reason",
]  # fmt: skip

#: Points around a published number in which a reproduction must lie.
MARGIN = 1.0
#: Points by which a published number may be off: it is mostly one seed of another machine.
TOLERANCE = 0.3
#: Error of each of the two one-sided tests, so that intervals have the level ``1 - 2 ALPHA``.
ALPHA = 0.05
#: Name of the intervals.
INTERVAL = f"{1 - 2 * ALPHA:.0%} interval"
REPRODUCED, ABOVE, BELOW, UNCERTAIN, NOT_COMPARABLE = (
    "reproduced", "above", "below", "too uncertain", "not comparable",
)  # fmt: skip
#: Points by which rounding of decimal numbers may move an interval.
_TINY = 1e-9


class Measurement(NamedTuple):
    """One metric of one model, method, bits and settings, averaged over seeds.

    :func:`benchmarks.results.scores.over_seeds` explains the fields after ``metric``.
    """

    records: tuple[ResultRecord, ...]  #: one per seed
    apart: str  #: facts that keep other records of the same cell from being averaged with these
    repeated: str  #: seed that was measured again with another result; empty if there is none
    conflict: str  #: reason why the weights of the model are not clear; empty if they are
    settings: str
    metric: str
    mean: float
    sd: float
    seeds: int
    sampling: float
    se: float

    @property
    def record(self) -> ResultRecord:
        """The first record; all of them are alike."""
        return self.records[0]


@dataclass(frozen=True)
class Judgement:
    """Result of the comparison of a measurement with a published number."""

    verdict: str  #: one of the five, see :func:`diff`
    difference: float  #: measured minus published, in points; NaN without a comparable number
    rule: str  #: the interval, or the reason why the two are not comparable
    remarks: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Rule and remarks as one text."""
        return "; ".join((self.rule, *self.remarks))


def settings_key(record: ResultRecord) -> str:
    """Return a key that is equal for records that differ only in their seed."""
    return repr(sorted(facts(record).items()))


def measurements(records: Iterable[ResultRecord]) -> list[Measurement]:
    """Average records of the same settings over seeds. The latest record of a seed counts."""
    latest: dict[tuple[str, int | None], ResultRecord] = {}
    repeated: dict[str, str] = {}
    for record in records:
        key = (settings_key(record), record.seed)
        before = latest.setdefault(key, record)
        if before.metrics != record.metrics:
            repeated[key[0]] = f"seed {record.seed}"
        if _end(before) < _end(record):
            latest[key] = record
    own: dict[str, list[ResultRecord]] = {}
    for (settings, _), record in latest.items():
        own.setdefault(settings, []).append(record)
    table, keys = scores.record_scores(latest.values()), [key for key, _ in latest]
    table["settings"] = [keys[place] for place in table["item"]]
    means = scores.over_seeds(table, ["settings", "metric"]).to_dict("records")
    apart, conflicts = _apart(own), _conflicts(latest.values())
    found = []
    for row in means:
        same = tuple(own[row["settings"]])
        conflict = conflicts.get((same[0].task, same[0].model), "")
        remarks = (text.get(row["settings"], "") for text in (apart, repeated))
        found.append(Measurement(same, *remarks, conflict, **row))
    return found


def _end(record: ResultRecord) -> datetime:
    """Return the time at which a cell was finished; a time without a zone is in UTC."""
    end = datetime.fromisoformat(record.finished)
    return end if end.tzinfo else end.replace(tzinfo=UTC)


def _conflicts(records: Iterable[ResultRecord]) -> dict[tuple[str, str], str]:
    """Return a message for each task and model whose records have several weights files."""
    files: dict[tuple[str, str], set[str]] = {}
    for record in records:
        # Model arguments and entries change the weights, and are refused by their own names.
        if not record.model_args and len(record.weights.entries) < 2:
            files.setdefault((record.task, record.model), set()).add(record.weights.sha256[:12])
    return {
        place: f"records of this model have different weights (sha256 {'; '.join(sorted(found))}): "
        "keep those of one weights file"
        for place, found in files.items()
        if len(found) > 1
    }


def _apart(own: Mapping[str, Sequence[ResultRecord]]) -> dict[str, str]:
    """Return the facts that keep seeds of one recipe from being averaged, by their settings."""
    cells: dict[tuple[str | None, ...], list[str]] = {}
    for key, (record, *_) in own.items():
        same = [
            v for k, v in facts(record).items() if k in alike.CELL or k.startswith(alike.RECIPE)
        ]
        cells.setdefault((record.dataset.name, record.dataset.split, *same), []).append(key)
    found = {}
    for keys in cells.values():
        if len(keys) > 1:
            found |= dict.fromkeys(keys, differing(own[key][0] for key in keys))
    return found


def _rows_for(item: Measurement, rows: pd.DataFrame, names: Names) -> pd.DataFrame:
    """Return the published rows of the same cell and metric, of all variants.

    Full precision compares with rows of all scopes, since it has none. A row that does not state
    its scope compares with all scopes.
    """
    record, sets = item.record, names.published_on(item.record.task, item.record.dataset.name)
    if not sets:
        return rows.iloc[:0]
    changes = changes_of(record)  # a row of an ablation fits only records with its changes
    methods = [
        name
        for name, entry in names.methods.items()
        if record.method in {entry.id, *entry.comparable.values()}
        and entry.changes in ({}, changes)
    ]
    own, scopes = names.models_for(record.model), (scores.scope_of(record) or None, UNSTATED)
    models = [
        name
        for name, entry in names.models.items()
        if entry in own and (record.method == "fp" or entry.scope in scopes)
    ]
    here = pd.Series(False, index=rows.index)
    for task, dataset, entry in sets:
        metrics = [name for name, mine in entry.metrics.items() if mine == item.metric]
        here |= (rows["task"] == task) & (rows["dataset"] == dataset) & rows["metric"].isin(metrics)
    bits = (rows["w_bit"] == record.w_bit) & (rows["a_bit"] == record.a_bit)
    return rows[here & bits & rows["model"].isin(models) & rows["method"].isin(methods)]


def diff(records: Sequence[ResultRecord], rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """Compare records with published numbers (``rows``; None: all of them).

    The verdicts follow from the interval of ``measured - published`` at the level ``1 - 2 ALPHA``
    (:func:`~benchmarks.compare.statistics.half_width`), as in an equivalence test by two one-sided
    tests (Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987):

    - ``reproduced``: the interval is within :data:`MARGIN`;
    - ``above``, ``below``: the interval is beyond :data:`TOLERANCE`, but not within the margin;
    - ``too uncertain``: neither, so a noisier measurement is reproduced less often;
    - ``not comparable``: other data, settings, weights or framework; a source that does not name
      the quantized parts; weak evidence.

    Returns:
        :data:`COLUMNS`, with one row per measured metric and published row. A metric without a
        published number has empty published columns. Published rows that state neither model nor
        bits come last, without a measured number.
    """
    rows, names = published_rows() if rows is None else rows, load_names()
    result: list[dict[str, Any]] = []
    for item in measurements(records):
        record, models = item.record, names.models_for(item.record.model)
        scope = f" [{scores.scope_of(record)}]" if scores.scope_of(record) else ""
        model = f"{models[0].id if models else record.model}{scope}"
        bits = bits_name(record.w_bit, record.a_bit)
        method = record.method if record.exported is None else f"{record.method} {EXPORT}"
        cell = (record.task, record.dataset.name, model, method, bits, item.metric)
        common = dict(zip(COLUMNS[:9], (*cell, item.mean, item.se, item.seeds), strict=True))
        nothing = {"variant": "", "source": "", "evidence": "", "value": math.nan}
        for row in _rows_for(item, rows, names).to_dict("records") or [nothing]:
            judged = judge(item, None if row is nothing else row, names)
            verdict = {name: getattr(judged, name) for name in ("difference", "verdict", "reason")}
            result.append({**row, **common, "published": row["value"], **verdict})
    for task, dataset in dict.fromkeys((record.task, record.dataset.name) for record in records):
        result += _context(task, dataset, rows, names)
    table = pd.DataFrame(result, columns=COLUMNS)
    numbers = dict.fromkeys(("measured", "se", "published", "difference"), float)
    return table.astype({**numbers, "seeds": int})


def _context(task: str, dataset: str, rows: pd.DataFrame, names: Names) -> list[dict[str, Any]]:
    """Return the published rows of a data set whose source states neither model nor bits."""
    unstated, found = (rows["model"] == UNSTATED) & (rows["w_bit"] == 0) & (rows["a_bit"] == 0), []
    for theirs, name, entry in names.published_on(task, dataset):
        here = unstated & (rows["task"] == theirs) & (rows["dataset"] == name)
        for row in rows[here].to_dict("records"):
            method, metric = row["method"], row["metric"]
            changes = {
                "task": task,
                "dataset": dataset,
                "method": names.methods[method].id if method in names.methods else method,
                "bits": UNSTATED,
                "metric": entry.metrics.get(metric, metric),
                "seeds": 0,
                "published": row["value"],
                "verdict": NOT_COMPARABLE,
                "reason": "context only: the source names neither model nor bits",
            }
            found.append({**row, **changes})
    return found


def judge(item: Measurement, row: Mapping[Any, Any] | None, names: Names) -> Judgement:
    """Compare a measurement with a published row of the same cell (None: there is no row)."""
    changes = {} if row is None else names.methods[row["method"]].changes
    reasons = (
        mismatch(record, item.metric, names=names, changes=changes) for record in item.records
    )
    why = next(filter(None, reasons), item.conflict or None)
    if row is None:
        why = why or "no published number for this model, method and bits"
    if row is None or why:
        return Judgement(NOT_COMPARABLE, math.nan, str(why))
    gap = item.mean - float(row["value"])
    method, variant = names.methods[row["method"]], row["variant"]
    full = item.record.method == "fp"
    weak = [] if row["evidence"] in STRONG else [f"{row['evidence']} evidence"]
    if not full and names.models[row["model"]].scope == UNSTATED:
        weak.append("the source does not name the quantized parts of the model")
    if not weak and method.comparable.get(variant) != item.record.method:
        weak = [f"published variant '{variant}' was run with another framework or recipe"]
    if weak:
        return Judgement(NOT_COMPARABLE, gap, f"context only: {'; '.join(weak)}")
    half = half_width(item.sampling, item.sd, item.seeds, ALPHA)
    low, high = gap - half, gap + half
    if max(abs(low), abs(high)) <= MARGIN + _TINY:
        verdict, rule = REPRODUCED, f"within ±{MARGIN:g} point"
    elif min(abs(low), abs(high)) >= TOLERANCE - _TINY and low * high > 0:
        verdict, rule = (ABOVE if gap > 0 else BELOW), f"beyond ±{TOLERANCE:g} points"
    else:
        verdict = UNCERTAIN
        rule = f"neither within ±{MARGIN:g} point nor beyond ±{TOLERANCE:g} points"
    rule = f"difference of {low:+.2f} to {high:+.2f} ({INTERVAL}), {rule}"
    one_seed = "one seed, so the spread over seeds is not counted"
    note = names.datasets[row["task"]][row["dataset"]].notes.get(row["method"])
    apart = f"not averaged with other records of this cell, which differ in {item.apart}"
    seed = one_seed if item.seeds == 1 and not full else None
    changed = any(one.environment.git_revision.endswith("+changes") for one in item.records)
    code = "measured by code with changes that are not committed" if changed else None
    again = f"{item.repeated} has several results, of which the latest counts"
    remarks = (seed, apart if item.apart else None, again if item.repeated else None, code, note)
    return Judgement(verdict, gap, rule, tuple(filter(None, remarks)))


def spreads(table: pd.DataFrame) -> pd.DataFrame:
    """Return the cells whose published numbers differ between sources.

    ``table`` is that of :func:`diff`. Columns: model, method, bits, metric; ``sources`` (number);
    ``lowest``, ``highest``, ``spread`` of the published numbers. The widest spread comes first.
    """
    cell = ["model", "method", "bits", "metric"]
    groups = table[table["published"].notna() & (table["bits"] != UNSTATED)].groupby(cell)
    found = groups.agg(
        sources=("source", "nunique"), lowest=("published", "min"), highest=("published", "max")
    )
    found["spread"] = found["highest"] - found["lowest"]
    apart = found[(found["sources"] > 1) & (found["spread"] > 0)]
    return apart.sort_values("spread", ascending=False, kind="stable").reset_index()


def run_diff(results: Path, show_all: bool, nothing: int = 2) -> int:
    """Compare all records with published numbers; print and write the table.

    ``show_all`` also lists metrics without a published number. Returns the exit code: 0 if all
    comparable numbers are reproduced; 1 if some are not, also those that are too uncertain;
    ``nothing`` if no number is comparable; 2 if a record cannot be read.
    """
    from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

    found, problems = scores.read_records(results / "runs")
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if not found:
        where = f"nothing is measured under {results / 'runs'}"
        print(f"Nothing is comparable yet: {where}. Run `make reproduce-table` first.")
        return 2 if problems else nothing
    table = diff([record for _, record in found])
    path = results / "tables" / "diff.csv"
    scores.write_text(path, scores.csv_text(table))
    known = table["published"].notna() | show_all
    shown = table[known].drop(columns=["task", "dataset", "seeds"]).fillna("")
    parts = {
        f"Published in {source or 'no source'}": rows.drop(columns="source")
        for source, rows in shown.groupby("source", sort=False)
    } | {"Sources that disagree": spreads(table)}
    for title, rows in parts.items():
        if len(rows):
            text = tabulate(rows, headers="keys", showindex=False, floatfmt=".2f")
            print(f"{title}:", text, sep="\n\n", end="\n\n")
    for reason, number in table.loc[~known, "reason"].value_counts().items():
        print(f"{number} measured values: {reason}.")
    verdicts = table.loc[table["verdict"] != NOT_COMPARABLE, "verdict"].value_counts()
    if verdicts.empty:
        print(
            "Nothing is comparable yet: no measured number has the same data, weights, settings "
            "and bits as a published one. To measure such numbers: "
            "make reproduce-table TABLE=fimaq IMAGENET=/path/to/imagenet"
        )
        return 2 if problems else nothing
    counts = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    print(f"{verdicts.sum()} comparisons: {counts}. Table: {path}")
    if problems:
        print(f"Not compared: {scores.count(len(problems), 'record')} that cannot be read.")
        return 2
    return 0 if set(verdicts.index) == {REPRODUCED} else 1
