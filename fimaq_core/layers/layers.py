"""Linear layer, convolutions and matrix product with quantizers. ``quantized = False`` gives the float layer."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.errors import ModelError
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.quantizers.special import LogQuantizer, make_quantizer
from fimaq_core.quantizers.weight import WeightQuantizer
from fimaq_core.recipe import Kind


class QuantLinear(nn.Linear):
    """``nn.Linear`` with a weight quantizer (per output channel) and an input quantizer.

    Attributes:
        quantized_bias: (out,) bias of the quantized form where it is not the float layer's; else empty.
    """

    quantized_bias: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, weight_bits: int, input_bits: int, input_kind: Kind = "uniform"
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.weight_quantizer = WeightQuantizer(weight_bits)
        self.input_quantizer: ActivationQuantizer = make_quantizer(input_kind, input_bits, "gelu")
        self.register_buffer("quantized_bias", torch.empty(0))
        self.quantized = False
        #: Whether ``weight`` stands for its own quantized form (the soft rounding of an optimisation step).
        self.soft = False

    @classmethod
    def from_float(cls, layer: nn.Linear, weight_bits: int, input_bits: int, input_kind: Kind = "uniform") -> "QuantLinear":
        """Take over weight and bias (the same parameters) of ``layer``; ``input_kind`` other than uniform is for GELU outputs."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, weight_bits, input_bits, input_kind)
        new.weight, new.bias = layer.weight, layer.bias
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return F.linear(x, self.weight, self.bias)
        return F.linear(self.input_quantizer(x), _effective_weight(self), _effective_bias(self))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _take_bias_shape(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a weight quantizer (per output channel) and an input quantizer."""

    weight_quantizer: WeightQuantizer
    input_quantizer: AffineQuantizer
    quantized_bias: Tensor
    quantized: bool
    soft: bool

    @classmethod
    def from_float(cls, layer: nn.Conv2d, weight_bits: int, input_bits: int) -> "QuantConv2d":
        """Take over weight and bias (the same parameters) of ``layer``."""
        new = cls(
            layer.in_channels,
            layer.out_channels,
            cast(tuple[int, int], layer.kernel_size),
            stride=cast(tuple[int, int], layer.stride),
            padding=cast("tuple[int, int] | str", layer.padding),
            dilation=cast(tuple[int, int], layer.dilation),
            groups=layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
        )
        new.weight, new.bias = layer.weight, layer.bias
        new.weight_quantizer = WeightQuantizer(weight_bits)
        new.input_quantizer = AffineQuantizer(input_bits)
        new.register_buffer("quantized_bias", torch.empty(0))
        new.quantized = False
        new.soft = False
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            out: Tensor = self._conv_forward(x, self.weight, self.bias)
            return out
        out = self._conv_forward(self.input_quantizer(x), _effective_weight(self), _effective_bias(self))
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _take_bias_shape(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantConvTranspose2d(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` without groups, with a weight quantizer (per output channel) and an input quantizer.

    Attributes:
        weight: (out, in, height, width): the rows of ``weight.flatten(1)`` are output channels, as in the other layers. (The
            float layer's first two dimensions are the other way round.)
    """

    weight_quantizer: WeightQuantizer
    input_quantizer: AffineQuantizer
    quantized_bias: Tensor
    quantized: bool
    soft: bool

    @classmethod
    def from_float(cls, layer: nn.ConvTranspose2d, weight_bits: int, input_bits: int) -> "QuantConvTranspose2d":
        """Take over the bias (the same parameter) of ``layer``, and its weight in this class's layout.

        Raises:
            ModelError: the layer works in groups.
        """
        if layer.groups != 1:
            raise ModelError(f"A transposed convolution in {layer.groups} groups is not supported: it must have one.")
        new = cls(
            layer.in_channels,
            layer.out_channels,
            cast(tuple[int, int], layer.kernel_size),
            stride=cast(tuple[int, int], layer.stride),
            padding=cast(tuple[int, int], layer.padding),
            output_padding=cast(tuple[int, int], layer.output_padding),
            bias=layer.bias is not None,
            dilation=cast(tuple[int, int], layer.dilation),
        )
        weight = layer.weight.detach().transpose(0, 1).contiguous()
        new.weight, new.bias = nn.Parameter(weight, requires_grad=layer.weight.requires_grad), layer.bias
        new.weight_quantizer = WeightQuantizer(weight_bits)
        new.input_quantizer = AffineQuantizer(input_bits)
        new.register_buffer("quantized_bias", torch.empty(0))
        new.quantized = False
        new.soft = False
        return new.train(layer.training)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None:
            raise ValueError("the output's size follows from the input's here")
        if not self.quantized:
            return self._transposed(x, self.weight, self.bias)
        return self._transposed(self.input_quantizer(x), _effective_weight(self), _effective_bias(self))

    def _transposed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.transpose(0, 1).contiguous()
        return F.conv_transpose2d(
            x,
            weight,
            bias,
            cast(tuple[int, int], self.stride),
            cast(tuple[int, int], self.padding),
            cast(tuple[int, int], self.output_padding),
            dilation=cast(tuple[int, int], self.dilation),
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _take_bias_shape(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _TimesTransposed(torch.autograd.Function):
    """``a @ bᵀ`` whose gradient in ``b`` is computed in the layout of ``b`` (autograd's is its transpose)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        out: Tensor = a @ b.mT
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        a, b = ctx.saved_tensors
        # Under autocast the product's dtype is not the operands'.
        return (grad @ b.to(grad.dtype)).to(a.dtype), (grad.mT @ a.to(grad.dtype)).to(b.dtype)


class QuantMatMul(nn.Module):
    """The product of two activations, ``a @ b``, each with a quantizer (per head once calibrated).

    ``a_bits`` and ``a_kind``, where given, are for a left operand that comes out of a softmax.

    Args of ``forward``: ``a`` (batch, heads, rows, inner) and ``b`` (batch, heads, inner, columns).
    """

    def __init__(self, bits: int, a_bits: int | None = None, a_kind: Kind = "uniform") -> None:
        super().__init__()
        self.a_quantizer: ActivationQuantizer = make_quantizer(a_kind, bits if a_bits is None else a_bits, "softmax")
        self.b_quantizer = AffineQuantizer(bits)
        self.quantized = False

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.quantized:
            return a @ b
        a = self.a_quantizer(a)
        if b.stride(-1) <= b.stride(-2):
            b = self.b_quantizer(b)
            return a @ b
        # A transposed operand (keys) is quantized, and gets its gradient, as it lies in memory: elements are read in a row.
        out: Tensor = _TimesTransposed.apply(a, self.b_quantizer(b.mT, transposed=True))  # type: ignore[no-untyped-call]
        return out


#: Layers with a weight, whose first dimension is the output channels'.
WeightLayer = QuantLinear | QuantConv2d | QuantConvTranspose2d
QuantLayer = WeightLayer | QuantMatMul


def _effective_weight(layer: WeightLayer) -> Tensor:
    return layer.weight if layer.soft else layer.weight_quantizer.quantized(layer.weight)


def _effective_bias(layer: WeightLayer) -> Tensor | None:
    return layer.quantized_bias if layer.quantized_bias.numel() else layer.bias


def _take_bias_shape(layer: WeightLayer, state_dict: dict[str, Any], prefix: str) -> None:
    """Give ``quantized_bias`` the shape it has in a checkpoint."""
    bias = state_dict.get(prefix + "quantized_bias")
    if bias is not None and bias.shape != layer.quantized_bias.shape:
        layer.quantized_bias = torch.empty_like(bias, device=layer.weight.device)


def decide_rounding(layer: WeightLayer) -> None:
    """Fix the weight's codes to the nearest grid points, unless they are decided already."""
    quantizer = layer.weight_quantizer
    if quantizer.off or quantizer.codes.numel():
        return
    ratio = torch.round(layer.weight.detach().flatten(1) / quantizer.scale)
    quantizer.set_codes((ratio + quantizer.zero_point).clamp(0, quantizer.levels - 1))


def fold_shift(layer: QuantLinear) -> None:
    """Move what the input quantizer's shift adds to the output into ``quantized_bias``; the rounding must be decided.

    With x̂ the shifted quantized input, ``Ŵ (x̂ - shift) + b = Ŵ x̂ + (b - shift Ŵ 1)``.
    """
    quantizer = layer.input_quantizer
    if not isinstance(quantizer, LogQuantizer) or quantizer.off or not quantizer.shift or bool(quantizer.folded):
        return
    weight = layer.weight_quantizer.quantized(layer.weight.detach())
    bias = _effective_bias(layer)
    added = quantizer.shift * weight.sum(1)
    layer.quantized_bias = -added if bias is None else bias.detach() - added
    quantizer.fold()
