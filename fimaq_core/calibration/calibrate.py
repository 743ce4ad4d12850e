"""Calibration of a whole chain in one walk: block by block, on full-precision inputs and outputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.calibration.error_reduction import reduce_conv_error, reduce_linear_error
from fimaq_core.calibration.layer_ranges import calibrate_conv, calibrate_linear, calibrate_matmul
from fimaq_core.calibration.percentile_ranges import conv_percentiles, linear_percentiles, matmul_percentiles
from fimaq_core.calibration.reparameterize import channel_ranges, reparameterize
from fimaq_core.calibration.special_layers import calibrate_after_gelu, calibrate_after_softmax
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.errors import NumericsError
from fimaq_core.layers import QuantConv2d, QuantLayer, QuantLinear, QuantMatMul, quant_layers, set_quantized
from fimaq_core.progress import Progress, Report, silent
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.recipe import OFF, Recipe


@torch.no_grad()
def calibrate(chain: BlockChain, images: Tensor, recipe: Recipe, report: Report = silent, batch_size: int = 32) -> None:
    """Set all ranges of ``chain``, in place. Afterwards its layers are switched to their quantized form.

    Every layer is calibrated on what it sees in the full-precision model, so each block runs once. LayerNorm
    reparameterisation (where the recipe asks for it) changes norms and weights, but not the float function.

    Time grows in proportion to the images, but for the weights' searches, which see only moments of the inputs. Memory: the
    block's output and the inputs of all its quantizable layers for all images (N x values an image x 4 bytes), about five
    copies of one layer's inputs while it is searched, and temporaries that do not depend on N.

    Args:
        chain: the model.
        images: (N, ...) inputs of the chain, the calibration images; the first ``recipe.range_images`` are used.
        recipe: bits and search settings.
        report: receives progress, one unit a block.
        batch_size: images a forward pass.

    Raises:
        NumericsError: a weight or an activation is NaN or infinite; names the layer.
    """
    device = next(chain.parameters()).device
    set_quantized(chain, False)
    if not any(_quantizes(layer) for _, layer in quant_layers(chain)):
        set_quantized(chain, True)
        return
    x = images[: recipe.range_images].to(device)
    side = chain.side_of(x)
    sides = [None] * len(torch.split(x, batch_size)) if side is None else list(torch.split(side, batch_size))
    for index, segment in enumerate(chain):
        report(Progress("calibrate", index, len(chain), segment.label))
        captured = _Capture(segment)
        outputs = []
        for part, beside in zip(torch.split(x, batch_size), sides, strict=True):
            outputs.append(segment(part, beside))
        captured.remove()
        for name, layer in quant_layers(segment.block):
            seen = captured.inputs(name)
            _check_finite(seen, f"{segment.label}.{name}")
            _calibrate_layer(segment, name, layer, seen, recipe)
            captured.forget(name)
        x = torch.cat(outputs)
    report(Progress("calibrate", len(chain), len(chain)))
    set_quantized(chain, True)


def _quantizes(layer: QuantLayer) -> bool:
    """Whether any of the layer's quantizers is on."""
    return not all(part.off for part in layer.children() if isinstance(part, ActivationQuantizer))


def _calibrate_layer(segment: Segment, name: str, layer: QuantLayer, seen: tuple[Tensor, ...], recipe: Recipe) -> None:
    """Set the ranges of the layer ``name`` of a segment's block from its full-precision inputs."""
    percentile = recipe.range_search == "percentile"
    if isinstance(layer, QuantConv2d):
        if percentile:
            conv_percentiles(layer, seen[0])
        else:
            calibrate_conv(layer, seen[0], recipe)
        if recipe.refit:
            reduce_conv_error(layer, seen[0], recipe)
    elif isinstance(layer, QuantMatMul):
        if percentile:
            matmul_percentiles(layer, seen[0], seen[1])
        elif isinstance(layer.a_quantizer, AffineQuantizer):
            calibrate_matmul(layer, seen[0], seen[1], recipe)
        else:
            calibrate_after_softmax(layer, seen[0], seen[1], recipe)
    else:
        x, common = _reparameterized(segment, name, layer, seen[0], recipe)
        if percentile:
            linear_percentiles(layer, x, common)
        elif isinstance(layer.input_quantizer, AffineQuantizer):
            calibrate_linear(layer, x, recipe)
        else:
            calibrate_after_gelu(layer, x, recipe)
        if recipe.refit:
            reduce_linear_error(layer, x, recipe)


def _reparameterized(
    segment: Segment, name: str, layer: QuantLinear, x: Tensor, recipe: Recipe
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Reparameterise ``layer`` with the norm before it, if it has one; return its new inputs and their range (scalars)."""
    bits, percentile = layer.input_quantizer.bits, recipe.range_search == "percentile"
    if not recipe.reparameterize or bits == OFF or not (percentile or bits == layer.weight_quantizer.bits):
        return x, None
    for pair in segment.pairs:
        if pair.linear == name:
            scale, zero = channel_ranges(x.flatten(0, -2), layer.input_quantizer.levels, recipe)
            pad = None if pair.pad is None else segment.block.get_buffer(pair.pad)
            r, b = reparameterize(pair.norm, layer, scale, zero, pad)
            return x / r - b, (scale.mean(), zero.mean().round())
    return x, None


class _Capture:
    """Collects the positional inputs of every quantizable layer of a segment's block."""

    def __init__(self, segment: Segment) -> None:
        self._seen: dict[str, list[tuple[Tensor, ...]]] = {}
        self._handles = []
        for name, layer in quant_layers(segment.block):
            self._seen[name] = []
            self._handles.append(layer.register_forward_pre_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._seen[name].append(args)

        return keep

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        """All inputs of the layer, concatenated over batches."""
        return tuple(torch.cat(parts) for parts in zip(*self._seen[name], strict=True))

    def forget(self, name: str) -> None:
        """Free the layer's inputs."""
        del self._seen[name]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _check_finite(tensors: tuple[Tensor, ...], where: str) -> None:
    for tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise NumericsError(
                f"The input of {where} has NaN or infinite values in full precision: "
                "check the images, their normalisation and the weights."
            )
