"""Layout of tables: a DataFrame of texts as Markdown or as LaTeX."""

import re
from collections.abc import Sequence
from itertools import groupby

import pandas as pd

#: Characters of a line of \footnotesize in one column of an article.
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
    """Return a table as Markdown, in as few parts as fit the ``width`` of a terminal.

    Args:
        table: texts. A part leaves out the rows that have nothing but blanks and ``–`` in it.
        width: None returns one part.
        words: columns of words, which are aligned left.
    """

    def text(columns: list[str]) -> str:
        part = table[columns]
        part = part[~part.isin(["", "–"]).all(axis=1)]
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
    """Return text that LaTeX prints as it stands; without packages it knows Latin letters only."""

    def plain(sign: str) -> str:
        return sign if sign.isprintable() and ord(sign) < 256 else f"U+{ord(sign):04X}"

    return "".join(_SPECIAL.get(sign, plain(sign)) for sign in re.sub(r"\s+", " ", text))


def _cell(text: str) -> str:
    text = re.sub("^ ", r"\\quad ", escape(text))
    return re.sub(r"^\*\*(.*)\*\*$", r"\\textbf{\1}", text)


def latex(table: pd.DataFrame, caption: str, label: str, notes: str = "") -> str:
    r"""Return a table as LaTeX that needs the package booktabs only. Texts are escaped here.

    Args:
        table: texts; the first two columns hold words. Columns are pairs of heads, and neighbours
            share the first one. A text in the first column begins a block of rows; a row without
            other texts is a heading. ``**70.13**`` is printed in bold, and two
            blanks at the start indent a text.
        caption, notes: texts above and below the table.
        label: name of the label, without ``tab:``.
    """
    heads = [(escape(above), escape(below)) for above, below in table.columns]
    above: list[str] = []
    rules, end = "", 0
    for name, group in groupby(above for above, _ in heads):
        start, width = end + 1, len(list(group))
        end += width
        above += [rf"\multicolumn{{{width}}}{{c}}{{{name}}}"] if name else [""] * width
        rules += rf"\cmidrule(lr){{{start}-{end}}}" if name else ""
    rows, lines = table.to_numpy().tolist(), [" & ".join(above) + r" \\", rules] if rules else []
    lines += [" & ".join(below for _, below in heads) + r" \\", r"\midrule"]
    heading = True  # no rule above the first row, and none between a heading and its block
    for row in rows:
        lines += [r"\midrule"] if row[0] and not heading else []
        heading = bool(row[0]) and not any(row[1:])
        if heading:
            lines.append(rf"\multicolumn{{{len(row)}}}{{l}}{{\emph{{{escape(row[0])}}}}} \\")
        else:
            lines.append(" & ".join(map(_cell, row)) + r" \\")
    columns = zip((below for _, below in table.columns), *rows, strict=True)
    widths = [max(len(text.strip("*")) for text in column) + 2 for column in columns]
    environment, size, space = "table", "footnotesize", 4
    if sum(widths) > _LINE:  # across both columns of a page
        environment, size, space = "table*", "scriptsize", 3
    return "\n".join([
        rf"\begin{{{environment}}}[t]",
        rf"\centering\{size}\setlength{{\tabcolsep}}{{{space}pt}}",
        rf"\caption{{{escape(caption)}}}",
        rf"\label{{tab:{label}}}\smallskip",
        rf"\begin{{tabular}}{{ll{'r' * (len(heads) - 2)}}}",
        r"\toprule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
        *(["", r"\smallskip", escape(notes)] if notes else []),
        rf"\end{{{environment}}}",
    ])  # fmt: skip
