"""Layers with a quantizer for the weight and one for the input; :data:`FORMS` lists them."""

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.errors import ModelError
from fimaq_core.quantizers.activation import ActivationQuantizer, outside, take_shapes
from fimaq_core.quantizers.affine import AffineQuantizer, WeightQuantizer
from fimaq_core.quantizers.special import LogQuantizer, make_quantizer
from fimaq_core.recipe import Kind

_Pair = tuple[int, int]


class WeightLayer(nn.Module):
    """Mixin with a quantizer for the weight (per output channel) and one for the input.

    A subclass also inherits from the float layer, and defines :meth:`compute`.
    """

    weight: Tensor  # the first dimension is output channels
    bias: nn.Parameter | None
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer
    quantized_bias: Tensor  # (out,) bias of the quantized form if it differs from `bias`, or empty
    quantized: bool  # False computes the float layer
    soft: bool  # True while `weight` already holds rounded values, so the quantizer is skipped

    @classmethod
    def from_float(
        cls, layer: Any, weight_bits: int, input_bits: int, input_kind: Kind = "uniform"
    ) -> Self:
        """Make a layer with the settings and the same parameters as a float ``layer``.

        An ``input_kind`` other than uniform is for GELU outputs.
        """
        new = cls.__new__(cls)
        nn.Module.__init__(new)  # the float layer's __init__ would make new parameters
        own = {*vars(new), "forward"}
        vars(new).update({name: value for name, value in vars(layer).items() if name not in own})
        new.register_parameter("weight", layer.weight)
        new.register_parameter("bias", layer.bias)
        new.weight_quantizer = WeightQuantizer(weight_bits)
        new.input_quantizer = make_quantizer(input_kind, input_bits, "gelu")
        new.register_buffer("quantized_bias", torch.empty(0))
        new.quantized = new.soft = False
        return new.train(layer.training)

    def problem(self, search: str, calibrated: bool) -> str | None:
        """Return tensor and value that no run gives, or None: ``weight_quantizer.scale is 0``.

        Args:
            search: the recipe's ``range_search``.
            calibrated: False if ranges may be absent.
        """
        inputs, shape = self.input_quantizer, tuple(self.input_quantizer.scale.shape)
        if not (calibrated or inputs.scale.numel() or self.weight_quantizer.scale.numel()):
            return None
        one_sided = search == "percentile"
        if (found := self.weight_quantizer.weight_problem(self.weight, one_sided)) is not None:
            return f"weight_quantizer.{found}"
        if (found := inputs.problem(one_sided)) is not None:
            return f"input_quantizer.{found}"
        tokens = isinstance(self, nn.Linear) and len(shape) == 3 and shape[0] == shape[2] == 1
        if inputs.scale.numel() > 1 and not tokens:
            return f"input_quantizer.scale has the shape {shape}"
        bias = self.quantized_bias
        if bias.numel() and bias.shape != self.weight.shape[:1]:
            return f"quantized_bias has the shape {tuple(bias.shape)}"
        finite = torch.finfo(bias.dtype)
        return outside("quantized_bias", bias, finite.min, finite.max)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the float layer's output for an input, a weight and a bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return self.compute(x, self.weight, self.bias)
        weight = self.weight if self.soft else self.weight_quantizer.quantized(self.weight)
        return self.compute(self.input_quantizer(x), weight, self._quantized_form_bias())

    def _quantized_form_bias(self) -> Tensor | None:
        return self.quantized_bias if self.quantized_bias.numel() else self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        take_shapes(self, ("quantized_bias",), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantLinear(WeightLayer, nn.Linear):  # type: ignore[misc]
    """Linear layer, ``nn.Linear``, with quantizers.

    Example:
        >>> layer = QuantLinear.from_float(nn.Linear(8, 4), weight_bits=4, input_bits=8)
        >>> layer(torch.ones(2, 8)).shape  # full precision until `layer.quantized = True`
        torch.Size([2, 4])
    """

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantConv2d(WeightLayer, nn.Conv2d):  # type: ignore[misc]
    """Convolution, ``nn.Conv2d``, with quantizers."""

    input_quantizer: AffineQuantizer

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = self._conv_forward(x, weight, bias)
        return out


class QuantConvTranspose2d(WeightLayer, nn.ConvTranspose2d):  # type: ignore[misc]
    """Transposed convolution, ``nn.ConvTranspose2d`` without groups, with quantizers.

    The weight is (out, in, height, width); the float layer's is (in, out, height, width).
    """

    input_quantizer: AffineQuantizer

    @classmethod
    def from_float(
        cls, layer: Any, weight_bits: int, input_bits: int, input_kind: Kind = "uniform"
    ) -> Self:
        """Make a layer with the settings, the same bias, and a copy of the weight of ``layer``.

        Raises:
            ModelError: the layer has several groups.
        """
        if layer.groups != 1:
            raise ModelError(
                f"A transposed convolution with {layer.groups} groups is not supported: it must "
                "have one."
            )
        new = super().from_float(layer, weight_bits, input_bits, input_kind)
        weight = layer.weight.detach().transpose(0, 1).contiguous()
        new.weight = nn.Parameter(weight, layer.weight.requires_grad)
        return new

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sizes = cast("tuple[_Pair, _Pair, _Pair]", (self.stride, self.padding, self.output_padding))
        weight = weight.transpose(0, 1).contiguous()
        return F.conv_transpose2d(x, weight, bias, *sizes, dilation=cast(_Pair, self.dilation))


#: Quantizable layer by type of the float layer.
FORMS: dict[type[nn.Module], Any] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
}


def decide_rounding(layer: WeightLayer) -> None:
    """Set the weight's codes to the nearest grid points, unless they are already decided."""
    quantizer = layer.weight_quantizer
    if quantizer.off or quantizer.codes.numel():
        return
    ratio = torch.round(layer.weight.detach().flatten(1) / quantizer.scale)
    quantizer.set_codes((ratio + quantizer.zero_point).clamp(0, quantizer.levels - 1))


def fold_shift(layer: QuantLinear) -> None:
    """Fold the shift of a logarithmic input quantizer into ``quantized_bias``.

    The rounding must be decided. For the shifted quantized input x̂,
    ``Ŵ (x̂ - shift) + b = Ŵ x̂ + (b - shift Ŵ 1)``.
    """
    quantizer = layer.input_quantizer
    if not isinstance(quantizer, LogQuantizer) or quantizer.off or not quantizer.shift:
        return
    if bool(quantizer.folded):
        return
    weight = layer.weight_quantizer.quantized(layer.weight.detach())
    bias = layer._quantized_form_bias()
    added = quantizer.shift * weight.sum(1)
    layer.quantized_bias = -added if bias is None else bias.detach() - added
    quantizer.fold()
