"""Sensitivity of each layer of a cell's model, and bits of single layers for a budget."""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from fimaq_core.bits_budget import Bits, Cost, bops_cost, mean_bits_cost, suggest_bits
from fimaq_core.bits_map import BitsMap
from fimaq_core.calibration.reparameterize import norm_before
from fimaq_core.checkpoint import Pieces, load_checkpoint
from fimaq_core.errors import CheckpointError, RecipeError
from fimaq_core.files import replaced_whole
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.mixed_bits import places, quantizers_of, set_bits
from fimaq_core.pipeline import CALIBRATE, MLPS
from fimaq_core.progress import OnProgress
from fimaq_core.reconstruction.mlp import use_relu
from fimaq_core.sensitivity import Sensitivity, agreement, sensitivities
from fimaq_core.store import Address, Part
from tasks.common.cell.origin import read_origin, with_origin
from tasks.common.cell.prepare import PreparedCell, all_segments, prepare, whole_module
from tasks.common.cell.stages import check_shapes
from tasks.common.models.facts import count_macs
from tasks.common.models.module_map import part_name
from tasks.common.request import CellRequest


@dataclass(frozen=True)
class Budget:
    """Limit of the bits of a model. Raises RecipeError unless exactly one limit is given."""

    mean_bits: float | None = None  # of weights, and of all other operands
    bops: float | None = None  # share of the bit operations with the recipe's own bits
    widths: tuple[int, ...] = (3, 4, 5, 6)  # bits that an operand may have

    def __post_init__(self) -> None:
        if (self.mean_bits is None) == (self.bops is None):
            raise RecipeError("A bits map needs one budget: give --mean-bits or --bops.")


@dataclass(frozen=True)
class Suggestion:
    """Bits of single layers within a budget."""

    bits: BitsMap
    weight_bits: float  # mean over weights
    input_bits: float  # mean over values per sample of inputs and operands of products
    bops: float  # share of the bit operations with the recipe's own bits
    divergence: float  # sum over operands
    uniform: dict[int, float]  # the same sum if all operands have equal bits

    def content(self) -> dict[str, Any]:
        """Return all facts as JSON values."""
        return {**asdict(self), "bits": self.bits.widths()}

    def lines(self) -> list[str]:
        """Return the facts in words."""
        same = ", ".join(f"{loss:.3g} at {width} bits" for width, loss in self.uniform.items())
        return [
            f"suggested: weights {self.weight_bits:.2f} bits, inputs {self.input_bits:.2f} bits on "
            f"average, {self.bops:.3f} of the recipe's bit operations",
            f"sum of divergences: {self.divergence:.3g}; with equal bits {same}",
        ]

    def write(self, path: Path) -> None:
        """Write the bits as YAML, for ``--bits-map``. Raises CheckpointError."""
        text = yaml.safe_dump(self.bits.widths(), default_flow_style=None, width=100)
        with replaced_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class SensitivityReport:
    """Divergences of all operands, the largest first, and the suggested bits if asked for."""

    rows: list[Sensitivity]
    correlation: float  # Spearman's, of exact and gradient form
    suggestion: Suggestion | None = None
    left_out: tuple[str, ...] = ()  # parts without a divergence; they keep the recipe's bits

    def content(self) -> dict[str, Any]:
        """Return all facts as JSON values."""
        own = self.suggestion
        return {
            "rank_correlation": self.correlation,
            "left_out": list(self.left_out),
            "operands": [asdict(row) for row in self.rows],
            "suggestion": None if own is None else own.content(),
        }

    def text(self) -> str:
        """Return the table of operands and the sums."""
        total = sum(row.exact for row in self.rows) or 1.0
        table = [
            {
                "layer": row.layer,
                "operand": row.operand,
                "bits": row.bits,
                "values": row.values,
                "divergence": f"{row.exact:.3e}",
                "share": f"{100 * row.exact / total:.1f} %",
                "by gradients": f"{row.gradient:.3e}",
            }
            for row in self.rows
        ]
        return "\n".join(
            [
                tabulate(table, "keys", "simple", disable_numparse=True),
                "",
                "divergence: with only this operand quantized; operands: w weight, a input or left "
                "operand, b right operand",
                f"rank correlation of both forms (Spearman): {self.correlation:.3f}",
                *(f"not measured, since it has no divergence: {name}" for name in self.left_out),
                *([] if self.suggestion is None else self.suggestion.lines()),
            ]
        )

    def write(self, path: Path) -> None:
        """Write all facts as JSON. Raises CheckpointError."""
        with replaced_whole(path) as temporary:
            temporary.write_text(json.dumps(self.content(), indent=1), encoding="utf-8")


def sensitivity_stage(
    request: CellRequest,
    checkpoint: Path | None,
    *,
    images: int,
    budget: Budget | None,
    on_progress: OnProgress,
) -> SensitivityReport:
    """Measure each quantized operand of a model alone.

    Args:
        request: the run; its recipe counts only without checkpoint.
        checkpoint: calibrated or reconstructed checkpoint, whose ranges are taken; None calibrates
            the model in memory.
        images: calibration images to measure on.
        budget: limit of the suggested bits; None suggests none.

    Raises:
        CheckpointError: the checkpoint has no ranges or belongs to another run.
        RecipeError: no choice of bits meets the budget.
    """
    cell = _calibrated(request, checkpoint, on_progress)
    rows = [row for part in _with_divergence(cell) for row in _measured(part, cell, images)]
    ranked = sorted(rows, key=lambda row: -row.exact)
    suggestion = None if budget is None else _suggestion(cell, rows, budget, images)
    left_out = tuple(part.name for part in cell.parts if part not in _with_divergence(cell))
    return SensitivityReport(ranked, agreement(ranked), suggestion, left_out)


def _with_divergence(cell: PreparedCell) -> list[Part]:
    """Return the parts whose outputs have a divergence; heads of detectors have none."""
    return [part for part in cell.parts if type(part.divergence) is not Divergence]


def _calibrated(
    request: CellRequest, checkpoint: Path | None, on_progress: OnProgress
) -> PreparedCell:
    """Return a cell with ranges, from ``checkpoint`` or calibrated now, without files."""
    if checkpoint is None:
        cell = prepare(request, on_progress, measured=True)
        cell.run([MLPS, CALIBRATE], lambda stage, part: Address())
        return cell
    fingerprint, origin = read_origin(checkpoint, request.task)
    if origin.stage == MLPS.mark:
        raise CheckpointError(
            f"The checkpoint {checkpoint} holds reconstructed MLPs without ranges: calibrate it "
            "with the command calibrate first."
        )
    cell = prepare(with_origin(request, origin, fingerprint.recipe), on_progress, measured=True)
    if fingerprint.recipe.reconstruct_mlp:
        use_relu(all_segments(cell.chains))
    load_checkpoint(checkpoint, whole_module(cell.chains), cell.fingerprint)
    check_shapes(cell, cell.chains, checkpoint)
    return cell


def _measured(
    part: Part, cell: PreparedCell, images: int, directions: int = 4
) -> list[Sensitivity]:
    """Return the divergences of a part's operands, with the names of the module map."""
    rows = sensitivities(
        part.chain,
        part.inputs,
        part.divergence.sharp(),
        images=images,
        directions=directions,
        batch_size=cell.resources.batch_size,
        on_progress=cell.resources.on_progress,
    )
    return [replace(row, layer=part_name(part.name, row.layer)) for row in rows]


def _at_width(part: Part, width: int, cell: PreparedCell) -> Part:
    """Return a copy of a part whose quantized operands all have ``width`` bits, calibrated."""
    twin = replace(part, chain=copy.deepcopy(part.chain))
    for place in places(twin.chain):
        for operand, quantizer in quantizers_of(place.layer).items():
            if not quantizer.off:
                set_bits(place.layer, operand, width)
    CALIBRATE.make(twin, cell.resources, Pieces())
    return twin


def _suggestion(
    cell: PreparedCell, rows: Sequence[Sensitivity], budget: Budget, images: int
) -> Suggestion:
    """Choose the bits of each part within the budget, which then holds for the model too."""
    found: dict[str, Bits] = {}
    losses: dict[tuple[str, str, int], float] = {}
    macs = _macs(cell)
    for part in _with_divergence(cell):
        own: list[Sensitivity] = []
        for width in sorted(set(budget.widths)):
            twin = _at_width(part, width, cell)
            own += _measured(twin, cell, images, directions=0)
        losses |= {(row.layer, row.operand, row.bits): row.exact for row in own}
        names = {row.layer for row in own}
        present = [row for row in rows if row.layer in names]
        if budget.bops is not None:
            cost, limits = bops_cost(macs, _bits_of(present)), [budget.bops]
        else:
            assert budget.mean_bits is not None
            cost, limits = mean_bits_cost(present), 2 * [budget.mean_bits]
        found |= suggest_bits(own, cost, limits, tied=_tied(twin))

    def total(cost: Cost) -> list[float]:
        return [sum(one) for one in zip(*(cost(*item) for item in found.items()), strict=True)]

    weight_bits, input_bits = total(mean_bits_cost(rows))
    (bops,) = total(bops_cost(macs, _bits_of(rows)))
    return Suggestion(
        bits=BitsMap.of(found),
        weight_bits=weight_bits,
        input_bits=input_bits,
        bops=bops,
        divergence=sum(
            losses[name, operand, bits]
            for name, chosen in found.items()
            for operand, bits in chosen.items()
        ),
        uniform={
            width: sum(loss for (_, _, bits), loss in losses.items() if bits == width)
            for width in sorted(set(budget.widths))
        },
    )


def _macs(cell: PreparedCell) -> dict[str, int]:
    """Return the multiply-adds of each layer per input, by its name in the module map."""
    examples = cell.task.examples(cell.loaded, cell.chains)
    return {
        part_name(part.name, layer): count
        for part in _with_divergence(cell)
        for layer, count in count_macs(part.chain, examples[part.name].to(cell.device)).items()
    }


def _tied(part: Part) -> set[str]:
    """Return the layers whose norm is reparameterised only if input and weight have equal bits.

    ``part`` has equal bits everywhere.
    """
    recipe = part.recipe
    if recipe.range_search == "percentile":
        return set()
    return {
        part_name(part.name, place.name)
        for place in places(part.chain)
        if norm_before(place.segment, place.inner, place.layer, recipe) is not None
    }


def _bits_of(rows: Iterable[Sensitivity]) -> dict[str, Bits]:
    found: dict[str, Bits] = {}
    for row in rows:
        found.setdefault(row.layer, {})[row.operand] = row.bits
    return found
