"""Uniform affine quantization: ``q = clamp(round(x / s) + z, 0, L - 1)``, ``x̂ = (q - z) * s``.

Quantization is simulated: every function returns floating point values on the quantization grid.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.recipe import OFF


def levels_of(bits: int) -> int:
    """Number of levels ``L = 2 ** bits``."""
    return int(2**bits)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Round ``x`` to the nearest point of the affine grid.

    Args:
        x: values, any shape, floating point.
        scale: step sizes, broadcastable to ``x``, positive.
        zero_point: integers as floating point, broadcastable to ``x``.
        levels: number of grid points.

    Returns:
        Tensor of the shape of ``x``.
    """
    codes = torch.round(x / scale).add_(zero_point).clamp_(0, levels - 1)
    return codes.sub_(zero_point).mul_(scale)


class _LearnedScale(torch.autograd.Function):
    """Fake quantization with a straight-through ``round``, learned scale and random dropping.

    One node instead of the dozen that autograd would record: backward needs two tensors only, the
    scale's local derivative and where the input's gradient passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, levels: int, keep: Tensor | None) -> Tensor:
        ratio = x / scale
        rounded = torch.round(ratio)
        codes = (rounded + zero_point).clamp_(0, levels - 1).sub_(zero_point)
        # Masks are float: on CPUs boolean tensors and torch.where cost 3 to 20 times the same arithmetic in float.
        inside = torch.eq(codes, rounded, out=torch.empty_like(rounded))
        # d x̂ / d s: the rounding error inside the range, the code itself where it is clamped.
        slope = torch.addcmul(codes, ratio, inside, value=-1)
        out = codes.mul_(scale)
        if keep is not None:
            out = torch.lerp(x, out, keep)  # exact at 0 and 1
            slope.mul_(keep)
            inside.sub_(1).mul_(keep).add_(1)
        ctx.save_for_backward(slope, inside)
        ctx.scale_shape = scale.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (grad,) = grads
        slope, passes = ctx.saved_tensors
        grad_x = grad * passes if ctx.needs_input_grad[0] else None
        grad_scale = (grad * slope).sum_to_size(ctx.scale_shape) if ctx.needs_input_grad[1] else None
        return grad_x, grad_scale, None, None, None


def learned_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int, keep: Tensor | None = None) -> Tensor:
    """Fake quantization that can be differentiated with respect to ``x`` and ``scale``.

    ``round`` has a straight-through gradient; the zero point is not learned.

    Args:
        x: values, floating point.
        scale: step sizes, broadcastable to ``x``.
        zero_point: integers as floating point, broadcastable to ``x``.
        levels: number of grid points.
        keep: mask of the shape and dtype of ``x``; where it is 0 (not 1) the value stays in full
            precision (QDrop, Wei et al., ICLR 2022).
    """
    out: Tensor = _LearnedScale.apply(x, scale, zero_point, levels, keep)  # type: ignore[no-untyped-call]
    return out


def bernoulli_mask(like: Tensor, probability: float, generator: torch.Generator | None) -> Tensor | None:
    """Random mask of the shape and dtype of ``like``: 1 with ``probability``, else 0; None stands for all ones.

    At probabilities that are multiples of 1/256 one random byte decides an element, eight of them
    drawn as one 64-bit integer; other probabilities are rounded to multiples of 2**-31.
    """
    if probability >= 1:
        return None
    count = like.numel()
    mask = torch.empty_like(like, memory_format=torch.contiguous_format)
    if probability * 256 == int(probability * 256):
        words = torch.empty((count + 7) // 8, dtype=torch.int64, device=like.device)
        words.random_(-(2**63), None, generator=generator)
        draws, threshold = words.view(torch.uint8)[:count], int(probability * 256)
    else:
        draws = torch.empty(count, dtype=torch.int32, device=like.device).random_(0, 2**31 - 1, generator=generator)
        threshold = round(probability * 2**31)
    return torch.lt(draws.view(like.shape), threshold, out=mask)


class AffineQuantizer(nn.Module):
    """Activation quantizer: holds scale and zero point, and how the quantizer behaves just now.

    Attributes:
        scale: float32 parameter, broadcastable to the input; empty before calibration.
        zero_point: float32 buffer with integer values, broadcastable to the input.
        keep_probability: share of elements quantized while ``training_scale`` is on.
        generator: source of the random dropping.
    """

    scale: nn.Parameter
    zero_point: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.empty(0), requires_grad=False)
        self.register_buffer("zero_point", torch.empty(0))
        self.training_scale = False
        self.keep_probability = 1.0
        self.generator: torch.Generator | None = None

    @property
    def levels(self) -> int:
        """Number of grid points."""
        return levels_of(self.bits)

    @property
    def off(self) -> bool:
        """Whether the quantizer lets values pass."""
        return self.bits == OFF

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point (float tensors that broadcast to the input)."""
        self.scale = nn.Parameter(scale.detach().clone().float().contiguous(), requires_grad=False)
        self.zero_point = zero_point.detach().clone().float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return x
        if self.scale.numel() == 0:
            raise RuntimeError("quantizer used before calibration")
        if not self.training_scale:
            return fake_quantize(x, self.scale, self.zero_point, self.levels)
        keep = bernoulli_mask(x, self.keep_probability, self.generator)
        return learned_fake_quantize(x, self.scale, self.zero_point, self.levels, keep)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Granularity is decided by calibration, so the shapes come from the checkpoint.
        scale = state_dict.get(prefix + "scale")
        if scale is not None and scale.shape != self.scale.shape:
            self.scale = nn.Parameter(torch.empty_like(scale), requires_grad=False)
            self.zero_point = torch.empty_like(state_dict[prefix + "zero_point"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return "off" if self.off else f"bits={self.bits}, scale={tuple(self.scale.shape)}"
