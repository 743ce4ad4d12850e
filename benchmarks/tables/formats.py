"""Formats of finished tables: a DataFrame of texts as Markdown or LaTeX.

Columns are chosen in `summary.py` (grids) and `reproduction.py` (published tables).
"""

import re
from collections.abc import Sequence

import pandas as pd

from benchmarks.console import markdown_cell

#: First line of files with LaTeX tables.
PREAMBLE = r"% Made by python -m benchmarks. In the preamble: \usepackage{booktabs}"
#: Characters that fit in a line of \footnotesize in one column of an article.
_LINE = 80
_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "√": r"\ensuremath{\surd}", "±": r"\ensuremath{\pm}", "→": r"\ensuremath{\to}",
    "↑": r"\ensuremath{\uparrow}", "↓": r"\ensuremath{\downarrow}",
    "×": r"\ensuremath{\times}", "°": r"\ensuremath{^\circ}", "–": "--",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def markdown(table: pd.DataFrame, width: int | None = None, words: Sequence[str] = ()) -> list[str]:
    """Return a table as Markdown, split into parts that fit the ``width`` of a terminal.

    Args:
        table: texts. Each part leaves out rows that contain only blanks and ``–`` there.
        width: number of characters; None returns a single part.
        words: columns of words, which are aligned left.
    """

    def text(columns: list[str]) -> str:
        part = table[columns]
        part = part[~part.isin(["", "–"]).all(axis=1)].map(markdown_cell)
        part = part.rename(index=markdown_cell, columns=markdown_cell)
        sides = ("left", *("left" if name in words else "right" for name in columns))
        return str(part.to_markdown(disable_numparse=True, stralign="right", colalign=sides))

    parts: list[list[str]] = [[]]
    for name in table.columns:
        wider = [*parts[-1], name]
        if parts[-1] and width is not None and len(text(wider).split("\n")[0]) > width:
            parts.append([name])
        else:
            parts[-1] = wider
    return [text(columns) for columns in parts]


def escape(text: str) -> str:
    """Return text that LaTeX prints unchanged. Letters beyond Latin-1 become ``U+0410``."""

    def plain(sign: str) -> str:
        return sign if sign.isprintable() and ord(sign) < 256 else f"U+{ord(sign):04X}"

    return "".join(_SPECIAL.get(sign, plain(sign)) for sign in re.sub(r"\s+", " ", text))


def latex(table: pd.DataFrame, caption: str, label: str, notes: str = "") -> str:
    r"""Return a table as LaTeX that needs only the package booktabs. All texts are escaped.

    Args:
        table: texts; ``**70.13**`` is bold. Columns are names, or pairs of names; neighbours with
            the same first name share a heading. Two blanks indent a word of the index.
        caption, notes: texts above and below the table.
        label: name of the label without ``tab:``.
    """

    def cell(text: str) -> str:
        text = re.sub("^ ", r"\\quad ", escape(text))
        return re.sub(r"^\*\*(.*)\*\*$", r"\\textbf{\1}", text)

    names = [name if isinstance(name, tuple) else ("", name) for name in table.columns]
    heads = [("", str(name)) for name in table.index.names] + names
    flat = table.reset_index()
    columns = zip(heads, flat.to_numpy().T, strict=True)
    width = sum(2 + max(map(len, (below, *texts))) for (_, below), texts in columns)
    kind, size = ("table*", r"\scriptsize") if width > _LINE else ("table", r"\footnotesize")
    heads = [(escape(above), escape(below)) for above, below in heads]
    grouped = any(above for above, _ in heads)
    flat.columns = pd.Index(heads if grouped else [below for _, below in heads])
    style = flat.map(cell).style.hide(axis="index")
    text = style.to_latex(
        hrules=True,
        column_format="l" * table.index.nlevels + "r" * len(names),
        multicol_align="c",
        environment=kind,
        position="t",
        position_float="centering",
        caption=escape(caption),
        label=f"tab:{re.sub('[^A-Za-z0-9-]+', '-', label)}",
    )
    text = text.replace(r"\centering", rf"\centering{size}\setlength{{\tabcolsep}}{{3pt}}", 1)
    text = text.replace(r"\begin{tabular}", "\\smallskip\n\\begin{tabular}", 1)
    below = f"\n\\smallskip\n{escape(notes)}\n" if notes else ""
    return text.replace(rf"\end{{{kind}}}", rf"{below}\end{{{kind}}}").rstrip("\n")
