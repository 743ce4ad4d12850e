"""What a table says below itself: settings, spread, means over models and whether the expected order came out."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.cells import Cell
from benchmarks.tables import Measured, frame, main_metric, markdown, over_seeds, unique, wide, with_bits
from fimaq_core.recipe import METHODS, Recipe, make_recipe
from tasks.common.record import recipe_of

#: Settings named although they are not changed, because numbers depend on them most.
_ALWAYS = ("steps", "batch_size", "calibration_images", "calibration_transform", "lr_alpha", "lr_scale")


def report(title: str, measured: Sequence[Measured], cells: Sequence[Cell], width: int | None = None) -> str:
    """Return the Markdown text for ``cells``: a table a task, and what it rests on.

    Args:
        title: the heading.
        measured: the finished cells.
        cells: the cells the table covers, measured or not.
        width: a terminal's width; a wider table is printed in several parts. None keeps it whole.
    """
    parts = [f"# {title}"]
    for task in unique(cell.task for cell in cells):
        mine = [item for item in measured if item.cell.task == task]
        planned = [cell for cell in cells if cell.task == task]
        if not mine:
            parts.append(f"{task}: nothing is measured yet.")
            continue
        parts.extend(_task_parts(task, mine, planned, width))
    return "\n\n".join(parts) + "\n"


def _task_parts(task: str, mine: Sequence[Measured], planned: Sequence[Cell], width: int | None) -> list[str]:
    table = frame(mine)
    metric = main_metric(task, table)
    table = table[table["metric"] == metric]
    lines = [*_data_lines(mine), *settings_lines(mine), *_spread_lines(table), *order_lines(table)]
    unfinished = len({cell.key for cell in planned}) - len(mine)
    if unfinished > 0:
        lines.append(f"{unfinished} of {len(planned)} cells are not measured: `-`.")
    parts = [
        f"## {task}: {metric} (percent), mean ± sd over seeds",
        *_fitting(wide(table, planned), width),
        "\n".join(f"- {line}" for line in lines),
    ]
    means = mean_over_models(table)
    if not means.empty:
        parts += ["Mean over models:", markdown(means)]
    return parts


def _fitting(table: pd.DataFrame, width: int | None) -> list[str]:
    """Return the table as Markdown, cut between columns into parts that fit ``width``."""
    columns = list(table.columns)
    count = len(columns)
    while width is not None and count > 1 and len(markdown(table[columns[:count]]).split("\n")[0]) > width:
        count -= 1
    return [markdown(table[columns[start : start + count]]) for start in range(0, len(columns), count)]


def _data_lines(mine: Sequence[Measured]) -> list[str]:
    lines = []
    for name, split in sorted({(item.record.dataset.name, item.record.dataset.split) for item in mine}):
        counts = sorted({i.record.n for i in mine if (i.record.dataset.name, i.record.dataset.split) == (name, split)})
        lines.append(f"Data: {name}, split {split}, n = {', '.join(map(str, counts))} samples.")
    return lines


def settings_lines(mine: Sequence[Measured]) -> list[str]:
    """Return the settings of the reconstruction methods, beside each method's released ones where they differ."""
    by_method: dict[str, list[Recipe]] = {}
    for item in mine:
        recipe = recipe_of(item.record)
        if recipe is not None and recipe.reconstruct and recipe.method in METHODS:
            by_method.setdefault(recipe.method, []).append(recipe)
    texts: dict[str, list[str]] = {}
    for method, recipes in by_method.items():
        changed = unique(name for recipe in recipes for name in recipe.changes())
        names = [*_ALWAYS, *(name for name in changed if name not in _ALWAYS)]
        released = make_recipe(method)
        parts = [_setting(name, [getattr(recipe, name) for recipe in recipes], getattr(released, name)) for name in names]
        texts.setdefault(", ".join(parts), []).append(method)
    same = "the same for all methods that reconstruct" if len(texts) == 1 else "not the same for all methods"
    lines = [f"Settings of {', '.join(methods)} ({same}): {text}." for text, methods in texts.items()]
    seeds = sorted({item.record.seed for item in mine if item.record.seed is not None})
    if seeds:
        lines.append(f"Seeds: {', '.join(map(str, seeds))}.")
    return lines


def _setting(name: str, values: Sequence[Any], released: Any) -> str:
    mine = " or ".join(str(value) for value in unique(map(str, values)))
    return f"{name} {mine}" + ("" if mine == str(released) else f" (released: {released})")


def pooled_sd(stats: pd.DataFrame) -> float:
    """Return the standard deviation over seeds pooled over the rows of :func:`over_seeds`; NaN where no row has two seeds."""
    rows = stats[stats["k"] > 1]
    freedom = (rows["k"] - 1).sum()
    return math.sqrt(float(((rows["k"] - 1) * rows["sd"] ** 2).sum()) / freedom) if freedom else math.nan


def _spread_lines(table: pd.DataFrame) -> list[str]:
    stats = over_seeds(table)
    texts = []
    for bits in unique(stats["bits"]):
        here = stats[(stats["bits"] == bits) & (stats["k"] > 1)]
        spreads = [f"{method} {pooled_sd(here[here['method'] == method]):.2f}" for method in unique(here["method"])]
        if spreads:
            texts.append(f"{bits}: {', '.join(spreads)}")
    lines = []
    if texts:
        lines.append(f"Sd over seeds, pooled over models, in points: {'; '.join(texts)}.")
    elif (table["method"] != "fp").any():
        lines.append("Sd over seeds: not known, there is one seed only.")
    low, high = table["stderr"].min(), table["stderr"].max()
    lines.append(
        f"Standard error of one cell from its finite number of samples: {low:.2f} to {high:.2f} points. Methods are measured "
        "on the same samples, so their differences are surer than that."
    )
    return lines


def mean_over_models(table: pd.DataFrame) -> pd.DataFrame:
    """Return methods × bits: the mean over models of the mean over seeds, over the models that all methods have.

    Bits for which no model has all methods are left out, since means over different models do not compare.
    """
    stats = over_seeds(table)
    quantized = stats[stats["method"] != "fp"]
    columns: dict[str, dict[str, str]] = {}
    for bits in unique(quantized["bits"]):
        here = quantized[quantized["bits"] == bits].pivot(index="model", columns="method", values="mean").dropna()
        if len(here):
            columns[f"{bits} ({_count(len(here), 'model')})"] = {str(name): f"{value:.2f}" for name, value in here.mean().items()}
    order = unique(quantized["method"])
    return pd.DataFrame(columns, index=pd.Index(order, name="method")).fillna("-") if columns else pd.DataFrame()


def order_lines(table: pd.DataFrame) -> list[str]:
    """Say whether the methods came out in the expected order at the lowest bits, with numbers."""
    quantized = with_bits(table[table["method"] != "fp"])
    if quantized.empty:
        return []
    lowest = min(unique(quantized["bits"]), key=lambda bits: _width(quantized, bits))
    here = quantized[quantized["bits"] == lowest]
    needed = ["rtn", "brecq", "qdrop", "fimaq"]
    means = here.pivot_table(index="model", columns="method", values="value", aggfunc="mean").reindex(columns=needed).dropna()
    claim = f"Expected order at {lowest} (rtn worst, fimaq not below qdrop and brecq, mean over models)"
    if means.empty:
        absent = [name for name in needed if name not in set(here["method"])]
        return [f"{claim}: not judged, since no model has all four; not fully measured: {', '.join(absent) or 'some cells'}."]
    mean = means.mean()
    worst = all(mean["rtn"] < mean[name] for name in needed[1:])
    first = all(mean["fimaq"] >= mean[name] for name in ("qdrop", "brecq"))
    numbers = ", ".join(f"{name} {mean[name]:.2f}" for name in needed)
    lines = [
        f"{claim}: {'yes' if worst and first else 'NO'} "
        f"(rtn worst: {'yes' if worst else 'no'}; fimaq not below: {'yes' if first else 'no'}): {numbers}."
    ]
    for other in ("qdrop", "brecq"):
        pairs = here[here["model"].isin(means.index)].pivot_table(index=["model", "seed"], columns="method", values="value")
        gaps = (pairs["fimaq"] - pairs[other]).dropna().to_numpy(dtype=float)
        error = f" ± {np.std(gaps, ddof=1) / math.sqrt(len(gaps)):.2f}" if len(gaps) > 1 else ""
        where = f"(mean ± se over {_count(len(gaps), 'pair')} of model and seed)"
        lines.append(f"fimaq - {other} at {lowest}: {gaps.mean():+.2f}{error} points {where}.")
    return lines


def _width(table: pd.DataFrame, bits: str) -> int:
    row = table[table["bits"] == bits].iloc[0]
    return int(row["w_bit"]) + int(row["a_bit"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
