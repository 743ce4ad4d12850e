"""Variables of a block's optimisation, as two flat vectors, and their link to the layers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fimaq_core.chain import Segment
from fimaq_core.layers import WeightLayer, quant_layers
from fimaq_core.quantizers.activation import ActivationQuantizer, Form
from fimaq_core.quantizers.affine import WeightQuantizer
from fimaq_core.quantizers.rounding import RoundingProblem, split_as
from fimaq_core.quantizers.straight_through import StraightThrough

#: Lower bound of a learned activation scale, as a share of its calibrated value.
SCALE_FLOOR = 0.01
#: Share below which a scale counts as near its bound: the last steps may have lifted it a little.
NEAR_FLOOR = 0.02


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the parameters in the flat vectors, in order.

    Blocks of the same structure have equal layouts, so they share the compiled code.
    """

    weights: tuple[tuple[str, tuple[int, ...]], ...]  # weights that are rounded
    scales: tuple[tuple[str, tuple[int, ...]], ...]  # activation scales
    #: names of the activation quantizers' keys; their random masks are streams 1, 2, ..., and
    #: stream 0 mixes the block's input
    keys: tuple[str, ...]

    @property
    def streams(self) -> int:
        """Number of random masks per step."""
        return 1 + len(self.keys)

    def tensors(self, soft: Tensor, scales: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """Return the block's tensors by name, for ``torch.func.functional_call``.

        Args:
            soft: (n,) soft weights.
            scales: (m,) activation scales.
            keys: (streams, 2) keys of the random masks.
        """
        found = {name: keys[number + 1] for number, name in enumerate(self.keys)}
        for flat, entries in ((soft, self.weights), (scales, self.scales)):
            pieces = split_as(flat, [shape for _, shape in entries])
            found |= {name: piece for (name, _), piece in zip(entries, pieces, strict=True)}
        return found


class BlockState:
    """Variables of one block's optimisation.

    With ``straight_through`` the weights themselves are learned, instead of their rounding.
    ``starts`` are the compensated weights of a closed form, whose codes the layers have; None to
    start the roundings at the float weights.
    """

    def __init__(
        self,
        segment: Segment,
        learn_scales: bool,
        *,
        straight_through: bool = False,
        starts: list[Tensor] | None = None,
    ) -> None:
        rounded, activations = list(rounded_layers(segment.block)), active_quantizers(segment)
        self.layers = [layer for _, layer in rounded]  # layers whose weights are learned
        self.quantizers = [quantizer for _, quantizer in activations]  # the activation quantizers
        self.layout = Layout(
            tuple((_join(name, "weight"), tuple(one.weight.shape)) for name, one in rounded),
            tuple((_join(name, "scale"), tuple(one.scale.shape)) for name, one in activations),
            tuple(_join(name, "key") for name, _ in activations),
        )
        #: the problem of the weights, or None if no weight is quantized
        self.rounding: RoundingProblem | StraightThrough | None = None
        #: (n,) current soft weights, those of ``rounding.vectors``
        self.soft = torch.zeros(0, device=next(segment.block.parameters()).device)
        if self.layers:
            quantizers = [layer.weight_quantizer for layer in self.layers]
            own: tuple[list[Tensor], list[Tensor], list[Tensor], list[int]] = (
                [layer.weight for layer in self.layers] if starts is None else starts,
                [one.scale for one in quantizers],
                [one.zero_point for one in quantizers],
                [one.levels for one in quantizers],
            )
            codes = None if starts is None else [one.codes for one in quantizers]
            self.rounding = (
                StraightThrough.build(*own)  # recipes with a start have learned rounding
                if straight_through
                else RoundingProblem.build(*own, codes=codes)
            )
            self.soft = self.rounding.soft()
        scales = [quantizer.scale.detach().flatten() for quantizer in self.quantizers]
        self.scales = torch.cat([self.soft[:0], *scales])  # (m,) current activation scales
        #: (m,) lower bounds of the scales: :data:`SCALE_FLOOR` times the calibrated values
        self.floor = SCALE_FLOOR * self.scales
        self.learn_scales = learn_scales and self.scales.numel() > 0
        variables = self.soft, self.soft, self.scales, self.scales
        #: Adam's first and second moments, of the weights' variables and of the scales
        self.moments = [torch.zeros_like(variable) for variable in variables]

    def scales_near_floor(self) -> int:
        """Return the number of learned scales below :data:`NEAR_FLOOR` of the calibrated value."""
        near = NEAR_FLOOR / SCALE_FLOOR * self.floor
        return int((self.scales < near).sum()) if self.learn_scales else 0

    def attach(self, form: Form, probability: float) -> None:
        """Prepare the layers for soft weights and the quantizers for ``form``.

        ``probability`` is the share of activations that are quantized.
        """
        for layer in self.layers:
            layer.soft = True
        for quantizer in self.quantizers:
            quantizer.learning, quantizer.keep_probability = form, probability

    def detach(self) -> None:
        """End the optimisation and write the scales to their quantizers."""
        for layer in self.layers:
            layer.soft = False
        scales = split_as(self.scales, [quantizer.scale.shape for quantizer in self.quantizers])
        for quantizer, scale in zip(self.quantizers, scales, strict=True):
            quantizer.learning, quantizer.keep_probability = None, 1.0
            quantizer.set_scale(scale)


def active_quantizers(segment: Segment) -> list[tuple[str, ActivationQuantizer]]:
    """Return name (within the block) and quantizer of each activation quantizer that is on."""
    return [
        (name, part)
        for name, part in segment.block.named_modules()
        if isinstance(part, ActivationQuantizer)
        and not (isinstance(part, WeightQuantizer) or part.off)
    ]


def rounded_layers(block: nn.Module) -> Iterator[tuple[str, WeightLayer]]:
    """Yield name and layer of each layer of a block whose weight is quantized."""
    for name, layer in quant_layers(block):
        if isinstance(layer, WeightLayer) and not layer.weight_quantizer.off:
            yield name, layer


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
