"""Activation quantizers in an exported file: ONNX operators on integer codes.

Codes of 2 to 8 bits lie in int8 or uint8 tensors. Only the difference of code and zero point
counts, ``x̂ = (q - z) * s``. So a quantizer with several zero points gets one in the file, and each
row keeps its own bounds.

Runtimes make one integer kernel of a product and of DequantizeLinear before it only if the scale of
DequantizeLinear is one number, or one per output channel of a weight. So other scales divide in
QuantizeLinear, where they may vary along one axis, and multiply behind the product.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.quantizers.affine import AffineQuantizer

#: Version of the operators.
OPSET = 21
#: Order of the dimensions in memory of each operand of a product; empty if it is the usual one.
Orders = tuple[tuple[int, ...], tuple[int, ...]]

#: Largest code of an int8 right operand. With more than 7 bits in both operands, processors without
#: VNNI would saturate at the sum of two products of uint8 by int8.
_SMALL = 63

#: Advice by `signed` for codes that do not fit.
ADVICE = {
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
        middle = zeros.median().clamp(1, 255)  # not 0, see Container
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
    quantizer: AffineQuantizer,
    signed: bool,
    where: str,
    order: tuple[int, ...] = (),
    right: bool = False,
) -> "IntegerInput | ShiftedInput":
    """Return the form of an activation quantizer; see :class:`IntegerInput`."""
    if not signed and is_shifted(quantizer):
        return ShiftedInput(quantizer)
    return IntegerInput(quantizer, signed, where, order, right)


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
        # OpenVINO computes wrong products if the zero point is 0 and scales per token follow.
        zero = 0 if signed else max(int(quantizer.levels < 256), int(zeros.max()))
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
        self,
        quantizer: AffineQuantizer,
        signed: bool,
        where: str,
        order: tuple[int, ...] = (),
        right: bool = False,
    ) -> None:
        """Take the ranges of a calibrated ``quantizer``.

        ``order`` lists the dimensions of the input as they lie in memory, if they are permuted. The
        codes are made in this order, so that runtimes move bytes and not floats. ``right`` is True
        for the right operand of a product. Its codes lie in int8 where they fit, since processors
        multiply uint8 by int8 fastest.

        Raises:
            ModelError: the codes of the layer ``where`` do not fit 8 bits around one zero point.
        """
        super().__init__()
        box, scale = Container.of(quantizer, signed), quantizer.scale.detach()
        if not box.fits(signed):
            zeros = quantizer.zero_point
            raise ModelError(
                f"The codes of {where} do not fit 8-bit integers (zero points {zeros.min():g} to "
                f"{zeros.max():g}): {ADVICE[signed]}."
            )
        small = right and int(box.high.max()) <= _SMALL
        self.dtype = torch.int8 if signed or small else torch.uint8
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

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of ``x``, in its shape."""
        codes = self._bounded(self._codes(x.permute(self.order) if self.order else x))
        return codes.permute(self.back) if self.order else codes

    def forward(self, x: Tensor, apart: bool = False) -> Tensor:
        """Quantize ``x``; with ``apart``, the output lacks the scale also if it is one number."""
        codes = self.codes(x)
        scale = self.scale if self.behind is None and not apart else self.one
        return operator("DequantizeLinear", [codes, scale, self.zero], torch.float32)

    def _codes(self, x: Tensor) -> Tensor:
        if self.behind is None:
            return operator("QuantizeLinear", [x, self.scale, self.zeros], self.dtype)
        if self.divided:
            return operator("QuantizeLinear", [x / self.scale, self.one, self.zero], self.dtype)
        # A layer may see inputs with more dimensions than the scale.
        first, last = (dim + x.ndim - self.rank for dim in (self.first, self.last))
        # OpenVINO takes no other axis than 1.
        flat = x.flatten(first, last).flatten(0, first - 1)
        codes = operator("QuantizeLinear", [flat, self.scale, self.zeros], self.dtype, axis=1)
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
