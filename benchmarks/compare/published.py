"""Measured against published numbers: like with like, two-sided, each verdict with its tolerance and its reason."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from benchmarks.names import PUBLISHED, UNSTATED, Names, load_names
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import METHODS, Recipe
from tasks.common import registry
from tasks.common.record import ResultRecord, bits_name, recipe_of

COLUMNS = [
    "task", "dataset", "model", "method", "bits", "metric", "measured", "se", "seeds", "published", "variant", "source",
    "evidence", "difference", "verdict", "reason",
]  # fmt: skip

#: Points by which two runs of one recipe may differ in any case.
TOLERANCE = 0.3
#: Tolerance in points beyond which agreement would be claimed from noise.
WIDEST = 1.0
REPRODUCED, ABOVE, BELOW, UNCERTAIN, NOT_COMPARABLE = (
    "reproduced",
    "above",
    "below",
    "too uncertain",
    "not comparable",
)
_STRONG = ("primary", "cited")


@dataclass(frozen=True)
class Measurement:
    """One metric of one model, method and bits under one set of settings: its mean over seeds.

    Attributes:
        sampling: standard error from the finite number of samples. All seeds see the same samples, so it does not shrink
            with their number.
        spread: sample standard deviation over seeds; None where there is one.
    """

    record: ResultRecord
    metric: str
    value: float
    sampling: float
    spread: float | None
    seeds: int

    @property
    def se(self) -> float:
        """Standard error of the mean: sampling and seeds together."""
        return math.hypot(
            self.sampling, 0.0 if self.spread is None else self.spread / math.sqrt(self.seeds)
        )


@dataclass(frozen=True)
class Judgement:
    """A measurement set against a published number.

    Attributes:
        verdict: one of the five.
        difference: measured minus published; NaN between unlike things, which have none to quote.
        rule: the tolerance, or why there is no verdict.
        remarks: what else to know of the comparison.
    """

    verdict: str
    difference: float
    rule: str
    remarks: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Rule and remarks in one text."""
        return "; ".join((self.rule, *self.remarks))


def measurements(records: Iterable[ResultRecord]) -> list[Measurement]:
    """Average over seeds whatever differs in nothing but the seed."""
    groups: dict[tuple[object, ...], dict[int | None, ResultRecord]] = {}
    for record in records:
        recipe = (
            None
            if record.recipe is None
            else {k: v for k, v in record.recipe.items() if k != "seed"}
        )
        key = (
            record.task, record.dataset.fingerprint, record.dataset.name, record.dataset.split, record.model, record.method,
            record.w_bit, record.a_bit, record.variant, record.weights.sha256, repr(sorted((recipe or {}).items())),
        )  # fmt: skip
        group = groups.setdefault(key, {})
        if record.seed not in group or group[record.seed].finished < record.finished:
            group[record.seed] = record
    found = []
    for group in groups.values():
        members = list(group.values())
        for name in members[0].metrics:
            metrics = [record.metrics[name] for record in members if name in record.metrics]
            values = [metric.value for metric in metrics]
            found.append(Measurement(
                members[0], name, fmean(values), math.sqrt(fmean(metric.stderr**2 for metric in metrics)),
                stdev(values) if len(values) > 1 else None, len(values),
            ))  # fmt: skip
    return found


def published_rows() -> pd.DataFrame:
    """Return the published accuracies, ``value`` and bits as numbers (bits 0 where the source states none)."""
    table = pd.read_csv(PUBLISHED / "accuracy.csv", dtype=str, keep_default_na=False)
    for column in ("w_bit", "a_bit"):
        table[column] = pd.to_numeric(table[column]).fillna(0).astype(int)
    return table.assign(value=table["value"].astype(float))


def changed_settings(recipe: Recipe, task: str) -> dict[str, object]:
    """Return the settings that are not the method's released ones on ``task`` and bear on the result."""
    idle = (
        ()
        if recipe.reconstruct
        else ("reconstruction",)
        if recipe.reconstruct_mlp
        else ("reconstruction", "loss")
    )

    def bears(name: str) -> bool:
        if name in ("reconstruct", "reconstruct_mlp", "refit"):
            return True
        return recipe.reconstruct_mlp if name.startswith("mlp_") else _group(name) not in idle

    return {
        name: value
        for name, value in recipe.changes(registry.defaults(task)).items()
        if bears(name)
    }


def _group(field: str) -> str:
    extra = Recipe.model_fields[field].json_schema_extra
    return str(extra.get("group")) if isinstance(extra, dict) else ""


def unlike(item: Measurement, names: Names) -> str | None:
    """Say why a measurement compares with no published number whatsoever, or None if it may."""
    record, data = item.record, item.record.dataset
    sets = names.published_on(record.task, data.name)
    if not sets:
        return f"measured on {data.name} ({data.split}, {data.count} samples), on which nothing is published"
    wanted = sets[0][2]
    if (data.split, data.count) != (wanted.split, wanted.count) or record.n != wanted.count:
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
        return f"the method '{record.method}' is not known to this version, nor are its released settings"
    try:
        recipe = recipe_of(record)
    except FimaqError:
        return "the record's recipe is not one of this version"
    changes = changed_settings(recipe, record.task) if recipe is not None else {}
    if changes:
        return "settings changed from the released ones: " + ", ".join(
            f"{name} {value}" for name, value in changes.items()
        )
    return None


def subject_name(record: ResultRecord, names: Names) -> str:
    """Return the short name of a record's model where it has one, and what of it is quantized where that is stated."""
    models, scope = names.models_for(record.model), _scope(record)
    return f"{models[0].id if models else record.model}{f' [{scope}]' if scope else ''}"


def _scope(record: ResultRecord) -> str | None:
    return None if record.recipe is None else record.recipe.get("scope")


def _rows_for(item: Measurement, rows: pd.DataFrame, names: Names) -> pd.DataFrame:
    """Return the published rows of the same task, data set, model, scope, method, bits and metric, whatever the variant.

    Full precision has no scope, so rows of every scope are its own; rows that leave the scope open are there for all.
    """
    record = item.record
    methods = [
        name
        for name, entry in names.methods.items()
        if record.method in (entry.id, *entry.comparable.values())
    ]
    own = names.models_for(record.model)
    models = [
        name
        for name, entry in names.models.items()
        if entry in own and (record.method == "fp" or entry.scope in (_scope(record), UNSTATED))
    ]
    here = pd.Series(False, index=rows.index)
    for task, dataset, entry in names.published_on(record.task, record.dataset.name):
        metrics = [name for name, mine in entry.metrics.items() if mine == item.metric]
        here |= (rows["task"] == task) & (rows["dataset"] == dataset) & rows["metric"].isin(metrics)
    return rows[
        here & rows["model"].isin(models) & rows["method"].isin(methods) & (rows["w_bit"] == record.w_bit)
        & (rows["a_bit"] == record.a_bit)
    ]  # fmt: skip


def diff(
    records: Sequence[ResultRecord], rows: pd.DataFrame | None = None, names: Names | None = None
) -> pd.DataFrame:
    """Compare records with published numbers.

    A verdict is ``reproduced`` where the difference is within 0.3 points or two standard errors of the measured mean
    (sampling and seeds), whichever is larger; else ``above`` or ``below``: better than published is a finding too. The
    sampling error counts although published numbers come from the very same images, so the tolerance is on the wide side.
    ``too uncertain`` is a difference within a tolerance of more than one point: agreement would be claimed from noise.
    ``not comparable`` covers other data, other settings, other weights, published variants run with another framework,
    sources that do not say what of the model they quantized, and weak evidence, which is context only.

    Returns:
        One row a measured metric and published row (:data:`COLUMNS`); measured metrics without a published number have
        one row with empty published columns. Published rows that name neither model nor bits come last, with nothing measured
        beside them.
    """
    rows = published_rows() if rows is None else rows
    names = load_names() if names is None else names
    result = []
    for item in measurements(records):
        record = item.record
        common = [
            record.task, record.dataset.name, subject_name(record, names), record.method,
            bits_name(record.w_bit, record.a_bit), item.metric, item.value, item.se, item.seeds,
        ]  # fmt: skip
        found = _rows_for(item, rows, names)
        if found.empty:
            reason = unlike(item, names) or "no published number for this model, method and bits"
            result.append([*common, math.nan, "", "", "", math.nan, NOT_COMPARABLE, reason])
        for row in found.to_dict("records"):
            judged = judge(item, row, names)
            result.append([
                *common, float(row["value"]), row["variant"], row["source"], row["evidence"],
                judged.difference, judged.verdict, judged.reason,
            ])  # fmt: skip
    result += _context(records, rows, names)
    return pd.DataFrame(result, columns=COLUMNS)


def _context(records: Iterable[ResultRecord], rows: pd.DataFrame, names: Names) -> list[list[Any]]:
    """Published rows of the records' data sets whose source names neither model nor bits: they compare with nothing."""
    found: list[list[Any]] = []
    unstated = rows[(rows["model"] == UNSTATED) & (rows["w_bit"] == 0) & (rows["a_bit"] == 0)]
    for task, dataset in dict.fromkeys((record.task, record.dataset.name) for record in records):
        for their_task, name, entry in names.published_on(task, dataset):
            for row in unstated[
                (unstated["task"] == their_task) & (unstated["dataset"] == name)
            ].to_dict("records"):
                method, metric = names.methods.get(str(row["method"])), str(row["metric"])
                found.append([
                    task, dataset, UNSTATED, row["method"] if method is None else method.id, UNSTATED,
                    entry.metrics.get(metric, metric), math.nan, math.nan, 0, float(row["value"]), row["variant"],
                    row["source"], row["evidence"], math.nan, NOT_COMPARABLE,
                    "context only: the source names neither model nor bits",
                ])  # fmt: skip
    return found


def judge(item: Measurement, row: Mapping[Any, Any], names: Names) -> Judgement:
    """Set a measurement against a published row of the same cell; see :func:`diff` for the verdicts."""
    if why := unlike(item, names):
        return Judgement(NOT_COMPARABLE, math.nan, why)
    gap = item.value - float(row["value"])
    method, variant = names.methods[str(row["method"])], str(row["variant"])
    weak = [] if row["evidence"] in _STRONG else [f"{row['evidence']} evidence"]
    if item.record.method != "fp" and names.models[str(row["model"])].scope == UNSTATED:
        weak.append("the source does not say what of the model is quantized")
    if weak:
        return Judgement(NOT_COMPARABLE, gap, f"context only: {'; '.join(weak)}")
    if method.comparable.get(variant) != item.record.method:
        other = f"published variant '{variant}' was run with another framework or recipe"
        return Judgement(NOT_COMPARABLE, gap, f"context only: {other}")
    tolerance = max(TOLERANCE, 2 * item.se)
    within = abs(gap) <= tolerance + 1e-9
    rule = "0.3 points" if tolerance == TOLERANCE else "2 standard errors"
    rule = f"{'within' if within else 'beyond'} ±{tolerance:.2f} ({rule})"
    verdict = REPRODUCED if within else ABOVE if gap > 0 else BELOW
    if within and tolerance > WIDEST:
        verdict, rule = UNCERTAIN, f"{rule}, which is too wide to tell"
    remarks = []
    if item.spread is None and item.record.method != "fp":
        remarks.append("one seed, so the spread over seeds is not counted")
    note = names.datasets[str(row["task"])][str(row["dataset"])].notes.get(str(row["method"]))
    return Judgement(verdict, gap, rule, tuple(remarks if note is None else [*remarks, note]))


def run_diff(results: Path, show_all: bool, nothing: int = 2) -> int:
    """Compare all records with published numbers, print and write the table, and return the exit code.

    Args:
        results: root of what runs wrote.
        show_all: also list what has no published number.
        nothing: the exit code where nothing is comparable.
    """
    from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

    from benchmarks.results.scores import csv_text, read_records, write_text

    found, problems = read_records(results / "runs")
    records = [record for _, record in found]
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if not records:
        print(
            f"Nothing is comparable yet: nothing is measured under {results / 'runs'}. Run `make reproduce-table` first."
        )
        return nothing
    table = diff(records)
    path = results / "tables" / "diff.csv"
    write_text(path, csv_text(table))
    judged = table[table["verdict"] != NOT_COMPARABLE]
    shown = table if show_all else table[table["published"].notna()]
    if not shown.empty:
        columns = [name for name in COLUMNS if name not in ("task", "dataset", "seeds")]
        print(tabulate(shown[columns].fillna("").values.tolist(), headers=columns, floatfmt=".2f"))
        print()
    hidden = table[~table.index.isin(shown.index)]
    for reason, count in hidden["reason"].value_counts().items():
        print(f"{count} measured values: {reason}.")
    if judged.empty:
        print(
            "Nothing is comparable yet: no measured number is on the same data, weights, settings and bits as a published one. "
            "For that: make reproduce-table TABLE=fimaq IMAGENET=/path/to/imagenet"
        )
        return nothing
    counts = ", ".join(
        f"{count} {verdict}" for verdict, count in judged["verdict"].value_counts().items()
    )
    print(f"{len(judged)} comparisons: {counts}. Table: {path}")
    return 0 if (judged["verdict"] == REPRODUCED).all() else 1
