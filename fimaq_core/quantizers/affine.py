"""Uniform affine quantization: ``q = clamp(round(x / s) + z, 0, L - 1)``, ``x̂ = (q - z) * s``.

It is simulated: every function returns floating point values on the grid. Scales and zero points
(integers as floating point) broadcast to x.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.dropping import threshold_of, traced_mask


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Round ``x`` to the nearest point of the affine grid."""
    codes = torch.round(x / scale).add_(zero_point).clamp_(0, levels - 1)
    return codes.sub_(zero_point).mul_(scale)


class _LearnedScale(torch.autograd.Function):
    """Fake quantization with a straight-through ``round``, learned scale and random dropping.

    For plain execution: one node instead of the dozen that autograd would record. Backward needs
    two tensors only, the scale's local derivative and where the input's gradient passes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, levels: int, keep: Tensor | None
    ) -> Tensor:
        ratio = x / scale
        rounded = torch.round(ratio)
        codes = (rounded + zero_point).clamp_(0, levels - 1).sub_(zero_point)
        # Masks are float: on CPUs boolean tensors and torch.where cost 3 to 20 times the same arithmetic in float.
        inside = torch.eq(codes, rounded, out=torch.empty_like(rounded))
        # d x̂ / d s: the rounding error inside the range, the code itself where it is clamped.
        slope = torch.addcmul(codes, ratio, inside, value=-1)
        out = codes.mul_(scale)
        if keep is not None:
            out = torch.lerp(x.to(out.dtype), out, keep)  # exact at 0 and 1
            slope.mul_(keep)
            inside.sub_(1).mul_(keep).add_(1)
        ctx.save_for_backward(slope, inside)
        ctx.scale_shape, ctx.dtype = scale.shape, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (grad,) = grads
        slope, passes = ctx.saved_tensors
        grad_x = (grad * passes).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_scale = (
            (grad * slope).sum_to_size(ctx.scale_shape) if ctx.needs_input_grad[1] else None
        )
        return grad_x, grad_scale, None, None, None


class _TracedScale(torch.autograd.Function):
    """The same for compilation: forward and backward each fuse into one pass.

    Saved are input and output, which the layers beside it save anyway. What was kept follows from
    them (an element that differs from its input was quantized; where it does not differ, both
    branches of the gradient agree), so backward draws no mask; and no boolean tensor is ever
    stored, which on CPUs costs more than all the rest.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        top: Tensor,
        key: Tensor,
        threshold: int,
    ) -> Tensor:
        codes = _traced_codes(torch.round(x / scale), zero_point, top)
        out = codes * scale
        if threshold < 256:
            out = torch.where(traced_mask(x, key, threshold), out, x)
        ctx.save_for_backward(x, scale, zero_point, top, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (grad,) = grads
        x, scale, zero_point, top, out = ctx.saved_tensors
        ratio = x / scale
        rounded = torch.round(ratio)
        codes = _traced_codes(rounded, zero_point, top)
        inside, kept = codes == rounded, out != x
        slope = torch.where(inside, codes - ratio, codes)
        grad_scale = _sum_in_two(torch.where(kept, grad * slope, 0.0), scale.shape)
        grad_x = torch.where(torch.logical_and(kept, torch.logical_not(inside)), 0.0, grad)
        return grad_x.to(x.dtype), grad_scale, None, None, None, None


def _traced_codes(rounded: Tensor, zero_point: Tensor, top: Tensor) -> Tensor:
    # The highest code is a tensor, so that one compiled step serves all bit-widths.
    return torch.minimum((rounded + zero_point).clamp(min=0), top) - zero_point


def _sum_in_two(values: Tensor, shape: torch.Size) -> Tensor:
    """Sum to ``shape``, the first dimension last: the inner sum fuses with what comes before."""
    wide = (1,) * (values.ndim - len(shape)) + tuple(shape)
    inner = [dim for dim in range(1, values.ndim) if wide[dim] == 1]
    part = values.sum(inner, keepdim=True) if inner else values
    return (part.sum(0, keepdim=True) if wide[0] == 1 else part).view(shape)


def learned_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, levels: int, keep: Tensor | None = None
) -> Tensor:
    """Fake quantization that can be differentiated with respect to ``x`` and ``scale``.

    ``round`` has a straight-through gradient; the zero point is not learned. Where the float mask
    ``keep`` is 0 (not 1) the value stays in full precision (QDrop, Wei et al., ICLR 2022).
    """
    out: Tensor = _LearnedScale.apply(x, scale, zero_point, levels, keep)  # type: ignore[no-untyped-call]
    return out


def textbook_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, levels: int, keep: Tensor | None = None
) -> Tensor:
    """:func:`learned_fake_quantize` by its definition and autograd, with a boolean mask."""
    ratio = x / scale
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    out = (torch.clamp(rounded + zero_point, 0, levels - 1) - zero_point) * scale
    return out if keep is None else torch.where(keep, out, x)


class AffineQuantizer(ActivationQuantizer):
    """Uniform affine quantizer."""

    kind = "uniform"
    shaped: ClassVar[tuple[str, ...]] = ("scale", "zero_point")
    zero_point: Tensor  # float32 buffer with integer values, broadcastable to the input
    top: Tensor  # float32 buffer, the highest code

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("zero_point", torch.empty(0))
        self.register_buffer("top", torch.tensor(float(self.levels - 1)), persistent=False)

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point (float tensors that broadcast to the input)."""
        self.set_scale(scale)
        self.zero_point = zero_point.detach().clone().float().contiguous()

    def forward(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Quantize ``x``; ``transposed``: its last two dimensions are the scale's, swapped."""
        if self.off:
            return x
        self._check_calibrated()
        scale, zero = (
            (self.scale.mT, self.zero_point.mT) if transposed else (self.scale, self.zero_point)
        )
        if self.learning is None:
            return fake_quantize(x, scale, zero, self.levels)
        if self.learning == "traced":
            threshold = threshold_of(self.keep_probability)
            out: Tensor = _TracedScale.apply(x, scale, zero, self.top, self.key, threshold)  # type: ignore[no-untyped-call]
            return out
        plain = self.learning == "textbook"
        keep = self._kept(x, torch.bool if plain else torch.float32)
        return (textbook_fake_quantize if plain else learned_fake_quantize)(
            x, scale, zero, self.levels, keep
        )


class WeightQuantizer(AffineQuantizer):
    """Per-output-channel affine quantizer of a weight seen as a matrix (rows = output channels).

    ``codes`` (uint8, rows x columns) hold decided roundings. The float weight stays beside them, so
    that one model can run in full precision and quantized.
    """

    shaped = ("scale", "zero_point", "codes")
    codes: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("codes", torch.empty(0, dtype=torch.uint8))

    def quantized(self, weight: Tensor) -> Tensor:
        """Return the quantized form of ``weight`` (any shape, first dimension = output channels)."""
        if self.off:
            return weight
        if self.codes.numel():
            matrix = (self.codes.to(weight.dtype) - self.zero_point) * self.scale
        else:
            matrix = fake_quantize(weight.flatten(1), self.scale, self.zero_point, self.levels)
        return matrix.view_as(weight)

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point, (rows, 1); codes decided for another range are forgotten."""
        super().set_range(scale, zero_point)
        self.codes = torch.empty(0, dtype=torch.uint8, device=self.scale.device)

    def set_codes(self, codes: Tensor) -> None:
        """Fix the rounding. ``codes``: integers in [0, levels - 1], rows x columns."""
        self.codes = codes.to(torch.uint8).contiguous()
