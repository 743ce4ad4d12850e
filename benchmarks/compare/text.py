"""Printed form of a comparison: a table with its verdicts, or JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compare.judge import Finding, Judged, p_text
from benchmarks.compare.sides import Pair, Pairing, Run
from benchmarks.compare.statistics import RESAMPLES
from benchmarks.console import printable


def report(pairing: Pairing, judged: Sequence[Judged], level: float) -> str:
    """Return the table, one verdict per row, and what was left out."""
    from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

    several = len(judged) > 1
    rows, verdicts = [], []
    for item in judged:
        for finding in item.findings:
            row = {"pair": item.pair.label, **_row(item.pair, finding, level)}
            rows.append({k: v for k, v in row.items() if several or k not in ("pair", "Holm p")})
            name = f"{item.pair.label}, {finding.metric}" if several else finding.metric
            verdicts.append(f"- {name}: {finding.verdict(level)}.")
    align = {"disable_numparse": True, "stralign": "right", "colalign": ("left",)}
    text = "\n".join([
        f"A: {_side(pairing.first.path, [item.pair.a for item in judged])}",
        f"B: {_side(pairing.second.path, [item.pair.b for item in judged])}",
        f"Data: {'; '.join(dict.fromkeys(item.pair.key['data'] for item in judged))}",
        "", tabulate(rows, headers="keys", **align),
        "", *verdicts, "", *_notes(judged), *_left_out(pairing, judged),
    ])  # fmt: skip
    # Names come from records, which may come from elsewhere.
    return "\n".join(printable(line) for line in text.split("\n"))


def _side(path: Path, runs: Sequence[Mapping[int | None, Run]]) -> str:
    found = list({run.path: run for by_seed in runs for run in by_seed.values()}.values())
    methods = ", ".join(dict.fromkeys(run.record.method for run in found))
    name = found[0].label if len(found) == 1 else f"{methods} ({len(found)} records)"
    return f"{name}: {path}"


def _row(pair: Pair, finding: Finding, level: float) -> dict[str, str]:
    effect = finding.effect
    words = f"g {effect['cohens_g']:+.2f}, {effect['only_a']}:{effect['only_b']}" if effect else "-"
    alone = finding.samples == finding.clusters
    return {
        "metric": finding.metric,
        "A": f"{finding.a:.2f}",
        "B": f"{finding.b:.2f}",
        "A - B": f"{finding.difference:+.2f}",
        f"{100 * level:g} % interval": f"[{finding.low:.2f}, {finding.high:.2f}]",
        "se": f"{finding.se:.2f}",
        "p": p_text(finding.p),
        "Holm p": p_text(finding.holm),
        "effect": words,
        "test": finding.test,
        "seeds": ", ".join(str(seed) for seed in pair.a if seed is not None) or "-",
        "n": f"{finding.samples}" if alone else f"{finding.samples} ({finding.clusters} images)",
    }


def _notes(judged: Sequence[Judged]) -> list[str]:
    tests, several = {finding.test for item in judged for finding in item.findings}, len(judged) > 1
    seeds = any(len(item.pair.a) > 1 for item in judged)
    of_samples = "All this is about the finite number of samples"
    corrected = "corrected for the number of pairs of the same metric"
    notes = {
        "McNemar: exact binomial test of the samples that one method only got right (A:B); "
        "interval by Newcombe's method 10; g is the share of A's among them less a "
        "half.": "McNemar" in tests,
        f"Bootstrap: {RESAMPLES} resamples of images, seeded; BCa interval and the p that belongs "
        f"to it, at least {2 / (RESAMPLES + 1):.1g}.": "bootstrap" in tests,
        "Where there are several seeds, each sample's score is their mean.": seeds,
        f"{of_samples}; how much other seeds would differ it does not know.": True,
        f"Holm p: {corrected}; verdicts are by it.": several,
    }
    return [note for note, shown in notes.items() if shown]


def _left_out(pairing: Pairing, judged: Sequence[Judged]) -> list[str]:
    lines = [f"Not compared: {item.pair.label}: {item.problem}" for item in judged if item.problem]
    first, second = pairing.first, pairing.second
    sides = (("A", "B", first, pairing.alone_a), ("B", "A", second, pairing.alone_b))
    for name, other, side, alone in sides:
        lines += [f"Without a partner in {other}: {run.label} ({run.path.parent})" for run in alone]
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
        found = []
        for path, record in distinct.items():
            own = {name: getattr(record, name) for name in ("method", "variant", "seed")}
            found.append({**own, "record": str(path)})
        return found

    def metric(finding: Finding) -> dict[str, Any]:
        better, verdict = finding.better(level), finding.verdict(level)
        return {**asdict(finding), "better": better, "verdict": verdict}

    pairs = [
        {
            "label": item.pair.label,
            "shared": dict(item.pair.key),
            "seeds": [seed for seed in item.pair.a if seed is not None],
            "a": side(item.pair.a),
            "b": side(item.pair.b),
            "metrics": [metric(finding) for finding in item.findings],
            "problem": item.problem,
        }
        for item in judged
    ]
    alone = {"a": pairing.alone_a, "b": pairing.alone_b}
    content = {
        "level": level,
        "resamples": RESAMPLES,
        "pairs": pairs,
        "without_partner": {side: [str(run.path) for run in runs] for side, runs in alone.items()},
        "not_read": {"a": list(pairing.first.problems), "b": list(pairing.second.problems)},
    }
    return json.dumps(content, indent=1, allow_nan=False)
