"""Provenance of every number: facts of the records, stated once if all seeds agree."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.compare.alike import changed_settings
from benchmarks.console import duration, share_text, size_text
from benchmarks.report.gather import Gathered
from benchmarks.report.groups import Group
from benchmarks.results.scores import Measured, sample_counts, unique
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import OFF
from tasks.common.record import LayerEntry, ResultRecord, recipe_of
from tasks.common.record_entries import Exported

Dict = dict[str, Any]
#: Columns of a module map.
_LAYER = ["layer", "kind", "weights", "input", "second input"]


def provenance(group: Group, metric: str, gathered: Gathered) -> Dict:
    """Return the provenance of ``group``; ``metric`` is the metric of the main table."""
    cell, records = group.cell, [item.record for item in group.items]
    facts = [_facts(item, gathered) for item in group.items]
    notes = [(record.seed, note) for record in records for note in record.notes]
    several = len(records) > 1
    return {
        "group": group,
        "title": f"{cell.subject} {group.method} {cell.bits}".removesuffix(" fp"),
        "score": f"{metric} {group.scores[metric].text}" if metric in group.scores else "",
        "seeds": ["value" if record.seed is None else f"seed {record.seed}" for record in records],
        "metrics": [
            (name, score.text, [_value(record, name) for record in records])
            for name, score in group.scores.items()
        ],
        "facts": {
            heading: {name: _same([str(found[heading][name]) for found in facts]) for name in part}
            for heading, part in facts[0].items()
        },
        "recipe": "\n\n".join(unique(_recipe(r.recipe) for r in records if r.recipe is not None)),
        "notes": unique(f"seed {seed}: {note}" if several else note for seed, note in notes),
    }


def _same(values: list[str]) -> list[str]:
    """Return the values of the seeds, or a single value if all are equal."""
    return values[:1] if len(set(values)) == 1 else values


def _value(record: ResultRecord, metric: str) -> str:
    """Return a metric with its standard error over samples."""
    found = record.metrics.get(metric)
    return "–" if found is None else f"{found.value:.4f} ± {found.stderr:.4f}"


def _facts(item: Measured, gathered: Gathered) -> dict[str, Dict]:
    """Return the facts of a record, by heading and name."""
    r, machine, inputs = item.record, item.record.environment, item.record.calibration
    stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in r.seconds.items())
    return {
        "Record": {
            "file": "–" if item.folder is None else gathered.relative(item.folder / "result.json"),
            "finished": r.finished,
            "fingerprint": r.fingerprint or "none: an older version wrote the record",
            "variant": r.variant,
            "changed settings": _changes(r),
            "recipe digest": r.recipe_digest or "–",
        },
        "Weights": {"tag": r.weights.tag, "source": r.weights.source, "sha256": r.weights.sha256},
        "Data": {
            "data set": f"{r.dataset.name}, {r.dataset.split}",
            "samples": sample_counts(r.n, r.dataset.captions),
            "classes": r.dataset.classes or "–",
            "fingerprint": r.dataset.fingerprint,
            "damaged images left out": len(r.skipped_images),
        },
        "Calibration": {
            "images": "none" if inputs is None else len(inputs.ids),
            "transform": "–" if inputs is None else inputs.transform,
            "fingerprint": "–" if inputs is None else inputs.fingerprint,
        },
        "Run": {
            "wall time": f"{duration(sum(r.seconds.values()))} ({stages})",
            "peak memory": size_text(r.peak_memory_bytes),
            "device": f"{machine.device}, {machine.threads} threads",
            "step engine": r.step_engine or "–",
            "git revision": machine.git_revision,
            "versions": ", ".join(f"{name} {found}" for name, found in machine.versions.items()),
        },
        **({} if r.exported is None else {"Export to ONNX": _export(r.exported)}),
    }


def _export(own: Exported) -> Dict:
    """Return the facts of an exported file: its size, and what ran in integers."""
    share = share_text(100 * own.integer_macs / max(own.quantized_macs, 1))
    of = f", {own.bytes / own.float_bytes:.2f} of float32" if own.float_bytes else ""
    return {
        "size": f"{size_text(own.bytes)}{of}",
        "weights": "packed in 2 to 4 bits" if own.weights == "packed" else own.weights,
        "zero points of activations": "0" if own.signed else "as calibrated",
        "ran in integers": f"{own.integer_macs:,} of the {own.quantized_macs:,} multiply-adds with "
        f"two quantized operands ({share} %)",
        "multiply-adds per sample": f"{own.macs:,}",
        "speed": "not measured" if own.speed is None else f"{own.speed:.2f} x float32",
        "runtime": own.runtime,
        "sha256": own.sha256,
    }


def _changes(record: ResultRecord) -> str:
    """Return the settings that affect the result and differ from the method's released ones."""
    try:
        recipe = recipe_of(record)
        changes = {} if recipe is None else changed_settings(recipe, record.task)
    except FimaqError:
        return "unknown: this version does not have the method or the settings of the recipe"
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "none"


def _recipe(settings: Mapping[str, Any]) -> str:
    """Return all settings except the seed, one per line."""
    words = {"None": "–", "True": "yes", "False": "no"}
    lines = (f"{k}: {words.get(str(v), v)}" for k, v in settings.items() if k != "seed")
    return "\n".join(lines)


def module_maps(groups: Sequence[Group]) -> list[Dict]:
    """Return the distinct module maps of each subject: bits, quantizer and ranges of each layer.

    A map writes W and A for the cell's own bits, so cells that differ only in their bits share it.
    ``used_by`` names the methods, with bits if a method has several maps.
    """
    found, known = [], {}
    for group in groups:
        for record in (item.record for item in group.items):
            if (modules := record.modules) is not None:
                key = id(modules), record.w_bit, record.a_bit  # many records share a map
                if key not in known:
                    layers = tuple(_layer(entry, record) for entry in modules.quantized)
                    known[key] = layers, tuple(modules.full_precision)
                found.append((group.cell.subject, group.method, group.cell.bits, known[key]))
    table = pd.DataFrame(found, columns=["subject", "method", "bits", "map"]).drop_duplicates()
    number = table.groupby(["subject", "method"])["map"].nunique()
    maps = []
    for (subject, (layers, rest)), users in table.groupby(["subject", "map"], sort=False):
        kinds = Counter(layer[1] for layer in layers).most_common()
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
        quantized = f"{len(layers)} layers quantized ({counts})" if layers else "no layer quantized"
        maps.append({
            "subject": subject,
            "used_by": [
                name if number[subject, name] == 1 else f"{name} ({', '.join(bits)})"
                for name, bits in users.groupby("method", sort=False)["bits"]
            ],
            "summary": f"{quantized}, {len(rest)} modules in full precision",
            "layers": pd.DataFrame(layers, columns=_LAYER).set_index("layer"),
            "full_precision": rest,
        })  # fmt: skip
    return maps


def _layer(entry: LayerEntry, record: ResultRecord) -> tuple[str, ...]:
    """Return a row of a map, in the order of :data:`_LAYER`."""

    def side(bits: int, usual: int, letter: str, quantizer: str, ranges: str) -> str:
        width = letter if bits == usual else f"{bits} bits"
        return "–" if bits == OFF else f"{width}, {quantizer}, {ranges}"

    w_bit, a_bit = record.w_bit, record.a_bit
    ranges, second = entry.input_ranges, "–"
    if entry.other_bits is not None:
        ranges, _, rest = ranges.partition("; ")
        quantizer = entry.other_quantizer or "uniform"
        second = side(entry.other_bits, a_bit, "A", quantizer, rest or ranges)
    weights = side(entry.weight_bits, w_bit, "W", entry.weight_quantizer, entry.weight_ranges)
    inputs = side(entry.input_bits, a_bit, "A", entry.input_quantizer, ranges)
    return entry.name, entry.kind, weights, inputs, second
