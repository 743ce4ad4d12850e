"""Printed form of a comparison: a table with its verdicts, or JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.compare.judge import Judged, MetricComparison, p_text
from benchmarks.compare.pairs import Pair, RecordFile, Side, alone
from benchmarks.compare.statistics import RESAMPLES
from benchmarks.console import printable


def comparison_text(a: Side, b: Side, judged: Sequence[Judged], level: float) -> str:
    """Return the table, one verdict per row, and the records that were left out."""
    from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

    several = len(judged) > 1
    rows, verdicts = [], []
    for item in judged:
        for found in item.metrics:
            row = {"pair": item.pair.label, **_row(item.pair, found, level)}
            rows.append({k: v for k, v in row.items() if several or k not in ("pair", "Holm p")})
            name = f"{item.pair.label}, {found.metric}" if several else found.metric
            verdicts.append(f"- {name}: {found.verdict(level)}.")
    align = {"disable_numparse": True, "stralign": "right", "colalign": ("left",)}
    text = "\n".join([
        f"A: {_side(a, [file for item in judged for file in item.pair.a.values()])}",
        f"B: {_side(b, [file for item in judged for file in item.pair.b.values()])}",
        f"Data: {'; '.join(dict.fromkeys(item.pair.key['data'] for item in judged))}",
        "", tabulate(rows, headers="keys", **align),
        "", *verdicts, "", *_notes(judged), *_left_out(a, b, judged),
    ])  # fmt: skip
    # Names come from records, which may come from elsewhere.
    return "\n".join(printable(line) for line in text.split("\n"))


def _side(side: Side, files: Sequence[RecordFile]) -> str:
    found = list({file.path: file for file in files}.values())
    methods = ", ".join(dict.fromkeys(file.record.method for file in found))
    name = found[0].label if len(found) == 1 else f"{methods} ({len(found)} records)"
    return f"{name}: {side.path}"


def _row(pair: Pair, found: MetricComparison, level: float) -> dict[str, str]:
    effect, images = found.effect, f" ({found.clusters} images)"
    words = f"g {effect['cohens_g']:+.2f}, {effect['only_a']}:{effect['only_b']}" if effect else "-"
    return {
        "metric": found.metric,
        "A": f"{found.a:.2f}",
        "B": f"{found.b:.2f}",
        "A - B": f"{found.difference:+.2f}",
        f"{100 * level:g} % interval": f"[{found.low:.2f}, {found.high:.2f}]",
        "se": f"{found.se:.2f}",
        "p": p_text(found.p),
        "Holm p": p_text(found.holm),
        "effect": words,
        "test": found.test,
        "seeds": ", ".join(str(seed) for seed in pair.a if seed is not None) or "-",
        "n": f"{found.samples}{images if found.samples != found.clusters else ''}",
    }


def _notes(judged: Sequence[Judged]) -> list[str]:
    tests, notes = {found.test for item in judged for found in item.metrics}, []
    if "McNemar" in tests:
        notes.append(
            "McNemar: exact binomial test of the samples that only one method got right (A:B); "
            "interval by Newcombe's method 10; g is A's share of these samples less a half."
        )
    if "bootstrap" in tests:
        notes.append(
            f"Bootstrap: {RESAMPLES} resamples of images, seeded; BCa interval and the p that "
            f"belongs to it, at least {2 / (RESAMPLES + 1):.1g}."
        )
    if any(len(item.pair.a) > 1 for item in judged):
        notes.append("Where there are several seeds, each sample's score is their mean.")
    notes.append("Errors and p cover the finite number of samples only, not other seeds.")
    if len(judged) > 1:
        notes.append("Holm p: corrected for the number of pairs of a metric; verdicts use it.")
    return notes


def _left_out(a: Side, b: Side, judged: Sequence[Judged]) -> list[str]:
    pairs = [item.pair for item in judged]
    lines = [f"Not compared: {item.pair.label}: {item.problem}" for item in judged if item.problem]
    for name, other, side in (("A", "B", a), ("B", "A", b)):
        for file in alone(side, pairs):
            lines.append(f"Without a partner in {other}: {file.label} ({file.path.parent})")
        lines += [f"Not read in {name}: {problem}" for problem in side.problems]
    for pair in pairs:
        files = (*pair.a.values(), *pair.b.values())
        if len({file.record.weights.sha256 for file in files}) > 1:
            lines.append(f"Note: {pair.label}: the records are of different weight files.")
    return lines


def json_text(a: Side, b: Side, judged: Sequence[Judged], level: float) -> str:
    """Return everything as JSON; points are points, None is null."""
    sides = {"a": a, "b": b}

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
                {**asdict(found), "better": found.better(level), "verdict": found.verdict(level)}
                for found in item.metrics
            ],
            "problem": item.problem,
        }
        for item in judged
    ]
    found = [item.pair for item in judged]
    lone = {name: [str(file.path) for file in alone(side, found)] for name, side in sides.items()}
    content = {
        "level": level,
        "resamples": RESAMPLES,
        "pairs": pairs,
        "without_partner": lone,
        "not_read": {name: list(side.problems) for name, side in sides.items()},
    }
    return json.dumps(content, indent=1, allow_nan=False)
