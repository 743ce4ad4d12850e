"""Quantizable layers: a float layer or a product with its quantizers; functions to find them."""

from collections.abc import Iterator

from torch import nn

from fimaq_core.layers.product import QuantMatMul
from fimaq_core.layers.weighted import (
    FORMS,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    WeightLayer,
    decide_rounding,
    fold_shift,
)

__all__ = [
    "FORMS",
    "QuantConv2d",
    "QuantConvTranspose2d",
    "QuantLayer",
    "QuantLinear",
    "QuantMatMul",
    "WeightLayer",
    "decide_rounding",
    "decide_roundings",
    "fold_shift",
    "quant_layers",
    "set_quantized",
]

QuantLayer = WeightLayer | QuantMatMul


def quant_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, QuantLayer]]:
    """Yield name and layer of each quantizable layer in ``module``, which may be one itself."""
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, QuantLayer):
            yield name, child


def set_quantized(module: nn.Module, on: bool) -> None:
    """Switch every quantizable layer in ``module`` to its quantized or full-precision form."""
    for _, layer in quant_layers(module):
        layer.quantized = on


def decide_roundings(module: nn.Module) -> None:
    """Call :func:`decide_rounding` for every layer with a weight in ``module``."""
    for _, layer in quant_layers(module):
        if isinstance(layer, WeightLayer):
            decide_rounding(layer)
