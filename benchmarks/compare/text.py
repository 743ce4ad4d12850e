"""Printed form of a comparison: a table with its verdicts, or JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.compare.judge import Judged, MetricComparison, p_text
from benchmarks.compare.pairs import Pair, Pairing, RecordFile, Side
from benchmarks.compare.statistics import RESAMPLES
from benchmarks.console import printable


def comparison_text(pairing: Pairing, judged: Sequence[Judged], level: float) -> str:
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
        f"A: {_side(pairing.a, [file for item in judged for file in item.pair.a.values()])}",
        f"B: {_side(pairing.b, [file for item in judged for file in item.pair.b.values()])}",
        f"Data: {'; '.join(dict.fromkeys(item.pair.key['data'] for item in judged))}",
        "", tabulate(rows, headers="keys", **align),
        "", *verdicts, "", *_notes(judged), *_left_out(pairing, judged),
    ])  # fmt: skip
    # Names come from records, which may come from elsewhere.
    return "\n".join(printable(line) for line in text.split("\n"))


def _side(side: Side, files: Sequence[RecordFile]) -> str:
    found = list({file.path: file for file in files}.values())
    methods = ", ".join(dict.fromkeys(file.record.method for file in found))
    name = found[0].label if len(found) == 1 else f"{methods} ({len(found)} records)"
    return f"{name}: {side.path}"


def _row(pair: Pair, found: MetricComparison, level: float) -> dict[str, str]:
    effect = found.effect
    words = f"g {effect['cohens_g']:+.2f}, {effect['only_a']}:{effect['only_b']}" if effect else "-"
    alone = found.samples == found.clusters
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
        "n": f"{found.samples}" if alone else f"{found.samples} ({found.clusters} images)",
    }


def _notes(judged: Sequence[Judged]) -> list[str]:
    tests = {found.test for item in judged for found in item.metrics}
    notes = {
        "McNemar: exact binomial test of the samples that one method only got right (A:B); "
        "interval by Newcombe's method 10; g is the share of A's among them less a "
        "half.": "McNemar" in tests,
        f"Bootstrap: {RESAMPLES} resamples of images, seeded; BCa interval and the p that belongs "
        f"to it, at least {2 / (RESAMPLES + 1):.1g}.": "bootstrap" in tests,
        "Where there are several seeds, each sample's score is their mean.": any(
            len(item.pair.a) > 1 for item in judged
        ),
        "All this is about the finite number of samples; it does not know how much other seeds "
        "would differ.": True,
        "Holm p: corrected for the number of pairs of the same metric; verdicts are by it.": (
            len(judged) > 1
        ),
    }
    return [note for note, shown in notes.items() if shown]


def _left_out(pairing: Pairing, judged: Sequence[Judged]) -> list[str]:
    lines = [f"Not compared: {item.pair.label}: {item.problem}" for item in judged if item.problem]
    for name, other, side in (("A", "B", pairing.a), ("B", "A", pairing.b)):
        for file in side.alone:
            lines.append(f"Without a partner in {other}: {file.label} ({file.path.parent})")
        lines += [f"Not read in {name}: {problem}" for problem in side.problems]
    for item in judged:
        files = (*item.pair.a.values(), *item.pair.b.values())
        if len({file.record.weights.sha256 for file in files}) > 1:
            lines.append(f"Note: {item.pair.label}: the records are of different weight files.")
    return lines


def json_text(pairing: Pairing, judged: Sequence[Judged], level: float) -> str:
    """Return everything as JSON; points are points, None is null."""

    def pair(item: Judged) -> dict[str, Any]:
        sides = {}
        for name, files in (("a", item.pair.a), ("b", item.pair.b)):
            distinct = {file.path: file.record for file in files.values()}
            sides[name] = [
                {"method": r.method, "variant": r.variant, "seed": r.seed, "record": str(path)}
                for path, r in distinct.items()
            ]
        return {
            "label": item.pair.label,
            "shared": dict(item.pair.key),
            "seeds": [seed for seed in item.pair.a if seed is not None],
            **sides,
            "metrics": [
                {**asdict(found), "better": found.better(level), "verdict": found.verdict(level)}
                for found in item.metrics
            ],
            "problem": item.problem,
        }

    both = {"a": pairing.a, "b": pairing.b}
    content = {
        "level": level,
        "resamples": RESAMPLES,
        "pairs": [pair(item) for item in judged],
        "without_partner": {k: [str(file.path) for file in s.alone] for k, s in both.items()},
        "not_read": {name: list(side.problems) for name, side in both.items()},
    }
    return json.dumps(content, indent=1, allow_nan=False)
