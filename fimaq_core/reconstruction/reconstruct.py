"""The walk over a chain that reconstructs block after block and can go on from any finished block."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.errors import NumericsError, RecipeError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.layers import QuantLinear, QuantMatMul, decide_roundings, quant_layers, set_quantized
from fimaq_core.progress import FEW_STEPS, Progress, Report, silent
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import optimise_block
from fimaq_core.reconstruction.engines import Engine, EngineChoice, choose_engine
from fimaq_core.reconstruction.sample_objective import make_objective
from fimaq_core.reconstruction.state import NEAR_FLOOR, SCALE_FLOOR, active_quantizers, rounded_layers
from fimaq_core.reconstruction.tape import Placement, Storage, Tape
from fimaq_core.samples import Ragged, Samples, batches, check_alone, joined


@dataclass
class ReconstructionLog:
    """What a reconstruction did.

    Attributes:
        last_loss: last loss of each block by label (without the regulariser; relative to its start, the head's absolute).
        fisher_passes: Fisher passes of each block by label.
        notes: sentences about anything that did not go as the recipe says.
        engine: how steps ran.
        error: ``||q - f||² / ||f||²`` of each reconstructed block by label, over all samples: q its output with all before it and
            itself quantized, f the full-precision model's.
        fisher: mean of the diagonal Fisher weight in each block's loss by label; none of losses without.
        near_floor: number of learned activation scales that ended at or near their lower bound,
            by label of the block; no entry for blocks without any.
    """

    last_loss: dict[str, float] = field(default_factory=dict)
    fisher_passes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    engine: Engine = "fused"
    error: dict[str, float] = field(default_factory=dict)
    fisher: dict[str, float] = field(default_factory=dict)
    near_floor: dict[str, int] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """The notes, and one about all scales at or near their lower bound."""
        if not self.near_floor:
            return self.notes
        blocks = ", ".join(f"{label} {count}" for label, count in self.near_floor.items())
        return [
            *self.notes,
            f"Learned activation scales that ended at or near their lower bound (below {NEAR_FLOOR:g} of "
            f"the calibrated value; the bound is {SCALE_FLOOR:g}): {sum(self.near_floor.values())} "
            f"({blocks}). A lower lr_scale moves them less.",
        ]

    def keep(self, label: str, error: float, fisher: float | None) -> None:
        """Keep the figures of a block; one that is not finite goes into a note instead."""
        for name, value, place in (("output error", error, self.error), ("Fisher weight", fisher, self.fisher)):
            if value is not None and math.isfinite(value):
                place[label] = value
            elif value is not None:
                self.notes.append(f"{label}: its {name} is {value}")


def reconstruct(
    chain: BlockChain,
    images: Samples,
    recipe: Recipe,
    divergence: Divergence,
    *,
    report: Report = silent,
    placement: Placement = "device",
    batch_size: int = 32,
    engine: EngineChoice = "auto",
    teacher: BlockChain | None = None,
    restore: Callable[[int, Segment], bool] = lambda index, segment: False,
    save: Callable[[int, Segment, ReconstructionLog], None] = lambda index, segment, log: None,
) -> ReconstructionLog:
    """Reconstruct every block of a calibrated chain, in place and in forward order; predictors stay as calibrated.

    Args:
        chain: calibrated; its device is where everything runs.
        images: (n, ...) inputs of the chain, the calibration images, on any device; those of varying shapes are taken
            one by one in their order.
        recipe: all settings.
        divergence: of the task, behind the Fisher passes.
        report: receives progress, one unit a step.
        placement: where the tape lives.
        batch_size: images a forward pass (the tape and Fisher passes; not the optimisation's batch).
        engine: how steps run, see :mod:`fimaq_core.reconstruction.engines`.
        teacher: the full-precision model where ``chain`` without quantizers is another one (after MLP reconstruction);
            targets, full-precision inputs and everything behind a block are then the teacher's.
        restore: called for each block first; loads a finished block and returns True, or returns False.
        save: called after each block that was optimised.

    Raises:
        RecipeError: fewer images than a batch, or a batch of images of varying shapes.
        EngineError: the engine asked for cannot run here.
        NumericsError: a loss or a scale is NaN or infinite.
    """
    learning = [segment for segment in chain if _learns(segment, recipe)]
    if not learning:
        decide_roundings(chain)
        set_quantized(chain, True)
        return ReconstructionLog()
    check_alone(images, recipe.batch_size, "batch_size")
    if len(images) < recipe.batch_size:
        raise RecipeError(
            f"{len(images)} calibration images are fewer than a batch of {recipe.batch_size}: "
            "lower batch_size or give more images."
        )
    device = next(chain.parameters()).device
    varying, total = isinstance(images, Ragged), len(learning) * recipe.steps
    log = ReconstructionLog(engine=choose_engine(engine, device, recipe.steps, varying))
    if recipe.per_token:
        expand_per_token(chain, next(batches(images, 1)).to(device))
    set_quantized(chain, False)
    reference = divergence.reference(_outputs(chain if teacher is None else teacher, images, device, batch_size))
    tape = Tape(
        chain,
        images,
        Storage(placement, device, pinned=not varying),
        with_prefix=True,  # where inputs are not mixed, for the error of outputs
        batch_size=batch_size,
        frozen_dtype=recipe.frozen_dtype,
        teacher=teacher,
    )
    start = 0
    for index, segment in enumerate(chain):
        if segment not in learning:
            decide_roundings(segment.block)  # left as calibrated
        elif not restore(index, segment):
            report(Progress("reconstruct", start, total, segment.label))
            tape.compute_target()
            objective = make_objective(chain, tape, recipe, reference, divergence, log.notes)

            def tick(step: int, loss: Tensor, start: int = start, label: str = segment.label) -> None:
                # Reading the loss makes a GPU wait, so it happens rarely; a few steps are for
                # finding out how long one takes.
                if step % 50 == 0 or step == recipe.steps or recipe.steps <= FEW_STEPS:
                    if not math.isfinite(float(loss)):
                        raise NumericsError(f"{label}: the reconstruction loss is {float(loss)}; lower the learning rates.")
                    report(Progress("reconstruct", start + step, total, label, float(loss)))

            def on_pass(begins: bool, step: int, start: int = start, label: str = segment.label) -> None:
                stage = "Fisher pass" if begins else "reconstruct"
                report(Progress(stage, start + step, total, label))

            loss, near_floor = optimise_block(segment, tape, objective, recipe, log.engine, on_pass, tick)
            log.last_loss[segment.label] = float(loss)
            if near_floor:
                log.near_floor[segment.label] = near_floor
            log.fisher_passes[segment.label] = objective.passes
            fisher = objective.mean_weight()
            del objective  # its Fisher information goes before the outputs and the next block's are made
            log.keep(segment.label, tape.measure(keep=segment is not learning[-1]), fisher)
            save(index, segment, log)
            done = Progress("reconstruct", start + recipe.steps, total, segment.label)
            report(replace(done, tape_bytes=tape.nbytes))
        start += recipe.steps if segment in learning else 0
        if segment is learning[-1]:
            break
        tape.advance()
    for segment in chain:  # what is behind the last of them
        decide_roundings(segment.block)
    set_quantized(chain, True)
    report(Progress("reconstruct", total, total))
    return log


def _learns(segment: Segment, recipe: Recipe) -> bool:
    """Whether there is something to learn in a segment, and the recipe wants it."""
    if segment.kind == "predictor" or (recipe.reconstruct_parts == "blocks" and segment.kind not in ("block", "merge")):
        return False
    return bool(active_quantizers(segment)) or any(True for _ in rounded_layers(segment.block))


@torch.no_grad()
def _outputs(chain: BlockChain, images: Samples, device: torch.device, batch_size: int) -> Samples:
    return joined([chain(part.to(device)).float() for part in batches(images, batch_size)], images)


@torch.no_grad()
def expand_per_token(chain: BlockChain, image: Tensor) -> None:
    """Give activation quantizers one scale per token position, all starting from the calibrated one.

    Linear layers with inputs (B, tokens, C): (1, tokens, 1). Attention operands: a per head and row, b per head and
    column. Zero points stay shared. Quantizers expanded before are left alone. Other inputs stay per tensor: where images vary
    in size, only windows have a fixed number of tokens, and other inputs come as maps (B, H, W, C).

    Args:
        chain: calibrated.
        image: (1, ...) one input of the chain; only its shape matters.
    """
    handles = []
    for _, layer in quant_layers(chain):
        if isinstance(layer, QuantMatMul):
            handles.append(layer.register_forward_pre_hook(_expand_matmul))
        elif isinstance(layer, QuantLinear):
            handles.append(layer.register_forward_pre_hook(_expand_linear))
    chain(image)
    for handle in handles:
        handle.remove()


def _expand_linear(layer: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
    assert isinstance(layer, QuantLinear)
    quantizer = layer.input_quantizer
    if not isinstance(quantizer, AffineQuantizer):  # special quantizers have one scale
        return
    if args[0].ndim == 3 and not quantizer.off and quantizer.scale.numel() == 1:
        quantizer.set_range(quantizer.scale.expand(1, args[0].shape[1], 1), quantizer.zero_point)


def _expand_matmul(layer: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
    assert isinstance(layer, QuantMatMul)
    a, b = layer.a_quantizer, layer.b_quantizer
    if isinstance(a, AffineQuantizer) and not a.off and a.scale.shape[2] == 1:
        a.set_range(a.scale.expand(-1, -1, args[0].shape[2], -1), a.zero_point)
    if not b.off and b.scale.shape[3] == 1:
        b.set_range(b.scale.expand(-1, -1, -1, args[1].shape[3]), b.zero_point)
