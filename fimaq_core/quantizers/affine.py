"""Uniform affine quantization: ``q = clamp(round(x / s) + z, 0, L - 1)``, ``x̂ = (q - z) * s``.

Quantization is simulated: every function returns floating-point values on the grid. L is the number
of levels. Scales and zero points broadcast to x; zero points are integers in floating point.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fimaq_core.quantizers.activation import ActivationQuantizer, outside
from fimaq_core.quantizers.dropping import threshold_of, traced_mask


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Round ``x`` to the nearest point of the affine grid; the result has the shape of x."""
    codes = torch.round(x / scale).add_(zero_point).clamp_(0, levels - 1)
    return codes.sub_(zero_point).mul_(scale)


class _LearnedScale(torch.autograd.Function):
    """Form of :func:`learned_fake_quantize` for plain execution.

    Autograd would record a dozen nodes; this is one. Backward needs only two tensors: the
    derivative of each output in the scale, and the mask of elements whose gradient passes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, levels: int, keep: Tensor | None
    ) -> Tensor:
        ratio = x / scale
        rounded = torch.round(ratio)
        codes = (rounded + zero_point).clamp_(0, levels - 1).sub_(zero_point)
        # Masks are float: on CPUs, boolean tensors and torch.where cost 3 to 20 times as much.
        inside = torch.eq(codes, rounded, out=torch.empty_like(rounded))
        # d x̂ / d s is the rounding error inside the range, and the code where it is clamped.
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
        needs_x, needs_scale, *_ = ctx.needs_input_grad
        grad_x = (grad * passes).to(ctx.dtype) if needs_x else None
        grad_scale = (grad * slope).sum_to_size(ctx.scale_shape) if needs_scale else None
        return grad_x, grad_scale, None, None, None


class _TracedScale(torch.autograd.Function):
    """Form of :func:`learned_fake_quantize` for compilation: each direction fuses into one pass.

    It saves only input and output, which the layers around it save anyway. Backward needs no mask:
    an element that differs from its input was quantized, and for all others both branches of the
    gradient agree. A stored boolean mask would cost more than all the rest on CPUs.
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
    # The highest code is a tensor, so one compiled step serves all bit-widths.
    return torch.minimum((rounded + zero_point).clamp(min=0), top) - zero_point


def _sum_in_two(values: Tensor, shape: torch.Size) -> Tensor:
    """Sum to ``shape``, over the first dimension last: the first sum fuses with its input."""
    wide = (1,) * (values.ndim - len(shape)) + tuple(shape)
    inner = [dim for dim in range(1, values.ndim) if wide[dim] == 1]
    part = values.sum(inner, keepdim=True) if inner else values
    return (part.sum(0, keepdim=True) if wide[0] == 1 else part).view(shape)


def learned_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, levels: int, keep: Tensor | None = None
) -> Tensor:
    """Compute :func:`fake_quantize`, differentiable in ``x`` and ``scale``, not in the zero point.

    ``round`` has a straight-through gradient. ``keep`` is a float mask of x's shape; values stay in
    full precision where it is 0.
    """
    out: Tensor = _LearnedScale.apply(  # type: ignore[no-untyped-call]
        x, scale, zero_point, levels, keep
    )
    return out


def textbook_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, levels: int, keep: Tensor | None = None
) -> Tensor:
    """Compute :func:`learned_fake_quantize` by its definition and autograd; ``keep`` is boolean."""
    ratio = x / scale
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    out = (torch.clamp(rounded + zero_point, 0, levels - 1) - zero_point) * scale
    return out if keep is None else torch.where(keep, out, x)


class AffineQuantizer(ActivationQuantizer):
    """Uniform affine quantizer.

    Example:
        >>> quantizer = AffineQuantizer(bits=2)
        >>> quantizer.set_range(torch.tensor(0.5), torch.tensor(0.0))
        >>> quantizer(torch.tensor([-1.0, 0.2, 0.8, 3.0]))
        tensor([0.0000, 0.0000, 1.0000, 1.5000])
    """

    kind = "uniform"
    shaped: ClassVar[tuple[str, ...]] = ("scale", "zero_point")
    zero_point: Tensor  # float32 buffer with integer values, broadcasts to the input
    top: Tensor  # float32 buffer, the highest code

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("zero_point", torch.empty(0))
        self.register_buffer("top", torch.tensor(float(self.levels - 1)), persistent=False)

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point (float tensors that broadcast to the input)."""
        self.set_scale(scale)
        self.zero_point = zero_point.detach().clone().float().contiguous()

    def problem(self, one_sided: bool) -> str | None:
        top, far = self.levels - 1, 1e20
        bounds = (-far, far) if one_sided else (0, top)
        found = super().problem(one_sided) or self._zero_point_problem(*bounds)
        if self.off or found is not None or not one_sided:
            return found
        # A range above zero has a negative zero point. A range below zero is wide, unless all
        # values are nearly the same.
        wide = torch.where(self.scale > 2e-4, self.zero_point, 0.0)
        return outside("zero_point", wide, -far, 16 * top)

    def _zero_point_problem(self, least: float, most: float) -> str | None:
        scale, zero = self.scale, self.zero_point
        if self.off:
            return None
        # Shapes are aligned at their ends, and the zero point's may be shorter, as in broadcasting.
        pairs = zip(reversed(zero.shape), reversed(scale.shape), strict=False)
        if zero.ndim > scale.ndim or any(own not in (1, other) for own, other in pairs):
            return f"zero_point has the shape {tuple(zero.shape)}, but scale {tuple(scale.shape)}"
        if (found := outside("zero_point", zero, least, most)) is not None:
            return found
        broken = zero[zero != zero.round()]
        return f"zero_point is {broken[0]:g}, which is no integer" if broken.numel() else None

    def forward(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Quantize ``x``; ``transposed``: its last two dimensions are swapped."""
        if self.off:
            return x
        self._check_calibrated()
        tensors: tuple[Tensor, Tensor] = self.scale, self.zero_point
        scale, zero = (one.mT for one in tensors) if transposed else tensors
        if self.learning is None:
            return fake_quantize(x, scale, zero, self.levels)
        if self.learning == "traced":
            threshold = threshold_of(self.keep_probability)
            out: Tensor = _TracedScale.apply(  # type: ignore[no-untyped-call]
                x, scale, zero, self.top, self.key, threshold
            )
            return out
        learned = textbook_fake_quantize if self.learning == "textbook" else learned_fake_quantize
        return learned(x, scale, zero, self.levels, self._kept(x))


class WeightQuantizer(AffineQuantizer):
    """Affine quantizer of a weight as a matrix, with one scale per row (output channel).

    The layer keeps the float weight, so the same model runs in full precision and quantized.
    """

    shaped = ("scale", "zero_point", "codes")
    codes: Tensor  # (rows, columns) uint8 buffer, the decided rounding; empty before it is decided

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("codes", torch.empty(0, dtype=torch.uint8))

    def quantized(self, weight: Tensor) -> Tensor:
        """Quantize ``weight``: any shape, first dimension output channels; same shape."""
        if self.off:
            return weight
        if self.codes.numel():
            matrix = (self.codes.to(weight.dtype) - self.zero_point) * self.scale
        else:
            matrix = fake_quantize(weight.flatten(1), self.scale, self.zero_point, self.levels)
        return matrix.view_as(weight)

    def weight_problem(self, weight: Tensor, one_sided: bool) -> str | None:
        """Return :meth:`problem` for the quantizer of ``weight`` (rows, ...)."""
        rows, top = weight.detach().flatten(1), self.levels - 1
        scale, zero, codes, wanted = self.scale, self.zero_point, self.codes, (len(rows), 1)
        if self.off:
            return None
        if scale.shape != wanted or zero.shape != wanted:
            return f"scale has the shape {tuple(scale.shape)}, not {wanted}"
        if codes.numel() and codes.shape != rows.shape:
            return f"codes have the shape {tuple(codes.shape)}, not {tuple(rows.shape)}"
        bounds = (-1e20, 1e20) if one_sided else (0, top)
        found = ActivationQuantizer.problem(self, one_sided) or self._zero_point_problem(*bounds)
        if found is None and one_sided:  # a range without zero lies among the weights
            slack = 1 + 1e-3 * zero.abs()
            near = (-zero - slack) * scale <= rows.amax(1, keepdim=True)
            near &= (top - zero + slack) * scale >= rows.amin(1, keepdim=True)
            found = outside("zero_point", zero[~near], 0, top)
        return found or outside("codes", codes, 0, top)

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point, (rows, 1), and remove the codes of the previous range."""
        super().set_range(scale, zero_point)
        self.codes = torch.empty(0, dtype=torch.uint8, device=self.scale.device)

    def set_codes(self, codes: Tensor) -> None:
        """Decide the rounding: ``codes`` (rows, columns) are integers in [0, levels - 1]."""
        self.codes = codes.to(torch.uint8).contiguous()
