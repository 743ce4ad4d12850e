"""Tables as papers print them: LaTeX with booktabs; methods by bits are rows, models columns."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import pandas as pd

from benchmarks.grid.cell import Cell
from benchmarks.grid.schema import Axes
from benchmarks.results.scores import (
    FULL,
    PAIRS,
    Cells,
    Items,
    by_section,
    in_order,
    is_percent,
    main_metric,
    over_seeds,
    sample_counts,
    scores,
    seeds_of,
    unique,
)
from benchmarks.tables.ablation import methods_on
from benchmarks.tables.markdown import runs

#: Characters of \footnotesize in a line of an article, and rows of its page. A larger table is
#: continued in another.
WIDTH, HEIGHT = 80, 46
#: Characters of a number, and of the space between columns.
_NUMBER, _SPACE = 6, 2
#: Size and space between columns by environment.
_SIZES = {"table": ("footnotesize", 4), "table*": ("scriptsize", 3)}
_ROW, _COLUMN = ["scope", "bits", "name"], ["model", "metric"]

_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "√": r"\ensuremath{\surd}", "±": r"\ensuremath{\pm}", "→": r"\ensuremath{\to}",
    "↑": r"\ensuremath{\uparrow}", "↓": r"\ensuremath{\downarrow}",
    "×": r"\ensuremath{\times}",
    "°": r"\ensuremath{^\circ}", "–": "--",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip
#: Heads of metrics where papers print another name.
_HEADS = {
    "top1": "Top-1", "AP_box": "AP box", "AP_mask": "AP mask",
    "i2t_R@1": "I→T", "t2i_R@1": "T→I",
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
    rules: Mapping[int, list[str]] | None = None,
    environment: str = "table",
    notes: str = "",
) -> str:
    """Return a table as LaTeX that needs the package booktabs only; texts are escaped here.

    Args:
        heads: of the columns, the two of words first; neighbours share the first part.
        rows: texts by column; two blanks at the start stay a space.
        caption, notes: texts above and below.
        label: without ``tab:``.
        best: (rows, columns) bool, printed bold.
        rules: LaTeX lines above rows, by their index.
        environment: ``table`` or ``table*`` (both columns of a page).
    """
    names = [(escape(above), escape(below)) for above, below in heads]
    two = any(above for above, _ in names)
    columns = pd.MultiIndex.from_tuples(names) if two else [below for _, below in names]
    texts = [[re.sub("^ ", r"\\quad ", escape(text)) for text in row] for row in rows]
    style = pd.DataFrame(texts, columns=columns).style.hide(axis="index")
    if best is not None:
        style = style.apply(lambda _: np.where(best, "textbf:--rwrap;", ""), axis=None)
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
    body = lines.index(r"\midrule") + 1
    for row, above in sorted((rules or {}).items(), reverse=True):
        lines[body + row : body + row] = above
    if two:
        line, place = "", 1
        for name, run in groupby(above for above, _ in names):
            end = place + len(list(run))
            line += rf"\cmidrule(lr){{{place}-{end - 1}}}" if name else ""
            place = end
        lines.insert(lines.index(r"\toprule") + 2, line)
    size, space = _SIZES[environment]
    start = lines.index(r"\centering") + 1
    lines.insert(start + 2, r"\smallskip")
    lines[start:start] = [rf"\{size}", rf"\setlength{{\tabcolsep}}{{{space}pt}}"]
    lines[-1:] = ["", r"\smallskip", escape(notes), lines[-1]] if notes else [lines[-1]]
    return "\n".join(lines)


def report(name: str, measured: Items, cells: Cells, axes: Axes | None = None) -> str:
    """Return the LaTeX of ``cells``: a table per measured section, axis and method."""
    made = "% Made by python -m benchmarks from its records."
    parts = [f"{made} In the preamble: \\usepackage{{booktabs}}"]
    for section, mine, planned in by_section(measured, cells):
        if not mine:
            continue
        known = scores(mine)
        main, label = main_metric(planned[0].task, known), f"{name}-{section}"
        pairs = [pair for pair in PAIRS.values() if set(pair) <= set(known["metric"])]
        metrics = unique([main, *(metric for pair in pairs for metric in pair)])
        own = [cell for cell in planned if not cell.point]
        methods = in_order(cell.method for cell in own)
        rows = [(cell, method) for method in methods for cell in own if cell.method == method]
        parts += _tables(label, section, "Method", metrics, rows, mine)
        for axis, points in (axes or {}).items():
            for method in methods_on(axis, planned):
                here = [cell for cell in planned if cell.method == method]
                rows = [(c, point) for point in points for c in here if (axis, point) in c.places]
                if {cell.key for cell, _ in rows} & {item.cell.key for item in mine}:
                    about = f"{section}, {method} with one setting changed at a time ({axis})"
                    parts += _tables(f"{label}-{axis}-{method}", about, axis, [main], rows, mine)
    return "\n\n".join(parts) + "\n"


def _tables(
    label: str,
    about: str,
    head: str,
    metrics: Sequence[str],
    planned: Sequence[tuple[Cell, str]],
    measured: Items,
) -> list[str]:
    """Return a table in as many parts as :data:`WIDTH` and :data:`HEIGHT` ask for.

    ``planned`` has its cells, measured or not, with the names of their rows, in the order of rows.
    """
    done = {item.cell.key: item for item in measured}
    found = [(done[cell.key], name) for cell, name in planned if cell.key in done]
    table = scores(item for item, _ in found)
    table["name"] = [found[place][1] for place in table["item"]]
    keys = [(cell.scope, cell.bits, name) for cell, name in planned]
    order = [unique(parts) for parts in zip(*keys, strict=True)]

    def place(row: tuple[str, str, str]) -> tuple[object, ...]:
        # What has no bits comes first.
        return (
            row[1] != FULL,
            *(names.index(part) for names, part in zip(order, row, strict=True)),
        )

    rows, models = sorted(set(keys), key=place), unique(cell.model for cell, _ in planned)
    means = over_seeds(table, [*_ROW, *_COLUMN]).pivot(index=_ROW, columns=_COLUMN, values="mean")
    means = means.reindex(
        index=pd.MultiIndex.from_tuples(rows, names=_ROW),
        columns=pd.MultiIndex.from_product([models, metrics], names=_COLUMN),
    )
    several = len({scope for scope, bits, _ in rows if bits != FULL}) > 1
    first = len("Bits (W/A)") + _SPACE + max(len(_name(*row, several)) for row in rows)
    heads = sum(max(_NUMBER, len(_HEADS.get(name, name))) + _SPACE for name in metrics)
    least = heads if len(metrics) > 1 else _NUMBER + _SPACE
    groups = [list(group) for _, group in groupby(rows, lambda row: row[:2])]
    caption = _caption(about, metrics, [item for item, _ in found] or measured, rows)
    safe, texts = re.sub(r"[^A-Za-z0-9-]+", "-", label), []

    def fits(run: list[str]) -> bool:
        return first + sum(max(len(model) + _SPACE, least) for model in run) <= WIDTH

    for chosen in runs(models, fits):
        for part in runs(groups, lambda run: sum(map(len, run)) <= HEIGHT):
            body = means.loc[[row for group in part for row in group], chosen]
            again, number = (" Continued.", f"-{len(texts) + 1}") if texts else ("", "")
            texts.append(_part(body, head, caption + again, safe + number, several))
    return texts


def _part(means: pd.DataFrame, head: str, caption: str, label: str, several: bool) -> str:
    """Return one part of a table; ``several`` scopes have headings of their own."""
    heads = [(model, _HEADS.get(metric, metric)) for model, metric in means.columns]
    if means.columns.get_level_values("metric").nunique() == 1:
        heads = [("", model) for model, _ in heads]
    texts = means.map(lambda mean: "--" if pd.isna(mean) else f"{mean:.2f}")
    blocks = means.groupby(level=["scope", "bits"], sort=False)
    quantized = means.index.get_level_values("bits") != FULL
    # Equal texts are bold alike, where there is a choice.
    best = (texts == blocks.transform("max").map("{:.2f}".format)) & (blocks.transform("count") > 1)
    bold = np.pad((best & quantized[:, None]).to_numpy(), ((0, 0), (2, 0)))
    rows: list[list[str]] = []
    rules: dict[int, list[str]] = {}
    last, heading = None, ""
    for (scope, bits, name), own in zip(means.index, texts.to_numpy().tolist(), strict=True):
        new, last = (scope, bits) != last, (scope, bits)
        if new:
            rules[len(rows)] = [r"\midrule"] if rows else []
            if several and bits != FULL and scope != heading:
                heading = scope
                wide = rf"\multicolumn{{{len(heads) + 2}}}{{l}}{{\emph{{{escape(scope)}}}}} \\"
                rules[len(rows)].append(wide)
        size = "32/32" if bits == FULL else bits.removeprefix("w").replace("a", "/")
        rows.append([size if new else "", _name(scope, bits, name, several), *own])
    return typeset([("", "Bits (W/A)"), ("", head), *heads], rows, caption, label, bold, rules)


def _name(scope: str, bits: str, name: str, several: bool) -> str:
    if name == "fp":
        return "Full precision"
    return f"{name} [{scope}]" if several and scope and bits == FULL else name


def _caption(
    about: str, metrics: Sequence[str], items: Items, rows: Sequence[tuple[str, str, str]]
) -> str:
    sets = unique(
        f"{data.name}, split {data.split} ({sample_counts(n, data.captions)})"
        for n, data in ((item.record.n, item.record.dataset) for item in items)
    )
    seeds = seeds_of(items)
    scopes = unique(item.cell.scope for item in items if item.cell.scope)
    unit = " in percent" if all(map(is_percent, metrics)) else ""
    heads = ", ".join(_HEADS.get(metric, metric) for metric in metrics)
    parts = [f"{about}: {heads}{unit} on {'; '.join(sets)}."]
    if len(scopes) == 1:
        parts.append(f"Quantized parts of each model: {scopes[0]}.")
    if len(seeds) > 1:
        parts.append(f"Mean over seeds {', '.join(map(str, seeds))}, as far as each was run.")
    elif seeds:
        parts.append(f"Seed {seeds[0]}.")
    parts.append("Quantization is simulated.")
    if any(bits != FULL for _, bits, _ in rows):
        parts.append("Bold: the best at these bits.")
    return " ".join(parts)
