"""The product of two activations with quantizers."""

from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.quantizers.special import make_quantizer
from fimaq_core.recipe import Kind


class _TimesTransposed(torch.autograd.Function):
    """``a @ bᵀ`` whose gradient in ``b`` has the layout of ``b`` (autograd's is its transpose)."""

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
    """The product of a (batch, heads, rows, inner) and b (batch, heads, inner, columns), ``a @ b``.

    Each has a quantizer, per head once calibrated. ``a_bits`` and ``a_kind``, where given, are for
    a left operand that comes out of a softmax.
    """

    def __init__(self, bits: int, a_bits: int | None = None, a_kind: Kind = "uniform") -> None:
        super().__init__()
        bits_of_a = bits if a_bits is None else a_bits
        self.a_quantizer: ActivationQuantizer = make_quantizer(a_kind, bits_of_a, "softmax")
        self.b_quantizer = AffineQuantizer(bits)
        self.quantized = False

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.quantized:
            return a @ b
        a = self.a_quantizer(a)
        if b.stride(-1) <= b.stride(-2):
            b = self.b_quantizer(b)
            return a @ b
        # A transposed operand (keys) is quantized, and gets its gradient, as it lies in memory.
        b_hat = self.b_quantizer(b.mT, transposed=True)
        out: Tensor = _TimesTransposed.apply(a, b_hat)  # type: ignore[no-untyped-call]
        return out
