"""Finding the quantizable layers of a module."""

from collections.abc import Iterator

from torch import nn

from fimaq_core.layers.layers import QuantLayer, WeightLayer, decide_rounding


def quant_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, QuantLayer]]:
    """Yield (name, layer) of every quantizable layer in ``module``, itself included, in order."""
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, QuantLayer):
            yield name, child


def set_quantized(module: nn.Module, on: bool) -> None:
    """Switch every quantizable layer in ``module`` to its quantized or its full-precision form."""
    for _, layer in quant_layers(module):
        layer.quantized = on


def decide_roundings(module: nn.Module) -> None:
    """Fix the codes of every quantizable weight in ``module`` to the nearest grid points, unless they are decided already."""
    for _, layer in quant_layers(module):
        if isinstance(layer, WeightLayer):
            decide_rounding(layer)
