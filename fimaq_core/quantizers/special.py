"""Activation quantizers made for what softmax and GELU give, as modules."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.quantizers.logarithm import (
    ADALOG_R,
    GELU_SHIFT,
    adalog_fake_quantize,
    adalog_tables,
    learned_log_fake_quantize,
    log_fake_quantize,
)
from fimaq_core.quantizers.twin import (
    learned_twin_gelu,
    learned_twin_softmax,
    twin_gelu,
    twin_softmax,
)
from fimaq_core.recipe import Kind

#: What an operand comes out of.
Source = Literal["softmax", "gelu"]


class LogQuantizer(ActivationQuantizer):
    """Quantizer with levels ``s * base ** -k``, after a shift that makes GELU outputs non-negative.

    Unless it is folded, the shift is taken away again; folded, what it adds to a linear layer's
    output is in the layer's ``quantized_bias``.
    """

    step: Tensor  # log2 of the base, a float32 buffer; starts as ``first_step``
    folded: Tensor  # whether the output keeps the shift, a boolean buffer
    first_step: ClassVar[float] = 1.0

    def __init__(self, bits: int, source: Source) -> None:
        super().__init__(bits)
        self.source = source  # where the input comes from; softmax outputs are not shifted
        self.shift = GELU_SHIFT if source == "gelu" else 0.0
        self.register_buffer("step", torch.tensor(self.first_step))
        self.register_buffer("folded", torch.tensor(False))
        self._folded = False

    def fold(self) -> None:
        """Leave the shift in the output from now on."""
        self._folded = True
        self.folded = torch.ones_like(self.folded)

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return x
        self._check_calibrated()
        shifted = x + self.shift if self.shift else x
        if self.learning is None:
            out = self._inferred(shifted)
        else:
            out = learned_log_fake_quantize(
                shifted, self.scale, self.step, self.levels, self._kept(x)
            )
        return out - self.shift if self.shift and not self._folded else out

    def _inferred(self, x: Tensor) -> Tensor:
        return log_fake_quantize(x, self.scale, self.step, self.levels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        folded = state_dict.get(prefix + "folded")
        if folded is not None:
            self._folded = bool(folded)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Log2Quantizer(LogQuantizer):
    """Base 2."""

    kind: ClassVar[Kind] = "log2"


class LogSqrt2Quantizer(LogQuantizer):
    """Base √2 (RepQ-ViT: Li et al., ICCV 2023, arXiv:2212.08254)."""

    kind: ClassVar[Kind] = "logsqrt2"
    first_step: ClassVar[float] = 0.5


class AdaLogQuantizer(LogQuantizer):
    """Base ``2 ** (q / 37)`` with a searched q (AdaLog: Wu et al., ECCV 2024, arXiv:2407.12951).

    Inference multiplies by table entries, a shift and a mantissa of few bits for each code;
    training uses the definition.
    """

    kind: ClassVar[Kind] = "adalog"
    #: (L,) float32 buffers, the tables
    shifts: Tensor
    mantissas: Tensor

    def __init__(self, bits: int, source: Source) -> None:
        super().__init__(bits, source)
        if self.off:
            return
        shifts, mantissas = adalog_tables(ADALOG_R, self.levels)
        self.register_buffer("shifts", shifts)
        self.register_buffer("mantissas", mantissas)

    def set_base(self, q: int) -> None:
        """Set the base to ``2 ** (q / 37)``."""
        device = self.step.device
        self.step = torch.full_like(self.step, q / ADALOG_R)
        self.shifts, self.mantissas = (table.to(device) for table in adalog_tables(q, self.levels))

    def _inferred(self, x: Tensor) -> Tensor:
        return adalog_fake_quantize(
            x, self.scale, self.shifts, self.mantissas, self.step, self.levels
        )


class TwinQuantizer(ActivationQuantizer):
    """Two uniform ranges (PTQ4ViT: Yuan et al., ECCV 2022, arXiv:2111.12293).

    ``scale`` is the split of softmax outputs, or the step of GELU outputs' positive part.
    """

    kind: ClassVar[Kind] = "twin"

    def __init__(self, bits: int, source: Source) -> None:
        super().__init__(bits)
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return x
        self._check_calibrated()
        if self.learning is None:
            return (twin_softmax if self.source == "softmax" else twin_gelu)(
                x, self.scale, self.levels
            )
        learned = learned_twin_softmax if self.source == "softmax" else learned_twin_gelu
        return learned(x, self.scale, self.levels, self._kept(x))


_SPECIAL: dict[str, type[LogQuantizer] | type[TwinQuantizer]] = {
    quantizer.kind: quantizer
    for quantizer in (Log2Quantizer, LogSqrt2Quantizer, AdaLogQuantizer, TwinQuantizer)
}


def make_quantizer(kind: Kind, bits: int, source: Source) -> ActivationQuantizer:
    """The activation quantizer of a kind, for values that come out of ``source``."""
    return AffineQuantizer(bits) if kind == "uniform" else _SPECIAL[kind](bits, source)
