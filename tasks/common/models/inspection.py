"""Text and JSON output of the command ``inspect``: facts about a checkpoint."""

from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from fimaq_core import NUMERICS_VERSION
from fimaq_core.checkpoint import Fingerprint
from fimaq_core.recipe import OFF
from tasks.common.models.facts import ModelFacts
from tasks.common.preprocessing import Preprocessing
from tasks.common.registry import defaults

#: Explanations of stages whose names are not clear.
_MEANINGS = {"mlp": " (MLPs reconstructed, full precision)"}


@dataclass(frozen=True)
class Inspection:
    """Facts that ``inspect`` prints."""

    checkpoint: Path
    task: str  # name of the task
    tag: str  # `model.tag`
    stage: str  # last finished stage, from the header of the checkpoint
    fingerprint: Fingerprint  # weights, calibration, numerics and recipe of the checkpoint
    facts: ModelFacts
    untouched: tuple[str, ...] = ()  # parts in full precision that are not in the checkpoint
    entry: str | None = None  # entry of the float weights in their file; None if it has none
    preprocessing: Preprocessing | None = None  # None if the task does not describe it

    def content(self) -> dict[str, Any]:
        """Return all facts as JSON values; sizes are in bits."""
        recipe, mark = self.fingerprint.recipe, self.fingerprint
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
                "weights": mark.weights,
                "calibration": mark.calibration,
                "numerics": mark.numerics,
                "recipe": recipe.digest(),
            },
            "layers": [layer.model_dump(mode="json") for layer in self.facts.layers],
            "full_precision": [
                {**asdict(part), "size_bits": OFF * part.values}
                for part in self.facts.full_precision
            ],
            "totals": self.facts.totals,
        }

    def text(self) -> str:
        """Return tables of layers and of values in full precision, the sums, and the origin."""
        content = self.content()
        tables = [
            tabulate(content[name], "keys", "simple", missingval="-")
            for name in ("layers", "full_precision")
        ]
        return "\n\n".join([*tables, "\n".join(self._sums()), "\n".join(self._origin())])

    def _sums(self) -> list[str]:
        sums = self.facts.totals

        def bits(name: str) -> str:
            return f"{sums[name]} bits ({ceil(sums[name] / 8)} bytes)"

        def compared(name: str) -> str:
            full, ratio = bits(f"full_{name}_bits"), sums[f"{name}_ratio"]
            return f"{bits(f'{name}_bits')}; full precision {full}; ratio {ratio:.2f}"

        return [
            f"weights: {compared('weight')}",
            f"overhead (scales and zero points): {bits('overhead_bits')}",
            f"in full precision: {sums['full_precision_values']} values, "
            + bits("full_precision_bits"),
            f"whole model: {compared('size')}",
            f"BOPs per image: {sums['bops']}; full precision {sums['full_bops']}; "
            f"ratio {sums['bops_ratio']:.2f}",
            f"MACs per image: {sums['macs']}; quantized {sums['quantized_macs']} "
            f"({100 * sums['quantized_share']:.2f} %)",
            "not counted: softmax, norms, GELU, additions, the quantization itself; "
            "quantization is simulated, so the file is not smaller and the model not faster",
        ]

    def _origin(self) -> list[str]:
        recipe, mark, given = self.fingerprint.recipe, self.fingerprint, self.preprocessing
        changes = recipe.changes(defaults(self.task)).items()
        lines = {
            "checkpoint": self.checkpoint,
            "model": f"{self.tag} (task {self.task})",
            "stage": f"{self.stage}{_MEANINGS.get(self.stage, '')}",
            "method": f"{recipe.method} {recipe.bits_name}, seed {recipe.seed}",
            "scope": recipe.scope,
            "in full precision, operations not counted": ", ".join(self.untouched) or None,
            "changes": ", ".join(f"{name}={value}" for name, value in changes) or "none",
            "float weights": f"sha256 {mark.weights}",
            "entry of the weights file": self.entry,
            "preprocessing": given and given.text(),
            "calibration": mark.calibration,
            "numerics version": f"{mark.numerics} (this is {NUMERICS_VERSION})",
        }
        return [f"{name}: {value}" for name, value in lines.items() if value is not None]
