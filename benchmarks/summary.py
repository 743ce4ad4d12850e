"""A grid's text: its tables and what they say below themselves: settings, spread, means over models, expected orders."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from benchmarks.ablation import axis_parts
from benchmarks.axes import Axes
from benchmarks.cells import Cell
from benchmarks.marks import MARKS, marks
from benchmarks.orders import count, order_lines
from benchmarks.tables import FULL, Measured, fitting, frame, in_order, main_metric, markdown, over_seeds, quantized, unique, wide
from fimaq_core.recipe import METHODS, Recipe, make_recipe
from tasks.common.record import recipe_of

#: Settings named although they are not changed, because numbers depend on them most.
_ALWAYS = ("steps", "batch_size", "calibration_images", "calibration_transform", "lr_alpha", "lr_scale")

#: Those of methods that reconstruct MLPs, and of those that reconstruct nothing else.
_ALWAYS_MLP = ("mlp_steps", "mlp_lr")
_ALWAYS_MLP_ONLY = ("batch_size", "calibration_images", "calibration_transform", *_ALWAYS_MLP)


def report(
    title: str, measured: Sequence[Measured], cells: Sequence[Cell], width: int | None = None, axes: Axes | None = None
) -> str:
    """Return the Markdown text for ``cells``: a table a task, what it rests on, and a table an axis.

    Args:
        title: the heading.
        measured: the finished cells.
        cells: the cells the table covers, measured or not.
        width: a terminal's width; a wider table is printed in several parts. None keeps it whole.
        axes: the grid's axes, for the order of their tables; None for grids without.
    """
    parts = [f"# {title}"]
    for task in unique(cell.task for cell in cells):
        mine = [item for item in measured if item.cell.task == task]
        planned = [cell for cell in cells if cell.task == task]
        if not mine:
            parts.append(f"{task}: nothing is measured yet.")
            continue
        parts.extend(_task_parts(task, mine, planned, width, axes or {}))
    return "\n\n".join(parts) + "\n"


def _task_parts(task: str, mine: Sequence[Measured], planned: Sequence[Cell], width: int | None, axes: Axes) -> list[str]:
    metric = main_metric(task, frame(mine))
    # The main table and its lines are about the grid's own settings; axis points have tables of their own.
    own, own_cells = [item for item in mine if not item.cell.point], [cell for cell in planned if not cell.point]
    table = frame(own)
    table = table[table["metric"] == metric]
    lines = [*_data_lines(mine), *settings_lines(own), *_spread_lines(table), *order_lines(table, own)]
    unfinished = len({cell.key for cell in planned}) - len(mine)
    if unfinished > 0:
        lines.append(f"{unfinished} of {len(planned)} cells are not measured: `-`.")
    parts = [
        f"## {task}: {metric} (percent), mean ± sd over seeds",
        *fitting(marks(own_cells).join(wide(table, own_cells)), width, MARKS),
        "\n".join(f"- {line}" for line in lines),
    ]
    means = mean_over_models(table)
    if not means.empty:
        parts += ["Mean over models:", markdown(means)]
    return [*parts, *axis_parts(axes, metric, mine, planned, width)]


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
        if recipe is not None and (recipe.reconstruct or recipe.reconstruct_mlp) and recipe.method in METHODS:
            by_method.setdefault(recipe.method, []).append(recipe)
    texts: dict[str, list[str]] = {}
    for method, recipes in by_method.items():
        changed = unique(name for recipe in recipes for name in recipe.changes())
        always = _ALWAYS if recipes[0].reconstruct else _ALWAYS_MLP_ONLY
        if recipes[0].reconstruct and recipes[0].reconstruct_mlp:
            always += _ALWAYS_MLP
        names = [*always, *(name for name in changed if name not in always)]
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
    if table.empty:
        return []
    stats = over_seeds(table)
    texts = []
    for bits in unique(stats["bits"]):
        here = stats[(stats["bits"] == bits) & (stats["k"] > 1)]
        spreads = [f"{method} {pooled_sd(here[here['method'] == method]):.2f}" for method in in_order(here["method"])]
        if spreads:
            texts.append(f"{'full precision' if bits == FULL else bits}: {', '.join(spreads)}")
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
    stats = over_seeds(quantized(table))
    columns: dict[str, dict[str, str]] = {}
    for bits in unique(stats["bits"]):
        here = stats[stats["bits"] == bits].pivot(index="model", columns="method", values="mean").dropna()
        if len(here):
            columns[f"{bits} ({count(len(here), 'model')})"] = {str(name): f"{value:.2f}" for name, value in here.mean().items()}
    order = in_order(stats["method"])
    return pd.DataFrame(columns, index=pd.Index(order, name="method")).fillna("-") if columns else pd.DataFrame()
