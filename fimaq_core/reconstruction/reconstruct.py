"""The walk over a chain that reconstructs block after block and can go on from any finished block."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.layers import (
    QuantLinear,
    QuantMatMul,
    decide_roundings,
    quant_layers,
    set_quantized,
)
from fimaq_core.progress import OnProgress, Progress, losses_to, silent
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import optimise_block
from fimaq_core.reconstruction.engines import Engine, EngineChoice, choose_engine
from fimaq_core.reconstruction.sample_objective import make_objective
from fimaq_core.reconstruction.state import (
    NEAR_FLOOR,
    SCALE_FLOOR,
    active_quantizers,
    rounded_layers,
)
from fimaq_core.reconstruction.tape import Placement, Storage, Tape
from fimaq_core.samples import Samples


@dataclass
class ReconstructionLog:
    """Facts about a reconstruction, by label of the block."""

    #: last loss, without the regulariser; relative to its start, the head's absolute
    last_loss: dict[str, float] = field(default_factory=dict)
    fisher_passes: dict[str, int] = field(default_factory=dict)  # number of Fisher passes
    #: sentences about anything that did not go as the recipe says
    notes: list[str] = field(default_factory=list)
    engine: Engine = "fused"  # how steps ran
    #: ``||q - f||² / ||f||²`` over all samples: q the block's output with it and all before it
    #: quantized, f the full-precision model's
    error: dict[str, float] = field(default_factory=dict)
    #: mean of the diagonal Fisher weight in the loss; no entry for losses without
    fisher: dict[str, float] = field(default_factory=dict)
    #: number of learned activation scales that ended at or near their lower bound; no entry for
    #: none
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
        for name, value, place in (
            ("output error", error, self.error),
            ("Fisher weight", fisher, self.fisher),
        ):
            if value is not None and math.isfinite(value):
                place[label] = value
            elif value is not None:
                self.notes.append(f"{label}: its {name} is {value}")


def reconstruct(
    chain: BlockChain,
    images: Samples | Tensor,
    recipe: Recipe,
    divergence: Divergence,
    *,
    on_progress: OnProgress = silent,
    placement: Placement = "device",
    batch_size: int = 32,
    engine: EngineChoice = "auto",
    teacher: BlockChain | None = None,
    restore: Callable[[int, Segment], bool] = lambda index, segment: False,
    save: Callable[[int, Segment, ReconstructionLog], None] = lambda index, segment, log: None,
) -> ReconstructionLog:
    """Reconstruct every block of a calibrated chain, in place and in forward order.

    Predictors stay as calibrated. Everything runs on the chain's device.

    Args:
        images: (n, ...) calibration inputs of the chain, on any device; where shapes vary they are
            taken one by one in their order.
        on_progress: receives progress, one unit per step.
        placement: where the tape lives.
        batch_size: samples a forward pass of tape and Fisher passes (not of the optimisation).
        engine: how steps run, see :mod:`fimaq_core.reconstruction.engines`.
        teacher: the full-precision model, where it is not ``chain`` without quantizers (after MLP
            reconstruction): gives targets, full-precision inputs and what lies behind a block.
        restore: called for each block first; loads a finished one and returns True, or returns
            False.
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
    samples, device = Samples.of(images), next(chain.parameters()).device
    samples.check_batch(recipe.batch_size, "batch_size")
    log = ReconstructionLog(engine=choose_engine(engine, device, recipe.steps, samples.varying))
    if recipe.per_token:
        expand_per_token(chain, samples[0].to(device))
    set_quantized(chain, False)
    model = chain if teacher is None else teacher
    reference = divergence.reference(
        samples.map(lambda part: model(part.to(device)).float(), batch_size)
    )
    tape = Tape(
        chain,
        samples,
        Storage(placement, device, pinned=not samples.varying),
        with_prefix=True,  # where inputs are not mixed, for the error of outputs
        batch_size=batch_size,
        frozen_dtype=recipe.frozen_dtype,
        teacher=teacher,
    )
    begin = Progress("reconstruct", 0, len(learning) * recipe.steps)
    for index, segment in enumerate(chain):
        label = segment.label
        begin = replace(begin, block=label)
        if segment not in learning:
            decide_roundings(segment.block)  # left as calibrated
        elif not restore(index, segment):
            on_progress(begin)
            tape.compute_target()
            objective = make_objective(chain, tape, recipe, reference, divergence, log.notes)

            def on_pass(starts: bool, step: int, begin: Progress = begin) -> None:
                stage = "Fisher pass" if starts else begin.stage
                on_progress(replace(begin, stage=stage, done=begin.done + step))

            tick = losses_to(
                on_progress,
                begin,
                recipe.steps,
                "the reconstruction loss",
                "lower the learning rates",
            )
            loss, near_floor = optimise_block(
                segment, tape, objective, recipe, log.engine, on_pass, tick
            )
            log.last_loss[label] = float(loss)
            if near_floor:
                log.near_floor[label] = near_floor
            log.fisher_passes[label] = objective.passes
            fisher = objective.mean_weight()
            del objective  # its Fisher information goes before the next block's is made
            log.keep(label, tape.measure(keep=segment is not learning[-1]), fisher)
            save(index, segment, log)
            on_progress(replace(begin, done=begin.done + recipe.steps, tape_bytes=tape.nbytes))
        if segment in learning:
            begin = replace(begin, done=begin.done + recipe.steps)
        if segment is learning[-1]:
            break
        tape.advance()
    decide_roundings(chain)  # what is behind the last of them
    set_quantized(chain, True)
    on_progress(Progress("reconstruct", begin.total, begin.total))
    return log


def _learns(segment: Segment, recipe: Recipe) -> bool:
    """True if a segment has something to learn and the recipe wants it."""
    if segment.kind == "predictor" or (
        recipe.reconstruct_parts == "blocks" and segment.kind not in ("block", "merge")
    ):
        return False
    return bool(active_quantizers(segment)) or any(True for _ in rounded_layers(segment.block))


@torch.no_grad()
def expand_per_token(chain: BlockChain, image: Tensor) -> None:
    """Give activation quantizers one scale per token position, starting from the calibrated one.

    Linear layers with inputs (B, tokens, C): (1, tokens, 1). Attention operands: a per head and
    row, b per head and column. Zero points stay shared. Other inputs stay per tensor, such as maps
    (B, H, W, C): where images vary in size, only windows have a fixed number of tokens. Quantizers
    expanded before are left alone. Of ``image`` (1, ...) only the shape matters.
    """
    layers = [
        layer for _, layer in quant_layers(chain) if isinstance(layer, QuantLinear | QuantMatMul)
    ]
    handles = [layer.register_forward_pre_hook(_expand) for layer in layers]
    chain(image)
    for handle in handles:
        handle.remove()


def _expand(layer: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
    if isinstance(layer, QuantLinear):
        x = layer.input_quantizer
        # Special quantizers have one scale.
        if (
            isinstance(x, AffineQuantizer)
            and args[0].ndim == 3
            and not x.off
            and x.scale.numel() == 1
        ):
            x.set_range(x.scale.expand(1, args[0].shape[1], 1), x.zero_point)
    elif isinstance(layer, QuantMatMul):
        a, b = layer.a_quantizer, layer.b_quantizer
        if isinstance(a, AffineQuantizer) and not a.off and a.scale.shape[2] == 1:
            a.set_range(a.scale.expand(-1, -1, args[0].shape[2], -1), a.zero_point)
        if not b.off and b.scale.shape[3] == 1:
            b.set_range(b.scale.expand(-1, -1, -1, args[1].shape[3]), b.zero_point)
