"""LaTeX of a grid as papers print it: methods by bits are rows, models are columns."""

import re
from collections.abc import Sequence

import pandas as pd

from benchmarks.grid.cell import Cell
from benchmarks.grid.schema import Axes
from benchmarks.results import scores
from benchmarks.results.scores import FULL, PAIRS, Cells, Items, unique
from benchmarks.tables.ablation import methods_on
from benchmarks.tables.layout import latex

_ROW, _COLUMN = ["scope", "bits", "name"], ["model", "metric"]
#: Heads of metrics that papers print under another name.
_HEADS = {
    "top1": "Top-1", "AP_box": "AP box", "AP_mask": "AP mask",
    "i2t_R@1": "I→T", "t2i_R@1": "T→I",
}  # fmt: skip


def grid_latex(name: str, measured: Items, cells: Cells, axes: Axes | None = None) -> str:
    """Return the LaTeX of ``cells``: a table per measured section, axis and method."""
    made = "% Made by python -m benchmarks from its records."
    parts = [f"{made} In the preamble: \\usepackage{{booktabs}}"]
    for section, mine, planned in scores.by_section(measured, cells):
        if not mine:
            continue
        known = scores.scores(mine)
        main, label = scores.main_metric(planned[0].task, known), f"{name}-{section}"
        pairs = [pair for pair in PAIRS.values() if set(pair) <= set(known["metric"])]
        metrics = unique([main, *(metric for pair in pairs for metric in pair)])
        own = [cell for cell in planned if not cell.point]
        methods = scores.in_order(cell.method for cell in own)
        rows = [(cell, method) for method in methods for cell in own if cell.method == method]
        parts.append(_table(label, section, "Method", metrics, rows, mine))
        for axis, points in (axes or {}).items():
            for method in methods_on(axis, planned):
                here = [cell for cell in planned if cell.method == method]
                rows = [(c, point) for point in points for c in here if (axis, point) in c.places]
                if {cell.key for cell, _ in rows} & {item.cell.key for item in mine}:
                    about = f"{section}, {method} with one setting changed at a time ({axis})"
                    parts.append(
                        _table(f"{label}-{axis}-{method}", about, axis, [main], rows, mine)
                    )
    return "\n\n".join(parts) + "\n"


def _table(
    label: str,
    about: str,
    head: str,
    metrics: Sequence[str],
    planned: Sequence[tuple[Cell, str]],
    measured: Items,
) -> str:
    """Return a table of ``planned`` cells, each with the name of its row, in the order of rows."""
    done = {item.cell.key: item for item in measured}
    found = [(done[cell.key], name) for cell, name in planned if cell.key in done]
    table = scores.scores(item for item, _ in found)
    table["name"] = [found[place][1] for place in table["item"]]
    means = scores.over_seeds(table, [*_ROW, *_COLUMN])
    means = means.pivot(index=_ROW, columns=_COLUMN, values="mean")
    keys = dict.fromkeys((cell.scope, cell.bits, name) for cell, name in planned)
    rows = pd.DataFrame(list(keys), columns=_ROW)
    # Full precision first; then in order of appearance by scope, bits and name.
    places = rows.apply(lambda column: pd.factorize(column)[0]).assign(low=rows["bits"] != FULL)
    rows = rows.loc[places.sort_values(["low", *_ROW]).index]
    models = unique(cell.model for cell, _ in planned)
    means = means.reindex(
        index=pd.MultiIndex.from_frame(rows),
        columns=pd.MultiIndex.from_product([models, metrics], names=_COLUMN),
    )
    texts = means.map(lambda mean: "--" if pd.isna(mean) else f"{mean:.2f}")
    blocks = means.groupby(level=["scope", "bits"], sort=False)
    # Means that print alike are bold alike; full precision and a mean without rival are not.
    best = (texts == blocks.transform("max").map("{:.2f}".format)) & (blocks.transform("count") > 1)
    best = best.mul(means.index.get_level_values("bits") != FULL, axis=0)
    texts = texts.where(~best, "**" + texts + "**")

    several = rows.loc[rows["bits"] != FULL, "scope"].nunique() > 1
    heads = [(model, _HEADS.get(metric, metric)) for model, metric in means.columns]
    if len(metrics) == 1:
        heads = [("", model) for model, _ in heads]
    body: list[list[str]] = []
    block, heading = None, ""
    for (scope, bits, name), own in zip(texts.index, texts.to_numpy().tolist(), strict=True):
        if several and bits != FULL and scope != heading:
            body.append([scope, "", *[""] * len(own)])
            heading = scope
        size = "32/32" if bits == FULL else bits.removeprefix("w").replace("a", "/")
        shown = f"{name} [{scope}]" if several and scope and bits == FULL else name
        shown = "Full precision" if name == "fp" else shown
        body.append([size if (scope, bits) != block else "", shown, *own])
        block = (scope, bits)
    columns = pd.MultiIndex.from_tuples([("", "Bits (W/A)"), ("", head), *heads])
    caption = _caption(about, metrics, [item for item, _ in found] or measured)
    if (rows["bits"] != FULL).any():
        caption += " Bold: the best at these bits."
    label = re.sub(r"[^A-Za-z0-9-]+", "-", label)
    return latex(pd.DataFrame(body, columns=columns), caption, label)


def _caption(about: str, metrics: Sequence[str], items: Items) -> str:
    records = [item.record for item in items]
    sets = unique(
        f"{r.dataset.name}, split {r.dataset.split} "
        f"({scores.sample_counts(r.n, r.dataset.captions)})"
        for r in records
    )
    seeds = scores.seeds_of(items)
    scopes = unique(item.cell.scope for item in items if item.cell.scope)
    unit = " in percent" if all(map(scores.is_percent, metrics)) else ""
    heads = ", ".join(_HEADS.get(metric, metric) for metric in metrics)
    parts = [f"{about}: {heads}{unit} on {'; '.join(sets)}."]
    if len(scopes) == 1:
        parts.append(f"Quantized parts of each model: {scopes[0]}.")
    if len(seeds) > 1:
        parts.append(f"Mean over seeds {', '.join(map(str, seeds))}, as far as each was run.")
    elif seeds:
        parts.append(f"Seed {seeds[0]}.")
    return " ".join([*parts, "Quantization is simulated."])
