"""Table of exports to ONNX: size, integer coverage and speed beside the score."""

import math

import pandas as pd

from benchmarks.console import share_text
from benchmarks.grid.cell import EXPORT
from benchmarks.results import scores
from benchmarks.results.scores import Items
from tasks.common.fidelity import UNITS

TITLE = "Exports to ONNX, run by onnxruntime"
NOTE = (
    "Integer coverage: share of the multiply-adds with two quantized operands that run in "
    "integers. Speed: time of the float32 export divided by the time of this file, on the machine "
    "that measured it. `- simulated`: difference to the score of the simulated model."
)
#: Names of the columns by those of :func:`benchmarks.results.scores.record_scores`.
_HEADS = {
    "size_mb": "size (MB)",
    "integer_coverage": "integer coverage (%)",
    "speed": "speed (x float32)",
}


def export_table(metric: str, measured: Items) -> pd.DataFrame:
    """Return one row of texts per exported model, method and bits; empty without exports.

    Returns:
        Means over seeds: the score, its difference to the simulated model, size, integer coverage
        and speed; ``-`` for values that were not measured.
    """
    table = scores.scores(measured, fidelity=True)
    table = table[table["metric"] == metric]
    names, rows = ["subject", "method", "bits"], {}
    form = ".3g" if metric in UNITS else ".2f"
    simulated = dict(list(table[table["point"] == ""].groupby(names)))
    for name, own in table[table["point"] == EXPORT].groupby(names, sort=False):
        gaps = scores.differences(own, simulated.get(name, table[:0]))
        rows[" ".join(name)] = {
            metric: scores.value_text(own["value"].mean(), own["value"].std(), metric),
            "- simulated": f"{gaps.mean():+{form}}" if len(gaps) else "-",
            **{head: _text(column, own[column].mean()) for column, head in _HEADS.items()},
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("export")


def _text(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return share_text(value) if name == "integer_coverage" else f"{value:.2f}"
