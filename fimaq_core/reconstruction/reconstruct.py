"""Reconstruction of a chain, block after block; it can resume after any block."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.checkpoint import Pieces
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.layers import QuantLinear, QuantMatMul, decide_roundings, set_quantized
from fimaq_core.progress import Progress, losses_to
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import optimise_block
from fimaq_core.reconstruction.engines import choose_engine
from fimaq_core.reconstruction.log import ReconstructionLog, add_block, block_facts
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.sample_objective import SampleObjective
from fimaq_core.reconstruction.starts import round_block
from fimaq_core.reconstruction.state import active_quantizers, rounded_layers
from fimaq_core.reconstruction.tape import start_walk
from fimaq_core.resources import Resources
from fimaq_core.samples import Samples


def reconstruct(
    chain: BlockChain,
    images: Samples | Tensor,
    recipe: Recipe,
    divergence: Divergence,
    *,
    resources: Resources = Resources(),
    teacher: BlockChain | None = None,
    pieces: Pieces = Pieces(),
) -> ReconstructionLog:
    """Reconstruct the blocks of a calibrated chain, in place and in forward order.

    Predictors stay as calibrated. Everything runs on the chain's device.

    Args:
        images: (n, ...) calibration inputs of the chain, on any device. Images of varying shapes
            are taken one by one in their order.
        resources: settings of the run; progress has one unit per step.
        teacher: the full-precision model for targets, inputs and the rest behind a block; by
            default ``chain`` without quantizers. MLP reconstruction gives another one.
        pieces: finished blocks; each is loaded if it exists, and saved after its optimisation.

    Raises:
        RecipeError: fewer images than a batch, or a batch of images of varying shapes.
        EngineError: the chosen step engine cannot run here.
        NumericsError: a loss or a scale is NaN or infinite.
        CheckpointError: a finished block belongs to another run or is damaged.
    """
    learning = [segment for segment in chain if _learns(segment, recipe)]
    if not learning:
        decide_roundings(chain)
        set_quantized(chain, True)
        return ReconstructionLog()
    samples, device = Samples.of(images), next(chain.parameters()).device
    samples.check_batch(recipe.batch_size, "batch_size")
    engine = choose_engine(resources.engine, device, recipe.steps, samples.varying)
    if recipe.per_token:
        expand_per_token(chain, samples[0].to(device))
    set_quantized(chain, False)
    # The output error needs the prefix, also if inputs are not mixed.
    run = recipe, divergence, resources
    tape, reference = start_walk(chain, samples, *run, with_prefix=True, teacher=teacher)
    if recipe.loss == "glf":
        reference = tape.features(samples)  # once, since all blocks compare with the same ones
    objective_of = SampleObjective if samples.varying else BlockObjective
    # A closed form also rounds the segments that learn nothing.
    last = learning[-1] if recipe.start == "nearest" else chain.segment(len(chain) - 1)
    log, on_progress = ReconstructionLog(engine=engine), resources.on_progress
    begin = Progress("reconstruct", 0, len(learning) * recipe.steps)
    earlier: list[str] = []  # notes of finished blocks
    others: list[str] = []  # notes on finished blocks of another step engine
    for index, segment in enumerate(chain):
        label = segment.label
        begin = replace(begin, block=label)
        if segment not in learning:
            if recipe.start != "nearest":
                round_block(tape, recipe, notes=log.notes)
            decide_roundings(segment.block)
        elif (found := pieces.load(index, segment.block)) is not None:
            notes, own = add_block(log, label, *found)
            earlier += [note for note in notes if note not in earlier]
            if own != engine:  # the record names only one engine
                others.append(f"{label}: reconstructed earlier by the step engine '{own}'")
        else:
            on_progress(begin)
            tape.compute_target()
            objective = objective_of(chain, tape, recipe, reference, divergence, log.notes)

            def on_pass(starts: bool, step: int, begin: Progress = begin) -> None:
                stage = "Fisher pass" if starts else begin.stage
                on_progress(replace(begin, stage=stage, done=begin.done + step))

            advice = "lower the learning rates"
            tick = losses_to(on_progress, begin, recipe.steps, "the reconstruction loss", advice)
            loss, near_floor = optimise_block(segment, objective, engine, on_pass, tick)
            log.last_loss[label] = float(loss)
            if near_floor:
                log.near_floor[label] = near_floor
            log.fisher_passes[label] = objective.passes
            fisher = objective.mean_weight()
            del objective  # frees its Fisher information before the next block's is made
            log.keep(label, tape.measure(keep=segment is not last), fisher)
            pieces.save(index, segment.block, block_facts(log, label))
            on_progress(replace(begin, done=begin.done + recipe.steps, tape_bytes=tape.nbytes))
        if segment in learning:
            begin = replace(begin, done=begin.done + recipe.steps)
        if segment is last:
            break
        tape.advance()
    decide_roundings(chain)  # the segments behind the last one
    set_quantized(chain, True)
    log.notes[:0] = earlier + others
    on_progress(Progress("reconstruct", begin.total, begin.total))
    return log


def _learns(segment: Segment, recipe: Recipe) -> bool:
    """Return True if the recipe reconstructs this segment and it has variables to learn."""
    left_out = recipe.reconstruct_parts == "blocks" and segment.kind not in ("block", "merge")
    if left_out or segment.kind == "predictor":
        return False
    return bool(active_quantizers(segment)) or any(True for _ in rounded_layers(segment.block))


@torch.no_grad()
def expand_per_token(chain: BlockChain, image: Tensor) -> None:
    """Give activation quantizers one scale per token position; each starts at the calibrated scale.

    Linear layers with inputs (B, tokens, C) get scales (1, tokens, 1). Attention operands get one
    scale per head and row (a), or per head and column (b). Zero points stay shared. Other inputs
    keep one scale, such as maps (B, H, W, C), whose number of tokens may vary. Expanded quantizers
    stay as they are. ``image`` (1, ...) is one input of the chain; only its shape matters.
    """
    layers = [layer for layer in chain.modules() if isinstance(layer, QuantLinear | QuantMatMul)]
    handles = [layer.register_forward_pre_hook(_expand) for layer in layers]
    chain(image)
    for handle in handles:
        handle.remove()


def _expand(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    if isinstance(layer, QuantLinear):
        x, shared = layer.input_quantizer, layer.input_quantizer.scale.numel() == 1
        # Special quantizers have one scale.
        if isinstance(x, AffineQuantizer) and args[0].ndim == 3 and not x.off and shared:
            x.set_range(x.scale.expand(1, args[0].shape[1], 1), x.zero_point)
    elif isinstance(layer, QuantMatMul):
        a, b = layer.a_quantizer, layer.b_quantizer
        if isinstance(a, AffineQuantizer) and not a.off and a.scale.shape[2] == 1:
            a.set_range(a.scale.expand(-1, -1, args[0].shape[2], -1), a.zero_point)
        if not b.off and b.scale.shape[3] == 1:
            b.set_range(b.scale.expand(-1, -1, -1, args[1].shape[3]), b.zero_point)
