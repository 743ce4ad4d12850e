"""Orders of methods that the literature leads to expect: one line with numbers on each."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.compare import alike
from benchmarks.results import scores
from benchmarks.results.outcomes import CompareError, Paired, compare
from benchmarks.results.scores import FULL, Items, Measured, count

#: Bits at which no method should be worse than rounding to nearest by _ERRORS standard errors.
_MILD_BITS, _ERRORS = "w4a4", 2.0


def order_lines(table: pd.DataFrame, measured: Items = (), mark: str = "") -> list[str]:
    """Return one line per expected order that has measured methods.

    A model is left out, with a line, if its records differ in data, weights or calibration data.

    Args:
        table: scores of one section, scope (``mark``) and metric, with one variant per method. The
            column ``item`` is the index into ``measured``.
        measured: cells for comparisons sample by sample.
    """
    rows, apart = table[table["bits"] != FULL], []
    for model, own in rows.groupby("model", sort=False) if measured else ():
        same = [measured[place].record for place in own["item"].unique()]
        if unlike := alike.differing(same, ("data", *alike.SHARED)):
            apart.append(
                f"Expected orders leave out {model}{mark}: its records differ in {unlike}."
            )
            rows = rows[rows["model"] != model]
    if rows.empty:
        return apart
    lowest = rows.loc[(rows["w_bit"] + rows["a_bit"]).idxmin(), "bits"]
    here, where = rows[rows["bits"] == lowest], f"{lowest}{mark}"
    items = [measured[place] for place in rows["item"].unique()] if measured else []
    return [
        *apart,
        *_calibration_lines(here, where),
        *_fimaq_lines(here, where),
        *_rounding_lines(items, mark),
    ]


def _means(here: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Return models × ``methods``: means over seeds, for the models that have all methods."""
    means = here.pivot_table(index="model", columns="method", values="value", aggfunc="mean")
    return means.reindex(columns=list(methods)).dropna()


def _calibration_lines(here: pd.DataFrame, where: str) -> list[str]:
    present = set(here["method"])
    plain = [name for name in scores.CALIBRATION_ONLY if name in present]
    trained = [name for name in scores.RECONSTRUCTION if name in present]
    if not plain or not trained:
        return []
    claim = f"Calibration alone below every reconstruction at {where} (mean over models)"
    means = _means(here, [*plain, *trained])
    if means.empty:
        listed = ", ".join([*plain, *trained])
        return [f"{claim}: not judged, since no model has all of {listed}."]
    mean = means.mean()
    best, worst = mean[plain].idxmax(), mean[trained].idxmin()
    return [
        f"{claim}: {'yes' if mean[best] < mean[worst] else 'NO'}: best of {', '.join(plain)}: "
        f"{best} {mean[best]:.2f}; worst of {', '.join(trained)}: {worst} {mean[worst]:.2f} "
        f"({count(len(means), 'model')})."
    ]


def _fimaq_lines(here: pd.DataFrame, where: str) -> list[str]:
    needed, present = ["rtn", "brecq", "qdrop", "fimaq"], set(here["method"])
    if len(set(needed) & present) < 2:
        return []
    order = "rtn worst, fimaq not below qdrop and brecq, mean over models"
    claim, means = f"Expected order at {where} ({order})", _means(here, needed)
    if means.empty:
        absent = ", ".join(name for name in needed if name not in present) or "some cells"
        return [f"{claim}: not judged, since no model has all four; not fully measured: {absent}."]
    mean = means.mean()
    worst = mean["rtn"] < mean[needed[1:]].min()
    first = mean["fimaq"] >= mean[["qdrop", "brecq"]].max()
    numbers = ", ".join(f"{name} {mean[name]:.2f}" for name in needed)
    lines = [
        f"{claim}: {'yes' if worst and first else 'NO'} (rtn worst: {'yes' if worst else 'no'}; "
        f"fimaq not below: {'yes' if first else 'no'}): {numbers}."
    ]
    whole = here[here["model"].isin(means.index)]
    for other in ("qdrop", "brecq"):
        mine, theirs = (whole[whole["method"] == name] for name in ("fimaq", other))
        gaps = scores.differences(mine, theirs)
        basis = f"(mean ± se over {count(len(gaps), 'pair')} of model and seed)"
        lines.append(f"fimaq - {other} at {where}: {scores.difference_text(gaps)} points {basis}.")
    return lines


def _rounding_lines(items: Items, mark: str) -> list[str]:
    """Return the line on each method against rtn, compared on the same samples of each subject."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for item in items:
        if item.cell.bits == _MILD_BITS:
            groups.setdefault((item.cell.subject, item.cell.method), []).append(item)
    judged: dict[str, Paired] = {}
    reasons: dict[str, list[str]] = {}  # names of comparisons by the reason why they are left out
    for (subject, method), mine in groups.items():
        name = f"{method} on {subject}"
        if method == "rtn" or (subject, "rtn") not in groups:
            continue
        try:
            judged[name] = compare(mine, groups[subject, "rtn"])
        except CompareError as error:
            reasons.setdefault(str(error), []).append(name)
            continue
        for reason in judged[name].left_out:
            reasons.setdefault(f"{reason} for some seeds", []).append(name)
    if not judged and not reasons:
        return []
    claim = f"No method below rtn at {_MILD_BITS}{mark} by more than two paired standard errors, "
    claim += "on any model"
    why = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in reasons.items())
    if not judged:
        return [f"{claim}: not judged ({why})."]
    texts = {name: f"{name} {r.difference:+.2f} ± {r.se:.2f}" for name, r in judged.items()}
    below = [texts[name] for name, r in judged.items() if r.difference < -_ERRORS * r.se]
    nearest = texts[min(judged, key=lambda name: judged[name].difference)]
    verdict = f"NO: {', '.join(below)}" if below else f"yes: lowest is {nearest}"
    left_out = f"; not compared: {why}" if why else ""
    return [f"{claim}: {verdict} points ({count(len(judged), 'comparison')}{left_out})."]
