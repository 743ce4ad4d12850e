"""Facts about a checkpoint, as text (one line a layer) and as JSON."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from fimaq_core import NUMERICS_VERSION
from fimaq_core.checkpoint import Fingerprint
from tasks.common.models.facts import LayerFacts, ModelFacts
from tasks.common.preprocessing import Preprocessing
from tasks.common.registry import defaults

#: Columns of tables; their alignment.
_LAYERS = {
    "layer": "left", "kind": "left", "weight": "left", "MACs": "right", "weight bits": "right", "weight quantizer": "left",
    "weight ranges": "left", "input bits": "right", "input quantizer": "left", "input ranges": "left", "size (bits)": "right",
    "bytes": "right", "overhead (bits)": "right", "BOPs": "right", "of full": "right",
}  # fmt: skip
_VALUES = {
    "in full precision": "left",
    "kind": "left",
    "values": "right",
    "size (bits)": "right",
    "bytes": "right",
}
#: What a stage's name does not say by itself.
_MEANINGS = {"mlp": " (MLPs reconstructed, full precision)"}


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` tells.

    Attributes:
        checkpoint: the file.
        task: name of the task.
        tag: ``model.tag``.
        stage: how far the checkpoint came, as it says itself.
        fingerprint: what it belongs to.
        facts: about the model in it.
        untouched: parts of the model that are not in it, since they stay as they are.
        entry: the entry of the file with the float weights; None where it has none.
        preprocessing: how images become inputs, where the task says it.
    """

    checkpoint: Path
    task: str
    tag: str
    stage: str
    fingerprint: Fingerprint
    facts: ModelFacts
    untouched: tuple[str, ...] = ()
    entry: str | None = None
    preprocessing: Preprocessing | None = None

    def content(self) -> dict[str, Any]:
        """Everything as JSON values; sizes in bits."""
        recipe = self.fingerprint.recipe
        return {
            "checkpoint": str(self.checkpoint),
            "task": self.task,
            "model": self.tag,
            "stage": self.stage,
            "scope": recipe.scope,
            "untouched": list(self.untouched),
            "method": recipe.method,
            "changes": recipe.changes(defaults(self.task)),
            "weights_entry": self.entry,
            "preprocessing": self.preprocessing and self.preprocessing.model_dump(mode="json"),
            "recipe": recipe.model_dump(mode="json"),
            "fingerprint": {
                "weights": self.fingerprint.weights,
                "calibration": self.fingerprint.calibration,
                "numerics": self.fingerprint.numerics,
                "recipe": recipe.digest(),
            },
            "layers": [_layer_content(layer) for layer in self.facts.layers],
            "full_precision": [
                {**asdict(part), "size_bits": 32 * part.values}
                for part in self.facts.full_precision
            ],
            "totals": self.facts.totals,
        }

    def text(self) -> str:
        """Layers, what stays in full precision, sums, and where the checkpoint comes from."""
        values = [
            (part.name, part.kind, part.values, *_size(32 * part.values))
            for part in self.facts.full_precision
        ]
        tables = [_table(_LAYERS, map(_layer_row, self.facts.layers)), _table(_VALUES, values)]
        return "\n\n".join([*tables, "\n".join(self._sums()), "\n".join(self._origin())])

    def _sums(self) -> list[str]:
        sums = self.facts.totals
        bits = {name: _bits(int(value)) for name, value in sums.items()}
        whole = f"{bits['size_bits']}; full precision {bits['full_size_bits']}"
        return [
            f"weights: {bits['weight_bits']}; full precision {bits['full_weight_bits']}; ratio {sums['weight_ratio']:.2f}",
            f"overhead (scales and zero points): {bits['overhead_bits']}",
            f"in full precision: {sums['full_precision_values']} values, {bits['full_precision_bits']}",
            f"whole model: {whole}; ratio {sums['size_ratio']:.2f}",
            f"BOPs an image: {sums['bops']}; full precision {sums['full_bops']}; ratio {sums['bops_ratio']:.2f}",
            f"MACs an image: {sums['macs']}; quantized {sums['quantized_macs']} ({100 * sums['quantized_share']:.2f} %)",
            "not counted: softmax, norms, GELU, additions, quantizing itself; quantization is simulated, "
            "so file and running time are not smaller",
        ]

    def _origin(self) -> list[str]:
        recipe, mark = self.fingerprint.recipe, self.fingerprint
        changes = ", ".join(
            f"{name}={value}" for name, value in recipe.changes(defaults(self.task)).items()
        )
        return [
            f"checkpoint: {self.checkpoint}",
            f"model: {self.tag} (task {self.task})",
            f"stage: {self.stage}{_MEANINGS.get(self.stage, '')}",
            f"method: {recipe.method} {recipe.bits_name}, seed {recipe.seed}",
            *([] if recipe.scope is None else [f"scope: {recipe.scope}"]),
            *(
                f"in full precision, what it computes not counted: {name}"
                for name in self.untouched
            ),
            f"changes: {changes or 'none'}",
            f"float weights: sha256 {mark.weights}",
            *([] if self.entry is None else [f"entry of the weights file: {self.entry}"]),
            *(
                []
                if self.preprocessing is None
                else [f"preprocessing: {self.preprocessing.text()}"]
            ),
            f"calibration: {mark.calibration}",
            f"numerics version: {mark.numerics} (this is {NUMERICS_VERSION})",
        ]


def _layer_content(layer: LayerFacts) -> dict[str, Any]:
    return {
        **layer.entry.model_dump(mode="json"),
        "weight_shape": None if layer.shape is None else list(layer.shape),
        "weights": layer.weights,
        "size_bits": layer.weight_size,
        "overhead_bits": layer.overhead_bits,
        "macs": layer.macs,
        "bops": layer.bops,
    }


def _layer_row(layer: LayerFacts) -> tuple[Any, ...]:
    entry = layer.entry
    weight: tuple[Any, ...] = entry.weight_bits, entry.weight_quantizer, entry.weight_ranges
    given: tuple[Any, ...] = entry.input_bits, entry.input_quantizer
    if entry.other_bits is not None:  # a product has no weight, but another operand
        weight = "-", "-", "-"
        given = (
            f"{entry.input_bits} x {entry.other_bits}",
            f"{entry.input_quantizer} x {entry.other_quantizer}",
        )
    shape = "-" if layer.shape is None else "x".join(map(str, layer.shape))
    share = f"{100 * layer.bops / (32 * 32 * layer.macs):.2f} %" if layer.macs else "-"
    sizes = *_size(layer.weight_size), layer.overhead_bits, layer.bops, share
    return entry.name, entry.kind, shape, layer.macs, *weight, *given, entry.input_ranges, *sizes


def _table(columns: dict[str, str], rows: Iterable[Sequence[Any]]) -> str:
    return str(
        tabulate(
            rows,
            list(columns),
            tablefmt="simple",
            disable_numparse=True,
            colalign=list(columns.values()),
        )
    )


def _size(bits: int) -> tuple[int, int]:
    """Bits, and bytes rounded up."""
    return bits, math.ceil(bits / 8)


def _bits(bits: int) -> str:
    return "{} bits ({} bytes)".format(*_size(bits))
