"""Where every number is from: what the records of a group say, once where seeds agree."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.diff import changed_settings
from benchmarks.report.gather import Gathered
from benchmarks.report.groups import Group
from benchmarks.results.scores import Measured, sample_counts, unique
from benchmarks.units import duration, size_text
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import OFF
from tasks.common.record import LayerEntry, ResultRecord, recipe_of

#: A line of a provenance: its name, one value for all seeds or one per seed, and whether it is code.
Fact = tuple[str, list[str], bool]


def origin(group: Group, metric: str, gathered: Gathered) -> dict[str, Any]:
    """Return the provenance of ``group``, whose tables show ``metric``."""
    cell, records = group.cell, [item.record for item in group.items]
    several = len(records) > 1
    return {
        "group": group,
        "title": f"{cell.subject} {group.method}" + ("" if cell.bits == "fp" else f" {cell.bits}"),
        "score": f"{metric} {group.scores[metric].text}" if metric in group.scores else "",
        "seeds": ["value" if record.seed is None else f"seed {record.seed}" for record in records],
        "metrics": [(name, score.text, [_value(record, name) for record in records]) for name, score in group.scores.items()],
        "facts": _facts(group.items, gathered),
        "recipe": "\n\n".join(unique(_recipe(record) for record in records if record.recipe is not None)),
        "notes": unique(f"seed {record.seed}: {note}" if several else note for record in records for note in record.notes),
    }


def _value(record: ResultRecord, metric: str) -> str:
    found = record.metrics.get(metric)
    return "–" if found is None else f"{found.value:.4f} ± {found.stderr:.4f}"


def _facts(items: Sequence[Measured], gathered: Gathered) -> dict[str, list[Fact]]:
    """Return facts by heading."""

    def fact(name: str, of: Callable[[ResultRecord], object], code: bool = False) -> Fact:
        found = [str(of(item.record)) for item in items]
        return name, found[:1] if len(set(found)) == 1 else found, code

    paths = {id(i.record): "–" if i.folder is None else gathered.relative(i.folder / "result.json") for i in items}
    return {
        "Record": [
            fact("file", lambda r: paths[id(r)], code=True),
            fact("finished", lambda r: r.finished),
            fact("fingerprint", lambda r: r.fingerprint or "none: written before records had one", code=True),
            fact("variant", lambda r: r.variant),
            fact("changed settings", _changes),
            fact("recipe digest", lambda r: r.recipe_digest or "–", code=True),
        ],
        "Weights": [
            fact("tag", lambda r: r.weights.tag),
            fact("source", lambda r: r.weights.source),
            fact("sha256", lambda r: r.weights.sha256, code=True),
        ],
        "Data": [
            fact("data set", lambda r: f"{r.dataset.name}, {r.dataset.split}"),
            fact("samples", lambda r: sample_counts(r.n, r.dataset.captions)),
            fact("classes", lambda r: r.dataset.classes or "–"),
            fact("fingerprint", lambda r: r.dataset.fingerprint, code=True),
            fact("damaged images left out", lambda r: len(r.skipped_images)),
        ],
        "Calibration": [
            fact("images", lambda r: "none" if r.calibration is None else len(r.calibration.ids)),
            fact("transform", lambda r: "–" if r.calibration is None else r.calibration.transform),
            fact("fingerprint", lambda r: "–" if r.calibration is None else r.calibration.fingerprint, code=True),
        ],
        "Run": [
            fact("wall time", _seconds),
            fact("peak memory", lambda r: size_text(r.peak_memory_bytes)),
            fact("device", lambda r: f"{r.environment.device}, {r.environment.threads} threads"),
            fact("step engine", lambda r: r.step_engine or "–"),
            fact("git revision", lambda r: r.environment.git_revision, code=True),
            fact("versions", lambda r: ", ".join(f"{name} {found}" for name, found in r.environment.versions.items())),
        ],
    }


def _seconds(record: ResultRecord) -> str:
    stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in record.seconds.items())
    return f"{duration(sum(record.seconds.values()))} ({stages})"


def _changes(record: ResultRecord) -> str:
    """Return what is not the method's released setting and bears on the result, as far as this version knows the method."""
    try:
        recipe = recipe_of(record)
        changes = {} if recipe is None else changed_settings(recipe, record.task)
    except FimaqError:
        return "not known: this version does not have the recipe's method or settings"
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "none"


def _recipe(record: ResultRecord) -> str:
    """Return all settings but the seed, one per line."""
    words = {None: "–", True: "yes", False: "no"}
    return "\n".join(
        f"{name}: {words[value] if value is None or isinstance(value, bool) else value}"
        for name, value in (record.recipe or {}).items()
        if name != "seed"
    )


def module_maps(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return which layers of quantized cells are quantized how, each distinct map of a subject once.

    Cells whose maps differ in nothing but the cells' own bits share one, with these bits written W and A.
    """
    found: dict[tuple[Any, ...], list[Group]] = {}
    every: dict[tuple[str, str], set[str]] = {}
    for group in groups:
        for record in (item.record for item in group.items):
            if record.modules is not None:
                rows = tuple(_layer(entry, record) for entry in record.modules.quantized)
                key = group.cell.subject, rows, tuple(record.modules.full_precision)
                found.setdefault(key, []).append(group)
                every.setdefault((group.cell.subject, group.method), set()).add(group.cell.bits)
    maps = []
    for (subject, rows, rest), users in found.items():
        bits: dict[str, dict[str, None]] = {}
        for group in users:
            bits.setdefault(group.method, {})[group.cell.bits] = None
        # Bits where others of the same method have another map.
        used_by = [name if set(mine) == every[subject, name] else f"{name} ({', '.join(mine)})" for name, mine in bits.items()]
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(row[1] for row in rows).most_common())
        quantized = f"{len(rows)} layers quantized ({kinds})" if rows else "no layer quantized"
        summary = f"{quantized}, {len(rest)} modules in full precision"
        maps.append({"subject": subject, "used_by": used_by, "summary": summary, "rows": rows, "full_precision": rest})
    return maps


def _layer(entry: LayerEntry, record: ResultRecord) -> tuple[str, ...]:
    """Return layer, kind, weights, input and second input."""

    def side(bits: int, usual: int, letter: str, quantizer: str, ranges: str) -> str:
        return "–" if bits == OFF else f"{letter if bits == usual else f'{bits} bits'}, {quantizer}, {ranges}"

    ranges, second = entry.input_ranges, "–"
    if entry.other_bits is not None:
        ranges, _, rest = ranges.partition("; ")
        second = side(entry.other_bits, record.a_bit, "A", entry.other_quantizer or "uniform", rest or ranges)
    return (
        entry.name,
        entry.kind,
        side(entry.weight_bits, record.w_bit, "W", entry.weight_quantizer, entry.weight_ranges),
        side(entry.input_bits, record.a_bit, "A", entry.input_quantizer, ranges),
        second,
    )
