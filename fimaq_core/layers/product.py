"""Product of two activations with quantizers."""

from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.quantizers.special import make_quantizer
from fimaq_core.recipe import Kind


class _TimesTransposed(torch.autograd.Function):
    """Product ``a @ bᵀ``; its gradient in ``b`` keeps the layout of ``b``, unlike autograd's."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        out: Tensor = a @ b.mT
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        a, b = ctx.saved_tensors
        # Under autocast, the product has another dtype than the operands.
        return (grad @ b.to(grad.dtype)).to(a.dtype), (grad.mT @ a.to(grad.dtype)).to(b.dtype)


class QuantMatMul(nn.Module):
    """Quantizable ``a @ b`` for a (batch, heads, rows, inner) and b (batch, heads, inner, columns).

    Each operand has a quantizer; calibration gives it a scale per head. ``a_bits`` and ``a_kind``
    are for a left operand that is a softmax output.

    Example:
        >>> product = QuantMatMul(8)
        >>> product(torch.ones(2, 4, 3, 8), torch.ones(2, 4, 8, 3)).shape  # full precision
        torch.Size([2, 4, 3, 3])
    """

    def __init__(self, bits: int, a_bits: int | None = None, a_kind: Kind = "uniform") -> None:
        super().__init__()
        bits_of_a = bits if a_bits is None else a_bits
        self.a_quantizer: ActivationQuantizer = make_quantizer(a_kind, bits_of_a, "softmax")
        self.b_quantizer = AffineQuantizer(bits)
        self.quantized = False

    def problem(self, search: str, calibrated: bool) -> str | None:
        """Return tensor and value that no run gives, or None; see :meth:`.WeightLayer.problem`."""
        one_sided = search in ("percentile", "output-error")
        for name in ("a_quantizer", "b_quantizer"):
            quantizer: ActivationQuantizer = getattr(self, name)
            shape = tuple(quantizer.scale.shape)
            if quantizer.off or (not calibrated and 0 in shape):
                continue
            if (found := quantizer.problem(one_sided)) is not None:
                return f"{name}.{found}"
            zero = getattr(quantizer, "zero_point", quantizer.scale)
            if not (len(shape) == zero.ndim == 4 and shape[0] == 1 and 1 in shape[2:]):
                return f"{name}.scale has the shape {shape}, zero_point {tuple(zero.shape)}"
        return None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.quantized:
            return a @ b
        a = self.a_quantizer(a)
        if b.stride(-1) <= b.stride(-2):
            b = self.b_quantizer(b)
            return a @ b
        # A transposed operand (keys) is quantized in its memory layout, as is its gradient.
        b_hat = self.b_quantizer(b.mT, transposed=True)
        out: Tensor = _TimesTransposed.apply(a, b_hat)  # type: ignore[no-untyped-call]
        return out
