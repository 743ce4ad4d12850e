"""What a comparison prints: a table with its verdicts, or JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compare.bootstrap import RESAMPLES
from benchmarks.compare.judge import Finding, Judged
from benchmarks.compare.sides import Pair, Pairing, Run
from benchmarks.terminal import printable


def report(pairing: Pairing, judged: Sequence[Judged], level: float) -> str:
    """Return the table, a verdict a row of it, and what was left out."""
    from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

    several = len(judged) > 1
    headers = ["metric", "A", "B", "A - B", f"{100 * level:g} % interval", "se", "p", "effect", "test", "seeds", "n"]
    if several:
        headers = ["pair", *headers[:7], "Holm p", *headers[7:]]
    rows, verdicts = [], []
    for item in judged:
        for finding in item.findings:
            rows.append(_row(item.pair, finding, several))
            name = f"{item.pair.label}, {finding.metric}" if several else finding.metric
            verdicts.append(f"- {name}: {finding.verdict(level)}.")
    table = tabulate(rows, headers=headers, disable_numparse=True, stralign="right", colalign=("left",))
    text = "\n".join([
        f"A: {_side(pairing.first.path, [item.pair.a for item in judged])}",
        f"B: {_side(pairing.second.path, [item.pair.b for item in judged])}",
        f"Data: {'; '.join(dict.fromkeys(item.pair.key['data'] for item in judged))}",
        "", table, "", *verdicts, "", *_notes(judged, several), *_left_out(pairing, judged),
    ])  # fmt: skip
    # Names come from records, which may come from elsewhere.
    return "\n".join(printable(line) for line in text.split("\n"))


def _side(path: Path, runs: Sequence[Mapping[int | None, Run]]) -> str:
    found = list({run.path: run for by_seed in runs for run in by_seed.values()}.values())
    methods = list(dict.fromkeys(run.method for run in found))
    name = found[0].label if len(found) == 1 else f"{', '.join(methods)} ({len(found)} records)"
    return f"{name}: {path}"


def _row(pair: Pair, finding: Finding, several: bool) -> list[str]:
    cells = [
        finding.metric, f"{finding.a:.2f}", f"{finding.b:.2f}", f"{finding.difference:+.2f}",
        f"[{finding.low:.2f}, {finding.high:.2f}]", f"{finding.se:.2f}", _p(finding.p),
        *([_p(finding.holm)] if several else []), _effect(finding), finding.test,
        ", ".join(str(seed) for seed in _seeds(pair)) or "-",
        str(finding.samples) if finding.samples == finding.clusters else f"{finding.samples} ({finding.clusters} images)",
    ]  # fmt: skip
    return [pair.label, *cells] if several else cells


def _p(p: float | None) -> str:
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _seeds(pair: Pair) -> list[int]:
    return [seed for seed in pair.a if seed is not None]


def _effect(finding: Finding) -> str:
    found = finding.effect
    return f"g {found['cohens_g']:+.2f}, {found['only_a']}:{found['only_b']}" if found else "-"


def _notes(judged: Sequence[Judged], several: bool) -> list[str]:
    tests = {finding.test for item in judged for finding in item.findings}
    notes = []
    if "McNemar" in tests:
        notes.append(
            "McNemar: exact binomial test of the samples that one method only got right (A:B); interval by Newcombe's method "
            "10; g is the share of A's among them less a half."
        )
    if "bootstrap" in tests:
        notes.append(
            f"Bootstrap: {RESAMPLES} resamples of images, seeded; BCa interval and the p that belongs to it, at least "
            f"{2 / (RESAMPLES + 1):.1g}."
        )
    if any(len(item.pair.a) > 1 for item in judged):
        notes.append("Where there are several seeds, each sample's score is their mean.")
    notes.append("All this is about the finite number of samples; how much other seeds would differ it does not know.")
    if several:
        notes.append("Holm p: corrected for the number of pairs of the same metric; verdicts are by it.")
    return notes


def _left_out(pairing: Pairing, judged: Sequence[Judged]) -> list[str]:
    lines = [f"Not compared: {item.pair.label}: {item.problem}" for item in judged if item.problem]
    for name, side, alone in (("A", pairing.first, pairing.alone_a), ("B", pairing.second, pairing.alone_b)):
        lines += [f"Without a partner in {'B' if name == 'A' else 'A'}: {run.label} ({run.path.parent})" for run in alone]
        lines += [f"Not read in {name}: {problem}" for problem in side.problems]
    for item in judged:
        digests = {run.record.weights.sha256 for side in (item.pair.a, item.pair.b) for run in side.values()}
        if len(digests) > 1:
            lines.append(f"Note: {item.pair.label}: the records are of different weight files.")
    return lines


def json_text(pairing: Pairing, judged: Sequence[Judged], level: float) -> str:
    """Return everything as JSON; points are points, None is null."""

    def side(runs: Mapping[int | None, Run]) -> list[dict[str, Any]]:
        return [
            {"method": run.record.method, "variant": run.record.variant, "seed": run.record.seed, "record": str(run.path)}
            for run in {run.path: run for run in runs.values()}.values()
        ]

    def alone(runs: Sequence[Run]) -> list[str]:
        return [str(run.path) for run in runs]

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
                    {**asdict(finding), "better": finding.better(level), "verdict": finding.verdict(level)}
                    for finding in item.findings
                ],
                "problem": item.problem,
            }
            for item in judged
        ],
        "without_partner": {"a": alone(pairing.alone_a), "b": alone(pairing.alone_b)},
        "not_read": {"a": list(pairing.first.problems), "b": list(pairing.second.problems)},
    }
    return json.dumps(content, indent=1, allow_nan=False)
