"""Quantizable layers: a float layer (or product) plus its quantizers."""

from fimaq_core.layers.layers import QuantConv2d, QuantLayer, QuantLinear, QuantMatMul
from fimaq_core.layers.walk import decide_roundings, quant_layers, set_quantized

__all__ = ["QuantConv2d", "QuantLayer", "QuantLinear", "QuantMatMul", "decide_roundings", "quant_layers", "set_quantized"]
