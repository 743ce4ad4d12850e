"""Closed-form roundings along a chain: as final weights, or as starts of learned rounding."""

import logging

import torch
from torch import Tensor, nn

from fimaq_core.calibration.closed_form import LayerMoments, round_layer
from fimaq_core.chain import BlockChain
from fimaq_core.errors import NumericsError
from fimaq_core.layers import WeightLayer, set_quantized
from fimaq_core.numerics import arithmetic
from fimaq_core.progress import Progress
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.state import rounded_layers
from fimaq_core.reconstruction.tape import Storage, Tape
from fimaq_core.resources import Resources
from fimaq_core.samples import Samples

logger = logging.getLogger(__name__)


def round_closed_form(
    chain: BlockChain,
    images: Samples | Tensor,
    recipe: Recipe,
    *,
    resources: Resources,
    notes: list[str],
) -> None:
    """Round all weights of a calibrated chain by the recipe's ``start``, in place.

    Blocks are rounded in forward order on all ``images`` (n, ...), see :func:`round_block`. The
    chain is left in its quantized form.
    """
    set_quantized(chain, False)
    device, on_progress = next(chain.parameters()).device, resources.on_progress
    samples = Samples.of(images)
    storage = Storage(resources.placement, device, pinned=not samples.varying)
    batches, dtype = resources.batch_size, recipe.frozen_dtype
    tape = Tape(chain, samples, storage, with_prefix=True, batch_size=batches, frozen_dtype=dtype)
    for index, segment in enumerate(chain):
        on_progress(Progress("round weights", index, len(chain), segment.label))
        round_block(tape, recipe, notes=notes)
        if index + 1 < len(chain):
            tape.advance()
    on_progress(Progress("round weights", len(chain), len(chain)))
    set_quantized(chain, True)


@torch.no_grad()
def round_block(tape: Tape, recipe: Recipe, *, notes: list[str]) -> list[Tensor]:
    """Round the weights of the tape's current block in closed form; layers get their codes.

    Layers are rounded in the order of their first calls, each on its inputs behind quantized
    activations and the weights that are rounded already. GPTAQ's full-precision inputs are those of
    the chain's own layers in full precision. The block is left in its quantized form.

    ``notes`` gets a sentence about each damping that had to be raised.

    Returns:
        The compensated weight (rows, ...) of each layer of :func:`.state.rounded_layers`.

    Raises:
        NumericsError: a layer's inputs are NaN or infinite.
    """
    segment = tape.chain.segment(tape.index)
    block, damp, asymmetric = segment.block, recipe.start_damp, recipe.start == "gptaq"
    layers, found = dict(rounded_layers(block)), dict[str, Tensor]()
    prefix = tape.full if tape.prefix is None else tape.prefix
    for name in _call_order(tape, block, layers):
        layer, moments = layers[name], LayerMoments(layers[name])
        for rows in prefix.slices(tape.batch_size):
            inputs = _inputs(tape, block, layer, prefix[rows], quantized=True)
            plain: list[Tensor] | list[None] = [None] * len(inputs)
            if asymmetric:
                plain = _inputs(tape, block, layer, tape.full[rows], quantized=False)
            for x, full in zip(inputs, plain, strict=True):
                moments.add(x, full)
        try:
            codes, weight, used = round_layer(moments, damp, asymmetric=asymmetric)
        except NumericsError as error:
            raise NumericsError(f"{segment.label}.{name}: {error}") from error
        layer.weight_quantizer.set_codes(codes)
        found[name] = weight.view_as(layer.weight)
        if used > damp:
            sentence = f"the inputs of {name} are near singular, so start_damp was {used:g} there"
            notes.append(f"{segment.label}: {sentence}")
            logger.warning(notes[-1])
    set_quantized(block, True)
    return [found[name] for name in layers]


def _call_order(tape: Tape, block: nn.Module, layers: dict[str, WeightLayer]) -> list[str]:
    """Return the names of ``layers`` in the order of their first calls; the uncalled come last."""
    called: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: called.append(name))
        for name, layer in layers.items()
    ]
    _run(tape, block, tape.full[next(tape.full.slices(1))])
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys([*called, *layers]))


def _inputs(
    tape: Tape, block: nn.Module, layer: WeightLayer, x: Tensor, *, quantized: bool
) -> list[Tensor]:
    """Return the inputs of each call of ``layer`` while the block runs on ``x`` (B, ...)."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    set_quantized(block, quantized)
    _run(tape, block, x)
    handle.remove()
    return seen


def _run(tape: Tape, block: nn.Module, x: Tensor) -> None:
    device = tape.storage.device
    with arithmetic("float32", device):
        block(x.to(device))
