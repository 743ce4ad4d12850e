"""Tables as papers print them: LaTeX with booktabs. Methods by bits are rows, models are columns."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from benchmarks.axes import Axes
from benchmarks.cells import Cell
from benchmarks.results.scores import (
    FULL,
    PAIRS,
    Measured,
    in_order,
    is_percent,
    main_metric,
    over_seeds,
    sample_counts,
    scores,
    unique,
)
from benchmarks.tables.ablation import methods_on
from benchmarks.tables.markdown import runs

#: Text of what is not measured.
MISSING = "--"
#: Characters of \footnotesize in a line of an article, and rows of its page. A larger table is
#: continued in another.
WIDTH, HEIGHT = 80, 46
#: Characters of a number, and of the space between columns.
_NUMBER, _SPACE = 6, 2
#: Size and space between columns by environment.
_SIZES = {"table": ("footnotesize", 4), "table*": ("scriptsize", 3)}

_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "√": r"\ensuremath{\surd}", "±": r"\ensuremath{\pm}", "→": r"\ensuremath{\to}",
    "↑": r"\ensuremath{\uparrow}", "↓": r"\ensuremath{\downarrow}", "×": r"\ensuremath{\times}",
    "°": r"\ensuremath{^\circ}", "–": "--",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip
#: Heads of metrics where papers print another name.
_HEADS = {
    "top1": "Top-1", "AP_box": "AP box", "AP_mask": "AP mask", "i2t_R@1": "I→T", "t2i_R@1": "T→I",
}  # fmt: skip


def escape(text: str) -> str:
    """Return text such that LaTeX prints it as it is."""

    def plain(sign: str) -> str:
        # LaTeX without packages stops at other characters.
        return sign if sign.isprintable() and ord(sign) < 256 else f"U+{ord(sign):04X}"

    return "".join(_SPECIAL.get(sign, plain(sign)) for sign in re.sub(r"\s+", " ", text))


def typeset(
    heads: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
    caption: str,
    label: str,
    best: np.ndarray | None = None,
    rules: Mapping[int, str] | None = None,
    environment: str = "table",
    notes: str = "",
) -> str:
    """Return a table as LaTeX that needs the package booktabs only.

    Args:
        heads: of the columns, the two of words first; neighbours share the first part.
        rows: texts by column; all texts are escaped here.
        caption, notes: texts above and below.
        label: without ``tab:``.
        best: (rows, columns) bool, printed bold.
        rules: LaTeX lines above rows, by their index.
        environment: ``table`` or ``table*`` (both columns of a page).
    """
    texts = [[_spaced(text) for text in row] for row in rows]
    names = [tuple(map(escape, head)) for head in heads]
    two = any(above for above, _ in names)
    columns = pd.MultiIndex.from_tuples(names) if two else pd.Index([below for _, below in names])
    style = pd.DataFrame(texts, columns=columns).style.hide(axis="index")
    if best is not None:
        style = style.apply(lambda _: np.where(best, "textbf:--rwrap;", ""), axis=None)
    size, space = _SIZES[environment]
    lines = style.to_latex(
        hrules=True,
        column_format="ll" + "r" * (len(heads) - 2),
        multicol_align="c",
        environment=environment,
        position="t",
        position_float="centering",
        caption=escape(caption),
        label=f"tab:{label}",
    ).splitlines()
    first = lines.index(r"\midrule") + 1
    for row, rule in sorted((rules or {}).items(), reverse=True):
        lines.insert(first + row, rule)
    if two:
        lines.insert(lines.index(r"\toprule") + 2, _rules_below([above for above, _ in names]))
    place = lines.index(r"\centering") + 1
    lines[place:place] = [rf"\{size}", rf"\setlength{{\tabcolsep}}{{{space}pt}}"]
    lines.insert(next(i for i, line in enumerate(lines) if r"\label" in line) + 1, r"\smallskip")
    if notes:
        lines[-1:] = ["", rf"\smallskip {escape(notes)}", lines[-1]]
    return "\n".join(lines)


def _spaced(text: str) -> str:
    """Escape a text; two blanks before it stay a space."""
    return rf"\quad {escape(text.strip())}" if text.startswith("  ") else escape(text)


def _rules_below(above: Sequence[str]) -> str:
    """Return a rule below each head that several columns share."""
    starts = [i for i, name in enumerate(above) if name and (i == 0 or above[i - 1] != name)]
    ends = [
        next((j for j in range(i, len(above)) if above[j] != above[i]), len(above)) for i in starts
    ]
    return "".join(rf"\cmidrule(lr){{{i + 1}-{j}}}" for i, j in zip(starts, ends, strict=True))


def report(
    name: str, measured: Sequence[Measured], cells: Sequence[Cell], axes: Axes | None = None
) -> str:
    """Return the LaTeX of ``cells``: a table per measured section, and per axis and method of it.

    Args:
        name: of the profile, for labels.
        measured: the finished cells.
        cells: the cells that the tables cover, measured or not.
        axes: the grid's axes, for the order of their points.
    """
    parts = [
        "% Made by python -m benchmarks from its records. In the preamble: \\usepackage{booktabs}"
    ]
    for section in unique(cell.section for cell in cells):
        mine = [item for item in measured if item.cell.section == section]
        planned = [cell for cell in cells if cell.section == section]
        if not mine:
            continue
        known = scores(mine)
        metrics = [main_metric(planned[0].task, known)]
        for pair in PAIRS.values():
            metrics = unique([*metrics, *pair]) if set(pair) <= set(known["metric"]) else metrics
        own = [cell for cell in planned if not cell.point]
        items = [item for item in mine if not item.cell.point]
        names = in_order(cell.method for cell in own)
        caption = _caption(section, metrics, items or mine, own)
        label = f"{name}-{section}"
        parts += _tables(label, caption, "Method", metrics, items, own, names, _method)
        for axis, points in (axes or {}).items():

            def places(cell: Cell, axis: str = axis) -> list[str]:
                return [point for name, point in cell.places if name == axis]

            for method in methods_on(axis, planned):
                here = [cell for cell in planned if cell.method == method and places(cell)]
                items = [item for item in mine if item.cell.method == method and places(item.cell)]
                if not items:
                    continue
                about = f"{section}, {method} with one setting changed at a time ({axis})"
                caption = _caption(about, metrics[:1], items, here)
                label, names = f"{name}-{section}-{axis}-{method}", list(points)
                parts += _tables(label, caption, axis, metrics[:1], items, here, names, places)
    return "\n\n".join(parts) + "\n"


def _method(cell: Cell) -> list[str]:
    return [cell.method]


def _tables(
    label: str,
    caption: str,
    head: str,
    metrics: Sequence[str],
    items: Sequence[Measured],
    cells: Sequence[Cell],
    names: Sequence[str],
    names_of: Callable[[Cell], list[str]],
) -> list[str]:
    """Return one table, in as many parts as :data:`WIDTH` and :data:`HEIGHT` ask for.

    Args:
        label, caption: of the table.
        head: above the names of rows.
        metrics: the metrics of each model.
        items: the finished cells of the table.
        cells: its cells, measured or not.
        names: of rows, in order.
        names_of: the rows of a cell.
    """
    table = scores(items)
    table["name"] = [names_of(items[place].cell) for place in table["item"]]
    index, columns = ["scope", "bits", "name"], ["model", "metric"]
    means = over_seeds(table.explode("name"), [*index, *columns]).pivot(
        index=index, columns=columns, values="mean"
    )
    # What has no bits comes first.
    planned = {(cell.scope, cell.bits, name): None for cell in cells for name in names_of(cell)}
    scopes = unique(scope for scope, bits, _ in planned if bits != FULL)
    widths = unique(bits for _, bits, _ in planned if bits != FULL)
    blocks = [("", FULL), *((scope, FULL) for scope in scopes if scope)]
    blocks += [(scope, bits) for scope in scopes for bits in widths]
    rows = [(*block, name) for block in blocks for name in names if (*block, name) in planned]
    models = unique(cell.model for cell in cells)
    means = means.reindex(
        index=pd.MultiIndex.from_tuples(rows, names=index),
        columns=pd.MultiIndex.from_product([models, metrics], names=columns),
    )
    first = len("Bits (W/A)") + _SPACE + max(len(_name(*row, scopes)) for row in rows)
    heads = sum(max(_NUMBER, len(_HEADS.get(name, name))) + _SPACE for name in metrics)
    beside = heads if len(metrics) > 1 else _NUMBER + _SPACE
    groups = [[row for row in rows if row[:2] == block] for block in blocks]
    parts = [
        (chosen, [row for group in part for row in group])
        for chosen in runs(
            models, lambda run: first + sum(max(len(m) + _SPACE, beside) for m in run) <= WIDTH
        )
        for part in runs(
            [group for group in groups if group], lambda run: sum(map(len, run)) <= HEIGHT
        )
    ]
    safe = re.sub(r"[^A-Za-z0-9-]+", "-", label)
    texts = []
    for number, (chosen, part) in enumerate(parts):
        own = f"{caption} Continued." if number else caption
        mark = f"{safe}-{number + 1}" if number else safe
        texts.append(_part(means.loc[part, chosen], head, own, mark, scopes))
    return texts


def _part(means: pd.DataFrame, head: str, caption: str, label: str, scopes: Sequence[str]) -> str:
    """Return one part of a table: rows by scope, bits and name, columns by model and metric."""
    several = means.columns.get_level_values(1).nunique() > 1
    heads = [
        (model if several else "", _HEADS.get(metric, metric) if several else model)
        for model, metric in means.columns
    ]
    texts = means.map(lambda mean: MISSING if pd.isna(mean) else f"{mean:.2f}")
    blocks = means.groupby(level=[0, 1], sort=False)
    tops = blocks.transform("max").map("{:.2f}".format)
    quantized = means.index.get_level_values("bits") != FULL
    # Equal texts are bold alike, where there is a choice.
    best = (texts == tops) & (blocks.transform("count") > 1) & quantized[:, None]
    rows, rules, last, scope = [], {}, None, ""
    for row, (where, bits, name) in enumerate(means.index):
        new = (where, bits) != last
        if new:
            rules[row] = r"\midrule" if row else ""
            if bits != FULL and len(scopes) > 1 and where != scope:
                scope = where
                wide = rf"\multicolumn{{{len(heads) + 2}}}{{l}}{{\emph{{{escape(scope)}}}}} \\"
                rules[row] = f"{rules[row]}\n{wide}".strip()
        last = (where, bits)
        size = "32/32" if bits == FULL else bits.removeprefix("w").replace("a", "/")
        rows.append([size if new else "", _name(where, bits, name, scopes), *texts.iloc[row]])
    rules = {row: rule for row, rule in rules.items() if rule}
    bold = np.hstack([np.zeros((len(rows), 2), dtype=bool), best.to_numpy()])
    return typeset([("", "Bits (W/A)"), ("", head), *heads], rows, caption, label, bold, rules)


def _name(scope: str, bits: str, name: str, scopes: Sequence[str]) -> str:
    if name == "fp":
        return "Full precision"
    return f"{name} [{scope}]" if scope and bits == FULL and len(scopes) > 1 else name


def _caption(
    about: str, metrics: Sequence[str], items: Sequence[Measured], cells: Sequence[Cell]
) -> str:
    sets = unique(
        f"{item.record.dataset.name}, split {item.record.dataset.split} "
        f"({sample_counts(item.record.n, item.record.dataset.captions)})"
        for item in items
    )
    seeds = sorted({item.record.seed for item in items if item.record.seed is not None})
    scopes = unique(item.cell.scope for item in items if item.cell.scope)
    heads = ", ".join(_HEADS.get(metric, metric) for metric in metrics)
    unit = " in percent" if all(is_percent(metric) for metric in metrics) else ""
    parts = [f"{about}: {heads}{unit} on {'; '.join(sets)}."]
    if len(scopes) == 1:
        parts.append(f"Quantized parts of each model: {scopes[0]}.")
    if len(seeds) > 1:
        parts.append(f"Mean over seeds {', '.join(map(str, seeds))}, as far as each was run.")
    elif seeds:
        parts.append(f"Seed {seeds[0]}.")
    parts.append("Quantization is simulated.")
    if any(cell.bits != FULL for cell in cells):
        parts.append("Bold: the best at these bits.")
    return " ".join(parts)
