"""Base of the activation quantizers: bits, a scale that can be learned, random dropping."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fimaq_core.quantizers.dropping import eager_mask, threshold_of, traced_mask
from fimaq_core.recipe import OFF, Kind

#: Bounds of scales, far beyond those of any calibration.
SCALES = 1e-30, 1e30

#: Computation while the scale is learned: ``textbook`` is the definition with autograd, ``fused``
#: has hand-written passes for plain execution, ``traced`` has hand-written passes for compilation.
Form = Literal["textbook", "fused", "traced"]


def take_shapes(
    module: nn.Module, names: tuple[str, ...], state_dict: dict[str, Any], prefix: str
) -> None:
    """Give the tensors ``names`` of ``module`` their shapes in a checkpoint, set by calibration."""
    for name in names:
        found, own = state_dict.get(prefix + name), getattr(module, name)
        if found is not None and found.shape != own.shape:
            own.data = own.new_zeros(found.shape)


def outside(name: str, values: Tensor, least: float, most: float) -> str | None:
    """Return ``name is 3, outside 0 to 2`` for the first value outside the bounds, or None."""
    wrong = values[~((values >= least) & (values <= most))]  # NaN is outside too
    return f"{name} is {wrong[0]:g}, outside {least:g} to {most:g}" if wrong.numel() else None


class ActivationQuantizer(nn.Module):
    """Quantizer with a scale, which is learned during reconstruction, with random dropping.

    Dropping leaves single elements in full precision (QDrop, Wei et al., ICLR 2022). The lower
    bound of a learned scale is `SCALE_FLOOR` in fimaq_core/reconstruction/state.py.
    """

    shaped: ClassVar[tuple[str, ...]] = ("scale",)  # tensors whose shapes calibration decides
    kind: Kind  # name of the quantizer in recipes and records
    scale: nn.Parameter  # float32, broadcasts to the input; empty before calibration
    key: Tensor  # (2,) int32 buffer, the key of the random dropping

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.empty(0), requires_grad=False)
        self.register_buffer("key", torch.zeros(2, dtype=torch.int32), persistent=False)
        self.learning: Form | None = None  # None outside of training
        self.keep_probability = 1.0  # share of elements quantized while learning, in 1/256

    @property
    def levels(self) -> int:
        """Number of codes."""
        return int(2**self.bits)

    @property
    def off(self) -> bool:
        """True if values pass unchanged."""
        return self.bits == OFF

    def set_scale(self, scale: Tensor) -> None:
        """Set the scale (a float tensor that broadcasts to the input)."""
        self.scale = nn.Parameter(scale.detach().clone().float().contiguous(), requires_grad=False)

    def problem(self, one_sided: bool) -> str | None:
        """Return tensor and value that no calibration gives, as in ``scale is 0``, or None.

        ``one_sided`` is True if the range may lie on one side of zero.
        """
        if self.off:
            return None
        return outside("scale", self.scale, *SCALES) if self.scale.numel() else "scale is missing"

    def _check_calibrated(self) -> None:
        if self.scale.numel() == 0:
            raise RuntimeError("quantizer used before calibration")

    def _kept(self, x: Tensor) -> Tensor | None:
        """Draw the mask of the elements of ``x`` to quantize in this step; None for all."""
        threshold = threshold_of(self.keep_probability)
        if threshold >= 256:
            return None
        if self.learning == "traced":
            return traced_mask(x, self.key, threshold)
        dtype = torch.bool if self.learning == "textbook" else torch.float32
        return eager_mask(x, self.key, threshold, dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        take_shapes(self, self.shaped, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        shape = tuple(self.scale.shape)
        return "off" if self.off else f"{self.kind}, bits={self.bits}, scale={shape}"
