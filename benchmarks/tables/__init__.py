"""Tables of scores: Markdown, LaTeX, ablations, expected orders."""

from benchmarks.results.scores import (
    COLUMNS,
    FULL,
    Measured,
    collect,
    csv_text,
    in_order,
    is_percent,
    main_metric,
    over_seeds,
    sample_counts,
    unique,
    value_text,
    write_text,
)
from benchmarks.tables.markdown import cut, fitting, frame, markdown, quantized, wide, with_bits

__all__ = [
    "COLUMNS",
    "FULL",
    "Measured",
    "collect",
    "csv_text",
    "cut",
    "fitting",
    "frame",
    "in_order",
    "is_percent",
    "main_metric",
    "markdown",
    "over_seeds",
    "quantized",
    "sample_counts",
    "unique",
    "value_text",
    "wide",
    "with_bits",
    "write_text",
]
