"""Modules that quantize the outputs of softmax and GELU."""

from typing import Any, Literal

import torch
from torch import Tensor

from fimaq_core.quantizers.activation import ActivationQuantizer, outside
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.quantizers.logarithm import (
    ADALOG_R,
    GELU_SHIFT,
    adalog_fake_quantize,
    adalog_tables,
    learned_log_fake_quantize,
    log_fake_quantize,
)
from fimaq_core.quantizers.twin import learned_twin, twin_gelu, twin_softmax
from fimaq_core.recipe import Kind

#: Function whose output is quantized.
Source = Literal["softmax", "gelu"]


class LogQuantizer(ActivationQuantizer):
    """Quantizer with levels ``s * base ** -k``, after a shift that makes GELU outputs non-negative.

    The base of kind ``log2`` is 2; that of ``logsqrt2`` is √2 (RepQ-ViT: Li et al., ICCV 2023,
    arXiv:2212.08254). The shift is subtracted from the output until :meth:`fold`; from then on the
    ``quantized_bias`` of the linear layer subtracts its effect.
    """

    step: Tensor  # float32 buffer, log2 of the base
    folded: Tensor  # boolean buffer, True if the output keeps the shift

    def __init__(self, bits: int, source: Source, kind: Kind = "log2") -> None:
        super().__init__(bits)
        self.kind, self.source = kind, source
        self.shift = GELU_SHIFT if source == "gelu" else 0.0
        self.register_buffer("step", torch.tensor(0.5 if kind == "logsqrt2" else 1.0))
        self.register_buffer("folded", torch.tensor(False))
        self._folded = False  # `folded` as a Python value: reading a GPU's tensor takes time

    def fold(self) -> None:
        """Keep the shift in the output from now on."""
        self._folded = True
        self.folded = torch.ones_like(self.folded)

    def problem(self, one_sided: bool) -> str | None:
        return super().problem(one_sided) or self._base_problem()

    def _base_problem(self) -> str | None:
        """Return :meth:`problem` of the tensors that depend on the base."""
        own = 0.5 if self.kind == "logsqrt2" else 1.0
        return None if self.off else outside("step", self.step, own, own)

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return x
        self._check_calibrated()
        shifted = x + self.shift if self.shift else x
        if self.learning is None:
            out = self._inferred(shifted)
        else:
            kept = self._kept(x)
            out = learned_log_fake_quantize(shifted, self.scale, self.step, self.levels, kept)
        return out - self.shift if self.shift and not self._folded else out

    def _inferred(self, x: Tensor) -> Tensor:
        return log_fake_quantize(x, self.scale, self.step, self.levels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        folded = state_dict.get(prefix + "folded")
        if folded is not None:
            self._folded = bool(folded)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdaLogQuantizer(LogQuantizer):
    """Logarithmic quantizer of base ``2 ** (q / 37)``; calibration searches q.

    AdaLog: Wu et al., ECCV 2024, arXiv:2407.12951. Inference uses tables with a shift and a
    mantissa of few bits per code; training uses the definition.
    """

    shifts: Tensor  # (L,) float32 buffer, see `adalog_tables`
    mantissas: Tensor  # the same

    def __init__(self, bits: int, source: Source) -> None:
        super().__init__(bits, source, "adalog")
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

    def _base_problem(self) -> str | None:
        if self.off or (found := outside("step", self.step, 1 / ADALOG_R, 2**20)) is not None:
            return None if self.off else found
        q = round(float(self.step) * ADALOG_R)
        shifts, mantissas = adalog_tables(q, self.levels)
        unit = 1.01 / (2 * self.levels - 2)  # the rounding depends on the processor
        step = torch.tensor(q / ADALOG_R)
        wanted = {"step": (step, 1e-6 * q), "shifts": (shifts, 0), "mantissas": (mantissas, unit)}
        for name, (expected, bound) in wanted.items():
            error = (getattr(self, name).cpu() - expected).abs().max()
            if not error <= bound:
                return f"{name} is off by {error:g} from that of the base 2^({q}/{ADALOG_R})"
        return None

    def _inferred(self, x: Tensor) -> Tensor:
        tables = self.shifts, self.mantissas
        return adalog_fake_quantize(x, self.scale, *tables, self.step, self.levels)


class TwinQuantizer(ActivationQuantizer):
    """Quantizer with two uniform ranges (PTQ4ViT: Yuan et al., ECCV 2022, arXiv:2111.12293).

    ``scale`` is the split of softmax outputs, or the step of the positive part of GELU outputs.
    """

    kind = "twin"

    def __init__(self, bits: int, source: Source) -> None:
        super().__init__(bits)
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return x
        self._check_calibrated()
        quantize = twin_softmax if self.source == "softmax" else twin_gelu
        if self.learning is None:
            return quantize(x, self.scale, self.levels)
        return learned_twin(quantize, x, self.scale, self.levels, self._kept(x))


def make_quantizer(kind: Kind, bits: int, source: Source) -> ActivationQuantizer:
    """Make the activation quantizer of a kind, for outputs of ``source``."""
    if kind == "uniform":
        return AffineQuantizer(bits)
    if kind == "twin":
        return TwinQuantizer(bits, source)
    return AdaLogQuantizer(bits, source) if kind == "adalog" else LogQuantizer(bits, source, kind)
