"""Output of the command ``compare``: a table with verdicts, or JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.compare.alike import NOTED, differing
from benchmarks.compare.pair_tests import ComparedPair, MetricComparison, p_text
from benchmarks.compare.pairs import Pair, RecordFile, Side, alone
from benchmarks.compare.statistics import RESAMPLES


def comparison_text(a: Side, b: Side, compared: Sequence[ComparedPair], level: float) -> str:
    """Return the table, one verdict per row, notes, and the records that were left out."""
    from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

    several = len(compared) > 1
    rows, verdicts = [], []
    for item in compared:
        for found in item.metrics:
            row = {"pair": item.pair.label, **_row(item.pair, found, level)}
            rows.append({k: v for k, v in row.items() if several or k not in ("pair", "Holm p")})
            name = f"{item.pair.label}, {found.metric}" if several else found.metric
            verdicts.append(f"- {name}: {found.verdict(level)}.")
    align = {"disable_numparse": True, "stralign": "right", "colalign": ("left",)}
    return "\n".join([
        f"A: {_side(a, [file for item in compared for file in item.pair.a.values()])}",
        f"B: {_side(b, [file for item in compared for file in item.pair.b.values()])}",
        f"Data: {'; '.join(dict.fromkeys(item.pair.key['data'] for item in compared))}",
        "", tabulate(rows, headers="keys", **align),
        "", *verdicts, "", *_notes(compared), *_left_out(a, b, compared),
    ])  # fmt: skip


def _side(side: Side, files: Sequence[RecordFile]) -> str:
    found = list({file.path: file for file in files}.values())
    methods = ", ".join(dict.fromkeys(file.record.method for file in found))
    name = found[0].label if len(found) == 1 else f"{methods} ({len(found)} records)"
    return f"{name}: {side.path}"


def _row(pair: Pair, found: MetricComparison, level: float) -> dict[str, str]:
    effect, images = found.effect, f" ({found.clusters} images)"
    form = found.form
    words = f"g {effect['cohens_g']:+.2f}, {effect['only_a']}:{effect['only_b']}" if effect else "-"
    return {
        "metric": found.metric,
        "A": f"{found.a:{form}}",
        "B": f"{found.b:{form}}",
        "A - B": f"{found.difference:+{form}}",
        f"{100 * level:g} % interval": f"[{found.low:{form}}, {found.high:{form}}]",
        "se": f"{found.se:{form}}",
        "p": p_text(found.p),
        "Holm p": p_text(found.holm),
        "effect": words,
        "test": found.test,
        "seeds": ", ".join(str(seed) for seed in pair.a if seed is not None) or "-",
        "n": f"{found.samples}{images if found.samples != found.clusters else ''}",
    }


def _notes(compared: Sequence[ComparedPair]) -> list[str]:
    tests, notes = {found.test for item in compared for found in item.metrics}, []
    if "McNemar" in tests:
        notes.append(
            "McNemar: exact binomial test of the samples that only one method got right (A:B); "
            "interval by Newcombe's method 10; g is A's share of these samples minus 0.5."
        )
    if "bootstrap" in tests:
        notes.append(
            f"Bootstrap: {RESAMPLES} resamples of images with a fixed seed; BCa interval and its "
            f"p, which is at least {2 / (RESAMPLES + 1):.1g}."
        )
    if any(len(item.pair.a) > 1 for item in compared):
        notes.append("With several seeds, the score of a sample is its mean over seeds.")
    notes.append("Errors and p cover the finite number of samples, but not the spread over seeds.")
    if len(compared) > 1:
        notes.append("Holm p: corrected for the number of pairs of a metric; verdicts use it.")
    return notes


def _left_out(a: Side, b: Side, compared: Sequence[ComparedPair]) -> list[str]:
    pairs, failed = [item.pair for item in compared], [item for item in compared if item.problem]
    lines = [f"Not compared: {item.pair.label}: {item.problem}" for item in failed]
    for name, other, side in (("A", "B", a), ("B", "A", b)):
        for file in alone(side, pairs):
            lines.append(f"Without a partner in {other}: {file.label} ({file.path.parent})")
        lines += [f"Not read in {name}: {problem}" for problem in side.problems]
    for pair in pairs:
        if apart := differing(pair.records, NOTED):
            lines.append(f"Note: {pair.label}: the records differ in {apart}.")
    return lines


def json_text(a: Side, b: Side, compared: Sequence[ComparedPair], level: float) -> str:
    """Return the comparison as JSON. Values are in points."""
    sides, found = {"a": a, "b": b}, [item.pair for item in compared]

    def records(files: Mapping[int | None, RecordFile]) -> list[dict[str, Any]]:
        distinct = {str(file.path): file.record for file in files.values()}
        return [
            {"method": r.method, "variant": r.variant, "seed": r.seed, "record": path}
            for path, r in distinct.items()
        ]

    pairs = [
        {
            "label": item.pair.label,
            "shared": dict(item.pair.key),
            "seeds": [seed for seed in item.pair.a if seed is not None],
            "a": records(item.pair.a),
            "b": records(item.pair.b),
            "metrics": [
                {**asdict(one), "better": one.better(level), "verdict": one.verdict(level)}
                for one in item.metrics
            ],
            "problem": item.problem,
        }
        for item in compared
    ]
    content = {
        "level": level,
        "resamples": RESAMPLES,
        "pairs": pairs,
        "without_partner": {
            name: [str(file.path) for file in alone(side, found)] for name, side in sides.items()
        },
        "not_read": {name: list(side.problems) for name, side in sides.items()},
    }
    return json.dumps(content, indent=1, allow_nan=False)
