"""Comparison of measured with published numbers: one verdict and one reason per pair."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.compare.statistics import half_width
from benchmarks.grid.names import PUBLISHED, UNSTATED, Names, load_names
from benchmarks.results import scores
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import METHODS, Recipe
from tasks.common import registry
from tasks.common.record import ResultRecord, bits_name, recipe_of

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
REPRODUCED, ABOVE, BELOW, UNCERTAIN, NOT_COMPARABLE = (
    "reproduced", "above", "below", "too uncertain", "not comparable",
)  # fmt: skip
_STRONG = ("primary", "cited")
#: Points by which rounding of decimal numbers may move an interval.
_TINY = 1e-9


class Measurement(NamedTuple):
    """One metric of one model, method, bits and settings, averaged over seeds.

    :func:`benchmarks.results.scores.over_seeds` explains the fields after ``metric``.
    """

    record: ResultRecord
    settings: str
    metric: str
    mean: float
    sd: float
    seeds: int
    sampling: float
    se: float


@dataclass(frozen=True)
class Judgement:
    """Result of the comparison of a measurement with a published number."""

    verdict: str  #: one of the five, see :func:`diff`
    difference: float  #: measured minus published, in points; NaN without a comparable number
    rule: str  #: the tolerance, or the reason why the two are not comparable
    remarks: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Rule and remarks as one text."""
        return "; ".join((self.rule, *self.remarks))


def settings_key(record: ResultRecord) -> str:
    """Return a key that is equal for records that differ only in their seed."""
    recipe = {k: v for k, v in (record.recipe or {}).items() if k != "seed"}
    fields = (
        record.task, record.dataset.fingerprint, record.dataset.name, record.dataset.split,
        record.model, record.method, record.w_bit, record.a_bit, record.variant,
        record.weights.sha256, sorted(recipe.items()),
    )  # fmt: skip
    return repr(fields)


def measurements(records: Iterable[ResultRecord]) -> list[Measurement]:
    """Average records of the same settings over seeds. The latest record of a seed counts."""
    latest: dict[tuple[str, int | None], ResultRecord] = {}
    for record in records:
        key = (settings_key(record), record.seed)
        if latest.setdefault(key, record).finished < record.finished:
            latest[key] = record
    table, keys = scores.record_scores(latest.values()), [key for key, _ in latest]
    table["settings"] = [keys[place] for place in table["item"]]
    first = {key: record for (key, _), record in reversed(latest.items())}
    means = scores.over_seeds(table, ["settings", "metric"])
    return [Measurement(first[row["settings"]], **row) for row in means.to_dict("records")]


def published_rows() -> pd.DataFrame:
    """Return the published accuracies. Bits are 0 where the source does not state them."""
    table = pd.read_csv(PUBLISHED / "accuracy.csv", dtype=str, keep_default_na=False)
    for column in ("w_bit", "a_bit"):
        table[column] = pd.to_numeric(table[column]).fillna(0).astype(int)
    return table.assign(value=table["value"].astype(float))


def has_effect(recipe: Recipe, name: str) -> bool:
    """Return True if the setting ``name`` influences the results of a recipe."""
    if name in ("reconstruct", "reconstruct_mlp", "refit"):
        return True
    if name.startswith("mlp_"):
        return recipe.reconstruct_mlp
    extra = Recipe.model_fields[name].json_schema_extra
    group = extra.get("group") if isinstance(extra, dict) else None
    if group == "reconstruction":
        return recipe.reconstruct
    return group != "loss" or recipe.reconstruct or recipe.reconstruct_mlp


def changed_settings(recipe: Recipe, task: str) -> dict[str, object]:
    """Return the settings that differ from the released ones of ``task`` and have an effect."""
    changes = recipe.changes(registry.defaults(task))
    return {name: value for name, value in changes.items() if has_effect(recipe, name)}


def mismatch(item: Measurement, names: Names) -> str | None:
    """Return the reason why a measurement compares with no published number; None if it may."""
    record, data = item.record, item.record.dataset
    sets = names.published_on(record.task, data.name)
    if not sets:
        where = f"{data.name} ({data.split}, {data.count} samples)"
        return f"measured on {where}, on which nothing is published"
    wanted = sets[0][2]
    if (data.split, data.count, record.n) != (wanted.split, wanted.count, wanted.count):
        return (
            f"measured on a part of {data.name} ({data.split}, {record.n} samples); "
            f"published numbers use {wanted.split} with {wanted.count}"
        )
    if record.skipped_images:
        return f"{len(record.skipped_images)} damaged images were left out"
    models = names.models_for(record.model)
    if not models:
        return f"no published name is mapped to the model {record.model}"
    if record.weights.tag != models[0].tag:
        return f"weights {record.weights.tag}; published numbers use {models[0].tag}"
    if record.method == "fp":
        return None
    if record.method not in METHODS:
        return f"the method '{record.method}' and its released settings are not known here"
    try:
        recipe = recipe_of(record)
    except FimaqError:
        return "the record's recipe is not one of this version"
    changes = {} if recipe is None else changed_settings(recipe, record.task)
    listed = ", ".join(f"{name} {value}" for name, value in changes.items())
    return f"settings changed from the released ones: {listed}" if changes else None


def _rows_for(item: Measurement, rows: pd.DataFrame, names: Names) -> pd.DataFrame:
    """Return the published rows of the same cell and metric, of all variants.

    Full precision compares with rows of all scopes, since it has none. A row that does not state
    its scope compares with all scopes.
    """
    record = item.record
    methods = [
        name
        for name, entry in names.methods.items()
        if record.method in {entry.id, *entry.comparable.values()}
    ]
    own, scopes = names.models_for(record.model), (scores.scope_of(record) or None, UNSTATED)
    models = [
        name
        for name, entry in names.models.items()
        if entry in own and (record.method == "fp" or entry.scope in scopes)
    ]
    here = pd.Series(False, index=rows.index)
    for task, dataset, entry in names.published_on(record.task, record.dataset.name):
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
        cell = (record.task, record.dataset.name, model, record.method, bits, item.metric)
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
    why = mismatch(item, names)
    if row is None:
        why = why or "no published number for this model, method and bits"
    if row is None or why:
        return Judgement(NOT_COMPARABLE, math.nan, str(why))
    gap = item.mean - float(row["value"])
    method, variant = names.methods[row["method"]], row["variant"]
    full = item.record.method == "fp"
    weak = [] if row["evidence"] in _STRONG else [f"{row['evidence']} evidence"]
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
    rule = f"difference of {low:+.2f} to {high:+.2f} ({1 - 2 * ALPHA:.0%} interval), {rule}"
    one_seed = "one seed, so the spread over seeds is not counted"
    note = names.datasets[row["task"]][row["dataset"]].notes.get(row["method"])
    remarks = (one_seed if item.seeds == 1 and not full else None, note)
    return Judgement(verdict, gap, rule, tuple(filter(None, remarks)))


def run_diff(results: Path, show_all: bool, nothing: int = 2) -> int:
    """Compare all records with published numbers; print and write the table.

    ``show_all`` also lists metrics without a published number. Returns the exit code: 0 if all
    comparable numbers are reproduced, 1 if some are not, ``nothing`` if no number is comparable.
    """
    from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

    found, problems = scores.read_records(results / "runs")
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if not found:
        where = f"nothing is measured under {results / 'runs'}"
        print(f"Nothing is comparable yet: {where}. Run `make reproduce-table` first.")
        return nothing
    table = diff([record for _, record in found])
    path = results / "tables" / "diff.csv"
    scores.write_text(path, scores.csv_text(table))
    known = table["published"].notna() | show_all
    shown = table[known].drop(columns=["task", "dataset", "seeds"])
    if not shown.empty:
        rows = shown.fillna("").values.tolist()
        print(tabulate(rows, headers=list(shown.columns), floatfmt=".2f"), end="\n\n")
    for reason, number in table.loc[~known, "reason"].value_counts().items():
        print(f"{number} measured values: {reason}.")
    verdicts = table.loc[table["verdict"] != NOT_COMPARABLE, "verdict"].value_counts()
    if verdicts.empty:
        print(
            "Nothing is comparable yet: no measured number has the same data, weights, settings "
            "and bits as a published one. To measure such numbers: "
            "make reproduce-table TABLE=fimaq IMAGENET=/path/to/imagenet"
        )
        return nothing
    counts = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    print(f"{verdicts.sum()} comparisons: {counts}. Table: {path}")
    return 0 if set(verdicts.index) == {REPRODUCED} else 1
