"""Quantizable layers: a float layer (or product) plus its quantizers."""

from fimaq_core.layers.layers import QuantConv2d, QuantConvTranspose2d, QuantLayer, QuantLinear, QuantMatMul, WeightLayer
from fimaq_core.layers.walk import decide_roundings, quant_layers, set_quantized

__all__ = [
    "QuantConv2d",
    "QuantConvTranspose2d",
    "QuantLayer",
    "QuantLinear",
    "QuantMatMul",
    "WeightLayer",
    "decide_roundings",
    "quant_layers",
    "set_quantized",
]
