"""Mean corruption error of quantized models against the full-precision model."""

import pandas as pd

from benchmarks.results import scores
from benchmarks.results.scores import Cells, Items
from benchmarks.tables.summary import wide
from tasks.common.data.elsewhere import corruption_of

TITLE = "Mean corruption error in percent of the full-precision model's, mean ± sd over seeds"
NOTE = (
    "Errors of a corruption are added over its severities, divided by those of the full-precision "
    "model on the same images, and averaged over corruptions: 100 is as robust as full precision, "
    "also where both are wrong. Only models measured on all of these corruptions are shown."
)


def corruption_tables(measured: Items, cells: Cells) -> dict[str, tuple[str, pd.DataFrame]]:
    """Return the tables of mean corruption errors by data set, each with a line on its content.

    After Hendrycks and Dietterich (ICLR 2019), with the model in full precision in place of
    AlexNet. A table has rows × ``subject bits``.
    """
    planned: dict[str, list[tuple[str, str]]] = {}  # corruptions and severities by data set
    of_section = {}  # data set, corruption and severity
    for item in measured:
        if (found := corruption_of(item.record.dataset.name)) is not None:
            of_section[item.cell.section] = found
            planned.setdefault(found[0], []).append(found[1:])
    if not of_section:
        return {}
    table = scores.scores(item for item in measured if item.cell.section in of_section)
    table = table[(table["metric"] == "top1") & (table["point"] == "")]
    parts = [corruption_of(name) for name in table["dataset"]]
    table = table.assign(
        **{name: [part[place] for part in parts if part] for place, name in enumerate(_PARTS)},
        error=100 - table["value"],
        full=100 - table["fp_value"],
    )
    tables = {}
    for name, rows in table.groupby("data", sort=False):
        whole = set(planned[str(name)])
        errors = mean_errors(rows, len(whole))
        own = [cell for cell in cells if of_section.get(cell.section, ("",))[0] == name]
        kinds = scores.count(len({one for one, _ in whole}), "corruption")
        text = f"{kinds}, {scores.count(len(whole), 'data set')}"
        if not errors.empty:
            tables[str(name)] = text, wide(errors, own)
    return tables


#: Columns of the parts of a data set's name.
_PARTS = ("data", "corruption", "severity")
#: Columns of a model with its settings.
_MODEL = ["subject", "mark", "method", "row", "bits", "seed"]


def mean_errors(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the mean corruption error (``value``) of each model that has ``count`` rows.

    ``rows`` has a model's columns and, per corruption and severity, its ``error`` and the error
    ``full`` of the full-precision model, both in percent.
    """
    sums = rows.groupby([*_MODEL, "corruption"], sort=False, dropna=False)
    found = sums.agg(error=("error", "sum"), full=("full", "sum"), n=("error", "size"))
    found["value"] = 100 * found["error"] / found["full"]
    models = found.groupby(_MODEL, sort=False, dropna=False)
    means = models.agg(value=("value", "mean"), n=("n", "sum")).reset_index()
    return means[means["n"] == count].assign(stderr=0.0)
