"""Layers of an exported file: weights, products, and a chain with their integer forms."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.export.inputs import (
    ADVICE,
    OPSET,
    IntegerInput,
    Orders,
    ShiftedInput,
    input_form,
    operator,
)
from fimaq_core.layers import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantMatMul,
    WeightLayer,
    quant_layers,
)
from fimaq_core.quantizers.affine import AffineQuantizer


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
                f"The weight codes of {where} do not fit 8-bit integers: {ADVICE[signed]}."
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
            shape = [-1 if dim == self.axis else 1 for dim in range(self.integers.ndim)]
            values, zeros = self.integers.float(), self.zeros.float().view(shape)
            values = values - zeros if self.shifted else values
            return values * self.scale.view(shape)
        inputs = [self.integers, self.scale, self.zeros]
        return operator("DequantizeLinear", inputs, torch.float32, axis=self.axis)


class LinearPart(nn.Module):
    """Some of the outputs of a linear layer, such as the queries among queries, keys and values."""

    scale: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, weight: IntegerWeight, bias: Tensor | None, index: int, parts: int) -> None:
        super().__init__()
        self.index, self.parts = index, parts
        for name, value in (("scale", weight.scale), ("zeros", weight.zeros), ("bias", bias)):
            own = None if value is None else value.chunk(parts)[index].clone()
            self.register_buffer(name, own)

    def forward(self, x: Tensor, integers: Tensor) -> Tensor:
        own = integers.chunk(self.parts, dim=1)[self.index]
        weight = operator("DequantizeLinear", [own, self.scale, self.zeros], torch.float32, axis=1)
        out: Tensor = torch.ops.aten.matmul.default(x, weight)
        return out


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
                missing = self.input.offset * self.input.behind * weight.sum(1)
                self.register_buffer("correction", missing)
        bias = layer._quantized_form_bias()
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.parts = nn.ModuleList()
        self.layer = [layer]  # in a list, so that its tensors are not part of the file

    def split(self, parts: int) -> None:
        """Let the layer return a tuple of equal parts of its output, if its form allows that."""
        weight = self.weight
        if isinstance(self.input, IntegerInput) and weight is not None and not weight.shifted:
            self.parts.extend(LinearPart(weight, self.bias, index, parts) for index in range(parts))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        layer = self.layer[0]
        # Onnxruntime makes a float Gemm of MatMul (n, channels) and Add, but not with Mul between.
        flat = x.ndim == 2 and isinstance(self.input, IntegerInput) and self.input.behind is None
        if self.input is not None:
            x = self.input(x, True) if flat else self.input(x)
        if self.parts:
            assert self.weight is not None
            integers = self.weight.integers
            return tuple(self._finished(part(x, integers), part.bias) for part in self.parts)
        alone = self.input is None and not isinstance(layer, QuantConvTranspose2d)
        weight = self.float_weight if self.weight is None else self.weight(alone)
        if isinstance(layer, QuantConvTranspose2d):
            sizes: Any = (layer.stride, layer.padding, layer.output_padding, 1, layer.dilation)
            return F.conv_transpose2d(x, weight, self.bias, *sizes)
        if isinstance(layer, QuantConv2d):
            out: Tensor = layer._conv_forward(x, weight, self.bias)
            return out
        # Not ``x @ weight``, which in blocks of own modules would be a product of activations.
        out = torch.ops.aten.matmul.default(x, weight)
        if flat:
            assert isinstance(self.input, IntegerInput)
            out = out * self.input.scale
        out = self._finished(out, self.bias)
        return out + self.correction if isinstance(self.input, ShiftedInput) else out

    def _finished(self, out: Tensor, bias: Any) -> Tensor:
        if self.input is not None and self.input.behind is not None:
            out = out * self.input.behind
        return out if bias is None else out + bias


class IntegerConvolution(nn.Module):
    """Convolution of codes in the file (ConvInteger), for unsigned codes.

    Onnxruntime computes in float what DequantizeLinear and Conv say. Its ConvInteger is fast for
    uint8 weights only, so the weight has a zero point of 128.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantConv2d, where: str) -> None:
        super().__init__()
        self.input = IntegerInput(layer.input_quantizer, False, where)
        weight = IntegerWeight(layer, True, where)
        integers = (weight.integers.int() + 128).to(torch.uint8)
        scale = weight.scale * layer.input_quantizer.scale.detach().flatten()
        bias = layer._quantized_form_bias()
        self.weight = nn.Module()
        self.weight.register_buffer("integers", integers)
        self.weight.register_buffer("zero", torch.tensor(128, dtype=torch.uint8))
        self.register_buffer("scale", scale.view(-1, 1, 1))
        self.register_buffer("bias", None if bias is None else bias.detach().clone().view(-1, 1, 1))
        self.settings: dict[str, Any] = {"strides": [*layer.stride], "dilations": [*layer.dilation]}
        self.settings |= {"pads": [*layer.padding] * 2, "group": layer.groups}
        self.kernel, self.rows = layer.kernel_size, layer.weight.shape[0]

    @staticmethod
    def fits(layer: nn.Module, signed: bool) -> bool:
        """Return True if a layer has this form."""
        return (
            isinstance(layer, QuantConv2d)
            and not (signed or layer.input_quantizer.off or layer.weight_quantizer.off)
            and layer.weight_quantizer.bits < 8  # 8-bit codes keep their zero points
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )

    def forward(self, x: Tensor) -> Tensor:
        pads, strides = self.settings["pads"], self.settings["strides"]
        reach = [d * (k - 1) for d, k in zip(self.settings["dilations"], self.kernel, strict=True)]
        sides = [
            (size + 2 * pad - span - 1) // stride + 1
            for size, pad, span, stride in zip(x.shape[2:], pads[:2], reach, strides, strict=True)
        ]
        zeros: tuple[Any, ...] = (self.input.zero, self.weight.zero)
        inputs: list[Any] = [self.input.codes(x), self.weight.integers, *zeros]
        shape = (x.shape[0], self.rows, *sides)
        sums = torch.onnx.ops.symbolic(
            "ConvInteger", inputs, self.settings, dtype=torch.int32, shape=shape, version=OPSET
        )
        out: Tensor = sums.float() * self.scale
        return out if self.bias is None else out + self.bias


class IntegerProduct(nn.Module):
    """Product ``a @ b`` in the file."""

    def __init__(self, product: QuantMatMul, signed: bool, where: str, orders: Orders) -> None:
        super().__init__()
        quantizers: Any = (product.a_quantizer, product.b_quantizer)
        self.a, self.b = (
            None if quantizer.off else input_form(quantizer, signed, where, order, right)
            for quantizer, order, right in zip(quantizers, orders, (False, True), strict=True)
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
        if scales:
            # Runtimes multiply the scales with each other once, when they load the file.
            out = out * functools.reduce(torch.mul, scales)
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
        if isinstance(layer, QuantMatMul):
            form: nn.Module = IntegerProduct(layer, signed, name, orders[path])
        elif IntegerConvolution.fits(layer, signed):
            form = IntegerConvolution(layer, name)
        else:
            form = IntegerLayer(layer, signed, name)
        twin.set_submodule(path, form)
    for module in twin.modules():
        if hasattr(module, "split") and isinstance(module.split, tuple):
            name, parts = module.split
            if isinstance(layer := getattr(module, name), IntegerLayer):
                layer.split(parts)
    return twin.requires_grad_(False).eval()


def _order(operand: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a tensor from the largest stride to the smallest, or ``()``."""
    strides: tuple[int, ...] = operand.stride()
    order = tuple(sorted(range(operand.ndim), key=lambda dim: -strides[dim]))
    moved = order[0] == 0 and order != tuple(range(operand.ndim))
    return order if moved else ()
