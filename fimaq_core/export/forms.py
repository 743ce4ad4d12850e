"""Quantized layers as ONNX operators on integer codes (QuantizeLinear, DequantizeLinear).

Codes of 2 to 8 bits lie in int8 or uint8 tensors. Only the difference of code and zero point
counts, ``x̂ = (q - z) * s``. So a quantizer with several zero points gets one in the file, and each
row keeps its own bounds.

Runtimes make one integer kernel of a product and of DequantizeLinear before it only if the scale of
DequantizeLinear is one number, or one per output channel of a weight. So other scales divide in
QuantizeLinear, where they may vary along one axis, and multiply behind the product.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.layers import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantMatMul,
    WeightLayer,
    quant_layers,
)
from fimaq_core.quantizers.affine import AffineQuantizer

#: Version of the operators.
OPSET = 21
#: Order of the dimensions in memory of each operand of a product; empty if it is the usual one.
Orders = tuple[tuple[int, ...], tuple[int, ...]]

_ADVICE = {
    True: "export without --signed",
    False: "calibrate with --range-search minmax or output-error",
}


def operator(name: str, inputs: list[Tensor], dtype: torch.dtype, **attributes: Any) -> Tensor:
    """Call an ONNX operator whose output has the shape of the first input."""
    out: Tensor = torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=dtype, shape=inputs[0].shape, version=OPSET
    )
    return out


class ShiftedInput(nn.Module):
    """Activation quantizer whose codes lie too far apart for one zero point, as with 8 bits.

    The codes are those of the quantizer. The output lacks :attr:`offset` and the scale
    :attr:`behind`: ``x̂ = (output + offset) * behind``.
    """

    behind: Tensor
    offset: Tensor
    zero_point: Tensor
    top: Tensor
    none: Tensor
    one: Tensor
    middle: Tensor

    def __init__(self, quantizer: AffineQuantizer) -> None:
        super().__init__()
        zeros = quantizer.zero_point.detach()
        middle = zeros.median().clamp(0, 255)
        self.bounded = quantizer.levels < 256
        for name, value in (("behind", quantizer.scale.detach()), ("zero_point", zeros)):
            self.register_buffer(name, value.clone())
        self.register_buffer("offset", middle - zeros)
        self.register_buffer("one", torch.ones(()))
        for name, number in (("top", quantizer.levels - 1), ("none", 0), ("middle", int(middle))):
            self.register_buffer(name, torch.tensor(number, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        ratio = x / self.behind + self.zero_point
        codes = operator("QuantizeLinear", [ratio, self.one, self.none], torch.uint8)
        if self.bounded:
            codes = operator("Clip", [codes, self.none, self.top], torch.uint8)
        return operator("DequantizeLinear", [codes, self.one, self.middle], torch.float32)


def input_form(
    quantizer: AffineQuantizer, signed: bool, where: str, order: tuple[int, ...] = ()
) -> "IntegerInput | ShiftedInput":
    """Return the form of an activation quantizer; see :class:`IntegerInput`."""
    if not signed and is_shifted(quantizer):
        return ShiftedInput(quantizer)
    return IntegerInput(quantizer, signed, where, order)


def is_shifted(quantizer: AffineQuantizer) -> bool:
    """Return True if the unsigned form of a quantizer is :class:`ShiftedInput`."""
    return not Container.of(quantizer, False).fits(False)


class Container(NamedTuple):
    """Integers that hold the codes of one activation quantizer in the file."""

    zero: int  # the zero point
    low: Tensor  # lowest integer, in the shape of the quantizer's zero point
    high: Tensor  # highest integer

    @classmethod
    def of(cls, quantizer: AffineQuantizer, signed: bool) -> "Container":
        """Find the container of a calibrated quantizer; its integers may have over 8 bits."""
        zeros = quantizer.zero_point.detach()
        zero = 0 if signed else max(0, int(zeros.max()))
        return cls(zero, zero - zeros, zero - zeros + quantizer.levels - 1)

    def fits(self, signed: bool) -> bool:
        """Return True if all integers have 8 bits."""
        least, most = (-128, 127) if signed else (0, 255)
        return bool(self.low.min() >= least and self.high.max() <= most)


class IntegerInput(nn.Module):
    """Activation quantizer in the file; the output still needs the scales :attr:`behind`.

    Attributes:
        behind: scale that multiplies behind the product, in the shape of the quantizer's scale;
            None if the output has it already.
    """

    scale: Tensor
    one: Tensor
    zeros: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor
    behind: Tensor | None

    def __init__(
        self, quantizer: AffineQuantizer, signed: bool, where: str, order: tuple[int, ...] = ()
    ) -> None:
        """Take the ranges of a calibrated ``quantizer``.

        ``order`` lists the dimensions of the input as they lie in memory, if they are permuted. The
        codes are made in this order, so that runtimes move bytes and not floats.

        Raises:
            ModelError: the codes of the layer ``where`` do not fit 8 bits around one zero point.
        """
        super().__init__()
        box, scale = Container.of(quantizer, signed), quantizer.scale.detach()
        if not box.fits(signed):
            zeros = quantizer.zero_point
            raise ModelError(
                f"The codes of {where} do not fit 8-bit integers (zero points {zeros.min():g} to "
                f"{zeros.max():g}): {_ADVICE[signed]}."
            )
        self.dtype = torch.int8 if signed else torch.uint8
        back = sorted(range(len(order)), key=order.__getitem__)
        self.order, self.back = order, tuple(back)
        self.register_buffer("behind", scale.clone() if scale.numel() > 1 else None)
        own, bounds = scale, [box.low, box.high]
        if scale.numel() > 1:
            bounds = [value.expand(scale.shape) for value in bounds]
        if order and own.ndim == len(order):
            own, *bounds = (one.permute(order) for one in (own, *bounds))
        same = all(bool((value == value.flatten()[0]).all()) for value in bounds)
        limits = torch.iinfo(self.dtype)
        self.bounds = "tensor"
        if same:
            bounds = [value.flatten()[0] for value in bounds]
            inside = bounds[0] > limits.min or bounds[1] < limits.max
            self.bounds = "scalar" if inside else "none"
        self.register_buffer("low", _squeezed(bounds[0]).to(self.dtype))
        self.register_buffer("high", _squeezed(bounds[1]).to(self.dtype))
        wide = [dim for dim, size in enumerate(own.shape) if size > 1]
        self.rank, self.divided = own.ndim, False
        self.first = self.last = 0  # dimensions with several scales
        if wide:
            self.first, self.last = wide[0], wide[-1]
            # A run of dimensions with scales becomes one axis. Along the last dimension,
            # QuantizeLinear would be slow.
            self.divided = self.last == own.ndim - 1 or 1 in own.shape[self.first : self.last]
        kept = own if self.divided else own.flatten()
        self.register_buffer("scale", kept.clone() if wide else scale.reshape(()).clone())
        one = wide and not self.divided
        zeros = torch.full(self.scale.shape if one else (), box.zero, dtype=self.dtype)
        self.register_buffer("zeros", zeros)
        self.register_buffer("zero", torch.tensor(box.zero, dtype=self.dtype))
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        codes = self._bounded(self._codes(x.permute(self.order) if self.order else x))
        codes = codes.permute(self.back) if self.order else codes
        scale = self.scale if self.behind is None else self.one
        return operator("DequantizeLinear", [codes, scale, self.zero], torch.float32)

    def _codes(self, x: Tensor) -> Tensor:
        if self.behind is None:
            return operator("QuantizeLinear", [x, self.scale, self.zeros], self.dtype)
        if self.divided:
            return operator("QuantizeLinear", [x / self.scale, self.one, self.zero], self.dtype)
        # A layer may see inputs with more dimensions than the scale.
        first, last = (dim + x.ndim - self.rank for dim in (self.first, self.last))
        flat = x.flatten(first, last)
        codes = operator("QuantizeLinear", [flat, self.scale, self.zeros], self.dtype, axis=first)
        return codes.view(x.shape)

    def _bounded(self, codes: Tensor) -> Tensor:
        if self.bounds == "scalar":
            return operator("Clip", [codes, self.low, self.high], self.dtype)
        if self.bounds == "tensor":
            codes = operator("Max", [codes, self.low], self.dtype)
            return operator("Min", [codes, self.high], self.dtype)
        return codes


def _squeezed(values: Tensor) -> Tensor:
    """Return ``values`` with size 1 along dimensions where all values are equal."""
    for dim in range(values.ndim):
        first = values.narrow(dim, 0, 1)
        if bool((values == first).all()):
            values = first
    return values.clone()


class IntegerWeight(nn.Module):
    """Weight as int8 integers ``code - zero point``, with one scale per output channel.

    8-bit codes do not fit like this, so they keep a zero point.
    """

    integers: Tensor
    scale: Tensor
    zeros: Tensor

    def __init__(self, layer: WeightLayer, signed: bool, where: str) -> None:
        super().__init__()
        quantizer = layer.weight_quantizer
        codes, zeros = (one.to(torch.int32) for one in (quantizer.codes, quantizer.zero_point))
        integers, rest = codes - zeros, torch.zeros_like(zeros)
        if not signed and int(integers.abs().max()) > 127:
            shift = (torch.clamp(zeros, min=quantizer.levels - 1) - 127).clamp(min=0)
            integers, rest = codes - shift, zeros - shift
        least = min(int(integers.min()), int(rest.min()))
        if least < -128 or max(int(integers.max()), int(rest.max())) > 127:
            raise ModelError(
                f"The weight codes of {where} do not fit 8-bit integers: {_ADVICE[signed]}."
            )
        integers, self.axis = integers.view(layer.weight.shape).to(torch.int8), 0
        if isinstance(layer, nn.Linear | QuantConvTranspose2d):
            integers, self.axis = integers.transpose(0, 1).contiguous(), 1
        self.register_buffer("integers", integers)
        self.register_buffer("scale", quantizer.scale.detach().flatten().clone())
        self.register_buffer("zeros", rest.flatten().to(torch.int8))
        self.shifted = bool(rest.any())

    def forward(self, alone: bool = False) -> Tensor:
        """Return the weight; ``alone``: its product has a float operand.

        Onnxruntime would quantize that operand to 8 bits if it saw DequantizeLinear before MatMul.
        """
        if alone:
            values, scale = self.integers.float(), self.scale
            values = values - self.zeros.float() if self.shifted else values
            return values * scale
        inputs = [self.integers, self.scale, self.zeros]
        return operator("DequantizeLinear", inputs, torch.float32, axis=self.axis)


class IntegerLayer(nn.Module):
    """Layer with a weight in the file."""

    float_weight: Tensor
    correction: Tensor
    bias: Tensor | None

    def __init__(self, layer: WeightLayer, signed: bool, where: str) -> None:
        super().__init__()
        self.weight: IntegerWeight | None = None
        if layer.weight_quantizer.off:
            weight = layer.weight.detach()
            turned = isinstance(layer, nn.Linear | QuantConvTranspose2d)
            weight = weight.transpose(0, 1).contiguous() if turned else weight.clone()
            self.register_buffer("float_weight", weight)
        else:
            self.weight = IntegerWeight(layer, signed, where)
        quantizer, self.input = layer.input_quantizer, None
        if not quantizer.off:
            assert isinstance(quantizer, AffineQuantizer)
            linear = isinstance(layer, nn.Linear)
            self.input = (input_form if linear else IntegerInput)(quantizer, signed, where)
            if isinstance(self.input, ShiftedInput):
                weight = layer.weight_quantizer.quantized(layer.weight.detach())
                self.register_buffer("correction", self.input.offset * weight.sum(1))
        bias = layer._quantized_form_bias()
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.layer = [layer]  # in a list, so that its tensors are not part of the file

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        if self.input is not None:
            x = self.input(x)
        alone = self.input is None and isinstance(layer, nn.Linear)
        weight = self.float_weight if self.weight is None else self.weight(alone)
        if isinstance(layer, QuantConvTranspose2d):
            sizes: Any = (layer.stride, layer.padding, layer.output_padding, 1, layer.dilation)
            return F.conv_transpose2d(x, weight, self.bias, *sizes)
        if isinstance(layer, QuantConv2d):
            out: Tensor = layer._conv_forward(x, weight, self.bias)
            return out
        # Not ``x @ weight``, which in blocks of own modules would be a product of activations.
        out = torch.ops.aten.matmul.default(x, weight)
        if isinstance(self.input, ShiftedInput):
            out = out + self.correction
        if self.input is not None and self.input.behind is not None:
            out = out * self.input.behind
        return out if self.bias is None else out + self.bias


class IntegerProduct(nn.Module):
    """Product ``a @ b`` in the file."""

    def __init__(self, product: QuantMatMul, signed: bool, where: str, orders: Orders) -> None:
        super().__init__()
        pairs: Any = zip((product.a_quantizer, product.b_quantizer), orders, strict=True)
        self.a, self.b = (
            None if quantizer.off else input_form(quantizer, signed, where, order)
            for quantizer, order in pairs
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        parts = [(self.a, a), (self.b, b)]
        left, right = (value if form is None else form(value) for form, value in parts)
        out = left @ right
        if isinstance(self.a, ShiftedInput):
            out = out + self.a.offset * right.sum(-2, keepdim=True)
        if isinstance(self.b, ShiftedInput):
            if isinstance(self.a, ShiftedInput):
                left = left + self.a.offset
            out = out + left.sum(-1, keepdim=True) * self.b.offset
        scales = [form.behind for form, _ in parts if form is not None and form.behind is not None]
        heads = [scale for scale in scales if scale.numel() == scale.shape[1]]
        if len(heads) == 2:
            scales = [heads[0] * heads[1]]
        for scale in scales:
            out = out * scale
        return out


def layers_of(chain: BlockChain) -> Iterator[tuple[str, str, Any]]:
    """Yield name, path in the chain and layer of each quantizable layer, as in module maps."""
    for index, segment in enumerate(chain):
        for name, layer in quant_layers(segment.block):
            path = f"segments.{index}.block.{name}".rstrip(".")
            yield f"{segment.label}.{name}".rstrip("."), path, layer


@torch.no_grad()
def integer_chain(chain: BlockChain, example: Tensor, signed: bool) -> BlockChain:
    """Return a copy of a quantized chain in which integer forms replace the layers.

    Args:
        chain: chain with decided roundings.
        example: input (n, ...) of the chain, to see how operands lie in memory.
        signed: True for int8 activations with a zero point of 0.

    Raises:
        ModelError: codes of a layer do not fit 8-bit integers.
    """
    orders: dict[str, Orders] = {}

    def note(path: str) -> Any:
        return lambda _, operands: orders.update({path: (_order(operands[0]), _order(operands[1]))})

    found = list(layers_of(chain))
    hooks = [
        layer.register_forward_pre_hook(note(path))
        for _, path, layer in found
        if isinstance(layer, QuantMatMul)
    ]
    try:
        chain(example)
    finally:
        for hook in hooks:
            hook.remove()
    twin = copy.deepcopy(chain)
    for name, path, layer in found:
        form = (
            IntegerProduct(layer, signed, name, orders[path])
            if isinstance(layer, QuantMatMul)
            else IntegerLayer(layer, signed, name)
        )
        twin.set_submodule(path, form)
    return twin.requires_grad_(False).eval()


def _order(operand: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a tensor from the largest stride to the smallest, or ``()``."""
    strides: tuple[int, ...] = operand.stride()
    order = tuple(sorted(range(operand.ndim), key=lambda dim: -strides[dim]))
    moved = order[0] == 0 and order != tuple(range(operand.ndim))
    return order if moved else ()
