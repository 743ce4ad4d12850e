"""The module map of a quantized model: what is quantized and how, what stays in full precision."""

from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul, quant_layers
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.recipe import OFF
from tasks.common.record import LayerEntry, ModuleMap


def module_map(chain: BlockChain) -> ModuleMap:
    """List the layers of ``chain`` by their names in the original model."""
    quantized: list[LayerEntry] = []
    full: list[str] = []
    for segment in chain:
        for name, layer in quant_layers(segment.block):
            quantized.append(layer_entry(f"{segment.label}.{name}".rstrip("."), layer))
        for part, prefix in ((segment.before, f"{segment.label}.before"), (segment.block, segment.label)):
            for name, module in part.named_modules():
                leaf = not any(True for _ in module.children())
                if leaf and not isinstance(module, nn.Identity | nn.Dropout | ActivationQuantizer | QuantMatMul):
                    full.append(f"{f'{prefix}.{name}'.rstrip('.')} ({type(module).__name__})")
    return ModuleMap(quantized=quantized, full_precision=full)


def layer_entry(name: str, layer: nn.Linear | nn.Conv2d | QuantMatMul) -> LayerEntry:
    """The line of one layer; a float layer has 32 bits and no quantizers."""
    if isinstance(layer, QuantMatMul):
        a, b = layer.a_quantizer, layer.b_quantizer
        return LayerEntry(
            name=name,
            kind="product",
            weight_bits=OFF,
            input_bits=a.bits,
            weight_ranges="none",
            input_ranges=f"{_ranges(a)}; {_ranges(b)}",
            weight_quantizer="none",
            input_quantizer=_kind(a),
            other_bits=b.bits,
            other_quantizer=_kind(b),
        )
    kind = "convolution" if isinstance(layer, nn.Conv2d) else "linear"
    if not isinstance(layer, QuantLinear | QuantConv2d):
        none = {"weight_ranges": "full precision", "input_ranges": "full precision"}
        return LayerEntry(
            name=name, kind=kind, weight_bits=OFF, input_bits=OFF, weight_quantizer="none", input_quantizer="none", **none
        )
    return LayerEntry(
        name=name,
        kind=kind,
        weight_bits=layer.weight_quantizer.bits,
        input_bits=layer.input_quantizer.bits,
        weight_ranges=_ranges(layer.weight_quantizer),
        input_ranges=_ranges(layer.input_quantizer),
        weight_quantizer=_kind(layer.weight_quantizer),
        input_quantizer=_kind(layer.input_quantizer),
    )


def _kind(quantizer: ActivationQuantizer) -> str:
    return "none" if quantizer.off else quantizer.kind


def _ranges(quantizer: ActivationQuantizer) -> str:
    if quantizer.off:
        return "full precision"
    scale: Tensor = quantizer.scale
    return "per tensor" if scale.numel() == 1 else f"{scale.numel()} scales {tuple(scale.shape)}"
