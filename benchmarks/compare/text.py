"""Printed form of a comparison: a table with its verdicts, or JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compare.judge import Finding, Judged
from benchmarks.compare.sides import Pair, Pairing, Run
from benchmarks.compare.statistics import RESAMPLES
from benchmarks.terminal import printable


def report(pairing: Pairing, judged: Sequence[Judged], level: float) -> str:
    """Return the table, one verdict per row, and what was left out."""
    from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

    several = len(judged) > 1
    found = [(item.pair, finding) for item in judged for finding in item.findings]
    rows = [{"pair": pair.label, **_row(pair, finding, level)} for pair, finding in found]
    if not several:
        for row in rows:
            del row["pair"], row["Holm p"]
    verdicts = [
        f"- {f'{pair.label}, ' if several else ''}{finding.metric}: {finding.verdict(level)}."
        for pair, finding in found
    ]
    align = {"disable_numparse": True, "stralign": "right", "colalign": ("left",)}
    text = "\n".join([
        f"A: {_side(pairing.first.path, [item.pair.a for item in judged])}",
        f"B: {_side(pairing.second.path, [item.pair.b for item in judged])}",
        f"Data: {'; '.join(dict.fromkeys(item.pair.key['data'] for item in judged))}",
        "",
        tabulate(rows, headers="keys", **align),
        "",
        *verdicts,
        "",
        *_notes(judged, several),
        *_left_out(pairing, judged),
    ])  # fmt: skip
    # Names come from records, which may come from elsewhere.
    return "\n".join(printable(line) for line in text.split("\n"))


def _side(path: Path, runs: Sequence[Mapping[int | None, Run]]) -> str:
    found = list({run.path: run for by_seed in runs for run in by_seed.values()}.values())
    if len(found) == 1:
        return f"{found[0].label}: {path}"
    methods = ", ".join(dict.fromkeys(run.record.method for run in found))
    return f"{methods} ({len(found)} records): {path}"


def _row(pair: Pair, finding: Finding, level: float) -> dict[str, str]:
    effect, images = finding.effect, f"{finding.samples} ({finding.clusters} images)"
    words = f"g {effect['cohens_g']:+.2f}, {effect['only_a']}:{effect['only_b']}" if effect else "-"
    return {
        "metric": finding.metric,
        "A": f"{finding.a:.2f}",
        "B": f"{finding.b:.2f}",
        "A - B": f"{finding.difference:+.2f}",
        f"{100 * level:g} % interval": f"[{finding.low:.2f}, {finding.high:.2f}]",
        "se": f"{finding.se:.2f}",
        "p": _p(finding.p),
        "Holm p": _p(finding.holm),
        "effect": words,
        "test": finding.test,
        "seeds": ", ".join(map(str, _seeds(pair))) or "-",
        "n": images if finding.samples != finding.clusters else str(finding.samples),
    }


def _p(p: float | None) -> str:
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _seeds(pair: Pair) -> list[int]:
    return [seed for seed in pair.a if seed is not None]


def _notes(judged: Sequence[Judged], several: bool) -> list[str]:
    tests = {finding.test for item in judged for finding in item.findings}
    notes = []
    if "McNemar" in tests:
        notes.append(
            "McNemar: exact binomial test of the samples that one method only got right (A:B); "
            "interval by Newcombe's method 10; g is the share of A's among them less a half."
        )
    if "bootstrap" in tests:
        notes.append(
            f"Bootstrap: {RESAMPLES} resamples of images, seeded; BCa interval and the p that "
            f"belongs to it, at least {2 / (RESAMPLES + 1):.1g}."
        )
    if any(len(item.pair.a) > 1 for item in judged):
        notes.append("Where there are several seeds, each sample's score is their mean.")
    notes.append(
        "All this is about the finite number of samples; how much other seeds would differ it "
        "does not know."
    )
    if several:
        notes.append(
            "Holm p: corrected for the number of pairs of the same metric; verdicts are by it."
        )
    return notes


def _left_out(pairing: Pairing, judged: Sequence[Judged]) -> list[str]:
    lines = [f"Not compared: {it.pair.label}: {it.problem}" for it in judged if it.problem]
    for name, other, side, alone in (
        ("A", "B", pairing.first, pairing.alone_a),
        ("B", "A", pairing.second, pairing.alone_b),
    ):
        lines += [f"Without a partner in {other}: {r.label} ({r.path.parent})" for r in alone]
        lines += [f"Not read in {name}: {problem}" for problem in side.problems]
    for item in judged:
        runs = (*item.pair.a.values(), *item.pair.b.values())
        if len({run.record.weights.sha256 for run in runs}) > 1:
            lines.append(f"Note: {item.pair.label}: the records are of different weight files.")
    return lines


def json_text(pairing: Pairing, judged: Sequence[Judged], level: float) -> str:
    """Return everything as JSON; points are points, None is null."""

    def side(runs: Mapping[int | None, Run]) -> list[dict[str, Any]]:
        distinct = {run.path: run.record for run in runs.values()}
        return [
            {**{name: getattr(record, name) for name in ("method", "variant", "seed")},
             "record": str(path)}
            for path, record in distinct.items()
        ]  # fmt: skip

    content = {
        "level": level,
        "resamples": RESAMPLES,
        "pairs": [
            {
                "label": item.pair.label,
                "shared": dict(item.pair.key),
                "seeds": _seeds(item.pair),
                "a": side(item.pair.a),
                "b": side(item.pair.b),
                "metrics": [
                    {**asdict(it), "better": it.better(level), "verdict": it.verdict(level)}
                    for it in item.findings
                ],
                "problem": item.problem,
            }
            for item in judged
        ],
        "without_partner": {
            "a": [str(run.path) for run in pairing.alone_a],
            "b": [str(run.path) for run in pairing.alone_b],
        },
        "not_read": {"a": list(pairing.first.problems), "b": list(pairing.second.problems)},
    }
    return json.dumps(content, indent=1, allow_nan=False)
