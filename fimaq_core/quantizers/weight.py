"""Weight quantizer: affine per output channel, with codes once the rounding has been decided."""

from typing import Any

import torch
from torch import Tensor

from fimaq_core.quantizers.affine import AffineQuantizer, fake_quantize


class WeightQuantizer(AffineQuantizer):
    """Per-output-channel affine quantizer of a weight seen as a matrix (rows = output channels).

    ``codes`` (uint8, rows x columns) hold decided roundings. The float weight stays beside them, so
    that one model can run in full precision and quantized.
    """

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes = state_dict.get(prefix + "codes")
        if codes is not None and codes.shape != self.codes.shape:
            self.codes = torch.zeros(codes.shape, dtype=torch.uint8, device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
