"""Published minutes of the full protocol."""

import pandas as pd

from benchmarks.names import PUBLISHED, load_names

#: The study that timed FIMA-Q (on one H800, all of quantization), and its name for the method.
STUDY, METHOD = "time_h800", "FIMA-Q"


def published_minutes(model: str) -> float | None:
    """Minutes that the study names for ``model``, or None."""
    table = pd.read_csv(PUBLISHED / "cost.csv")
    rows = table[(table["study"] == STUDY) & (table["method"] == METHOD) & (table["metric"] == "minutes")]
    names = load_names().models
    for name, value in zip(rows["model"], rows["value"], strict=True):
        if name in names and names[name].id == model:
            return float(value)
    return None
