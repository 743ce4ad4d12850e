"""Orders known from the literature: whether the methods came out in them here, a line each, with numbers."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from benchmarks.results.outcomes import Outcomes, Paired, by_seed, paired
from benchmarks.tables import Measured, quantized, unique

#: Methods that stop after calibration (or a closed-form refit of the weights), and methods that optimise block by block.
CALIBRATION_ONLY = ("rtn", "repq", "ptq4vit", "adalog", "erq")
RECONSTRUCTION = ("brecq", "qdrop", "pdquant", "aphq", "fimaq", "lsvit", "adalog-recon")

#: Bits at which nothing should fall below rounding to nearest, and by how many standard errors it may.
_MILD_BITS, _ERRORS = "w4a4", 2.0


def order_lines(table: pd.DataFrame, measured: Sequence[Measured] = (), mark: str = "") -> list[str]:
    """Say whether the methods came out in the expected orders; an order none of whose methods is measured says nothing.

    Args:
        table: rows of one section, scope and metric (see :func:`benchmarks.tables.frame`), one variant a method.
        measured: the cells behind it, for comparisons sample by sample.
        mark: of the scope, for the lines.
    """
    rows = quantized(table)
    if rows.empty:
        return []
    lowest = min(unique(rows["bits"]), key=lambda bits: _width(rows, bits))
    here, where = rows[rows["bits"] == lowest], f"{lowest}{mark}"
    return [*_calibration_lines(here, where), *_fimaq_lines(here, where), *_rounding_lines(measured, mark)]


def _means(here: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Return models × ``methods``: means over seeds, of the models that have all these methods."""
    means = here.pivot_table(index="model", columns="method", values="value", aggfunc="mean")
    return means.reindex(columns=list(methods)).dropna()


def _calibration_lines(here: pd.DataFrame, where: str) -> list[str]:
    present = set(here["method"])
    plain, trained = ([name for name in names if name in present] for names in (CALIBRATION_ONLY, RECONSTRUCTION))
    if not plain or not trained:
        return []
    claim = f"Calibration alone below every reconstruction at {where} (mean over models)"
    means = _means(here, [*plain, *trained])
    if means.empty:
        return [f"{claim}: not judged, since no model has all of {', '.join([*plain, *trained])}."]
    mean = means.mean()
    best, worst = mean[plain].idxmax(), mean[trained].idxmin()
    return [
        f"{claim}: {'yes' if mean[best] < mean[worst] else 'NO'}: best of {', '.join(plain)}: {best} {mean[best]:.2f}; "
        f"worst of {', '.join(trained)}: {worst} {mean[worst]:.2f} ({count(len(means), 'model')})."
    ]


def _fimaq_lines(here: pd.DataFrame, where: str) -> list[str]:
    needed = ["rtn", "brecq", "qdrop", "fimaq"]
    if len(set(needed) & set(here["method"])) < 2:
        return []
    means = _means(here, needed)
    claim = f"Expected order at {where} (rtn worst, fimaq not below qdrop and brecq, mean over models)"
    if means.empty:
        absent = [name for name in needed if name not in set(here["method"])]
        return [f"{claim}: not judged, since no model has all four; not fully measured: {', '.join(absent) or 'some cells'}."]
    mean = means.mean()
    worst = all(mean["rtn"] < mean[name] for name in needed[1:])
    first = all(mean["fimaq"] >= mean[name] for name in ("qdrop", "brecq"))
    numbers = ", ".join(f"{name} {mean[name]:.2f}" for name in needed)
    lines = [
        f"{claim}: {'yes' if worst and first else 'NO'} "
        f"(rtn worst: {'yes' if worst else 'no'}; fimaq not below: {'yes' if first else 'no'}): {numbers}."
    ]
    for other in ("qdrop", "brecq"):
        pairs = here[here["model"].isin(means.index)].pivot_table(index=["model", "seed"], columns="method", values="value")
        gaps = (pairs["fimaq"] - pairs[other]).dropna().to_numpy(dtype=float)
        error = f" ± {np.std(gaps, ddof=1) / math.sqrt(len(gaps)):.2f}" if len(gaps) > 1 else ""
        basis = f"(mean ± se over {count(len(gaps), 'pair')} of model and seed)"
        lines.append(f"fimaq - {other} at {where}: {gaps.mean():+.2f}{error} points {basis}.")
    return lines


def _rounding_lines(measured: Iterable[Measured], mark: str) -> list[str]:
    groups: dict[tuple[str, str], list[Measured]] = {}
    for item in measured:
        if item.cell.bits == _MILD_BITS:
            groups.setdefault((item.cell.subject, item.cell.method), []).append(item)
    pairs = [(subject, method) for subject, method in groups if method != "rtn" and (subject, "rtn") in groups]
    if not pairs:
        return []
    rounded: dict[str, dict[int, Outcomes]] = {}
    results: dict[tuple[str, str], Paired | None] = {}
    for subject, method in pairs:
        if subject not in rounded:
            rounded = {subject: by_seed(groups[subject, "rtn"])}  # methods of a subject come together; none is read twice
        results[subject, method] = paired(by_seed(groups[subject, method]), rounded[subject])
    judged = {key: result for key, result in results.items() if result is not None}
    claim = f"No method below rtn at {_MILD_BITS}{mark} by more than two paired standard errors, on any model"
    if not judged:
        return [f"{claim}: not judged, since there are no per-sample outcomes of the same samples and seeds."]
    texts = {
        (subject, method): f"{method} on {subject} {result.difference:+.2f} ± {result.se:.2f}"
        for (subject, method), result in judged.items()
    }
    below = [key for key, result in judged.items() if result.difference < -_ERRORS * result.se]
    nearest = min(judged, key=lambda key: judged[key].difference)
    rest = len(results) - len(judged)
    left_out = f"; {rest} more not judged for lack of per-sample outcomes" if rest else ""
    verdict = f"NO: {', '.join(texts[key] for key in below)}" if below else f"yes: lowest is {texts[nearest]}"
    return [f"{claim}: {verdict} points ({count(len(judged), 'comparison')}{left_out})."]


def _width(table: pd.DataFrame, bits: str) -> int:
    row = table[table["bits"] == bits].iloc[0]
    return int(row["w_bit"]) + int(row["a_bit"])


def count(number: int, noun: str) -> str:
    """Return ``1 model``, ``2 models``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
