"""Module maps: which layers are quantized how, and what stays in full precision; each distinct map of a subject once."""

from collections import Counter
from collections.abc import Sequence

from benchmarks.report.groups import Group
from benchmarks.report.views import ModuleMapView
from benchmarks.tables import Measured, unique
from fimaq_core.recipe import OFF
from tasks.common.record import LayerEntry, ResultRecord

HEAD = ("layer", "kind", "weights", "input", "second input")


def module_maps(groups: Sequence[Group]) -> list[ModuleMapView]:
    """The maps of quantized cells. Cells whose maps differ in nothing but the cells' own bits share one, written W and A."""
    found: dict[tuple[str, tuple[tuple[str, ...], ...], tuple[str, ...]], list[Measured]] = {}
    for item in (item for group in groups for item in group.items):
        modules = item.record.modules
        if modules is not None:
            rows = tuple(_row(entry, item.record) for entry in modules.quantized)
            found.setdefault((item.cell.subject, rows, tuple(modules.full_precision)), []).append(item)
    bits = {subject: _all_bits(groups, subject) for subject in unique(key[0] for key in found)}
    return [
        ModuleMapView(subject, items[0].cell.model, _users(items, bits[subject]), _summary(rows, rest), rows, rest)
        for (subject, rows, rest), items in found.items()
    ]


def _row(entry: LayerEntry, record: ResultRecord) -> tuple[str, ...]:
    ranges = entry.input_ranges
    second = "–"
    if entry.other_bits is not None:
        ranges, _, rest = ranges.partition("; ")
        second = _side(entry.other_bits, record.a_bit, "A", entry.other_quantizer or "uniform", rest or ranges)
    return (
        entry.name,
        entry.kind,
        _side(entry.weight_bits, record.w_bit, "W", entry.weight_quantizer, entry.weight_ranges),
        _side(entry.input_bits, record.a_bit, "A", entry.input_quantizer, ranges),
        second,
    )


def _side(bits: int, usual: int, letter: str, quantizer: str, ranges: str) -> str:
    if bits == OFF:
        return "–"
    return f"{letter if bits == usual else f'{bits} bits'}, {quantizer}, {ranges}"


def _all_bits(groups: Sequence[Group], subject: str) -> dict[str, set[str]]:
    """Bits by method of a subject's quantized cells."""
    found: dict[str, set[str]] = {}
    for group in groups:
        if group.cell.subject == subject and any(item.record.modules is not None for item in group.items):
            found.setdefault(group.method, set()).add(group.cell.bits)
    return found


def _users(items: Sequence[Measured], bits: dict[str, set[str]]) -> list[str]:
    """Methods, with their bits where other bits of the same method have another map."""
    mine: dict[str, list[str]] = {}
    for item in items:
        name = f"{item.cell.method} {item.cell.point}".strip()
        mine.setdefault(name, []).append(item.cell.bits)
    return [name if set(here) >= bits.get(name, set()) else f"{name} ({', '.join(unique(here))})" for name, here in mine.items()]


def _summary(rows: Sequence[Sequence[str]], rest: Sequence[str]) -> str:
    kinds = Counter(row[1] for row in rows)
    parts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    quantized = f"{len(rows)} layers quantized ({parts})" if rows else "no layer quantized"
    return f"{quantized}, {len(rest)} modules in full precision"
