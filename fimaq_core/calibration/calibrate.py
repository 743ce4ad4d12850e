"""Calibration of a whole chain in one walk: block by block, on full-precision inputs and outputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.calibration.layer_ranges import calibrate_conv, calibrate_linear, calibrate_matmul
from fimaq_core.calibration.reparameterize import channel_ranges, reparameterize
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.errors import NumericsError
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul, quant_layers, set_quantized
from fimaq_core.progress import Progress, Report, silent
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
        images: (N, C, H, W) calibration images; the first ``recipe.range_images`` are used.
        recipe: bits and search settings.
        report: receives progress, one unit a block.
        batch_size: images a forward pass.

    Raises:
        NumericsError: a weight or an activation is NaN or infinite; names the layer.
    """
    device = next(chain.parameters()).device
    set_quantized(chain, False)
    x = images[: recipe.range_images].to(device)
    for index, segment in enumerate(chain):
        report(Progress("calibrate", index, len(chain), segment.label))
        captured = _Capture(segment)
        outputs = []
        for part in torch.split(x, batch_size):
            outputs.append(segment(part))
        captured.remove()
        for name, layer in quant_layers(segment.block):
            seen = captured.inputs(name)
            _check_finite(seen, f"{segment.label}.{name}")
            if isinstance(layer, QuantConv2d):
                calibrate_conv(layer, seen[0], recipe)
            elif isinstance(layer, QuantMatMul):
                calibrate_matmul(layer, seen[0], seen[1], recipe)
            else:
                calibrate_linear(layer, _reparameterized(segment, name, layer, seen[0], recipe), recipe)
            captured.forget(name)
        x = torch.cat(outputs)
    report(Progress("calibrate", len(chain), len(chain)))
    set_quantized(chain, True)


def _reparameterized(segment: Segment, name: str, layer: QuantLinear, x: Tensor, recipe: Recipe) -> Tensor:
    """Reparameterise ``layer`` with the norm before it, if it has one, and return its new inputs."""
    bits = layer.input_quantizer.bits
    if not recipe.reparameterize or bits == OFF or bits != layer.weight_quantizer.bits:
        return x
    for pair in segment.pairs:
        if pair.linear == name:
            scale, zero = channel_ranges(x.flatten(0, -2), layer.input_quantizer.levels, recipe.range_candidates)
            pad = None if pair.pad is None else segment.block.get_buffer(pair.pad)
            r, b = reparameterize(pair.norm, layer, scale, zero, pad)
            return x / r - b
    return x


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
