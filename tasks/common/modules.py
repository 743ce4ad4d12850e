"""The module map of a quantized model: what is quantized and how, what stays in full precision."""

from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul, quant_layers
from fimaq_core.quantizers.affine import AffineQuantizer
from tasks.common.record import LayerEntry, ModuleMap


def module_map(chain: BlockChain) -> ModuleMap:
    """List the layers of ``chain`` by their names in the original model."""
    quantized: list[LayerEntry] = []
    full: list[str] = []
    for segment in chain:
        for name, layer in quant_layers(segment.block):
            quantized.append(_entry(f"{segment.label}.{name}".rstrip("."), layer))
        for part, prefix in ((segment.before, f"{segment.label}.before"), (segment.block, segment.label)):
            for name, module in part.named_modules():
                leaf = not any(True for _ in module.children())
                if leaf and not isinstance(module, nn.Identity | nn.Dropout | AffineQuantizer | QuantMatMul):
                    full.append(f"{f'{prefix}.{name}'.rstrip('.')} ({type(module).__name__})")
    return ModuleMap(quantized=quantized, full_precision=full)


def _entry(name: str, layer: QuantLinear | QuantConv2d | QuantMatMul) -> LayerEntry:
    if isinstance(layer, QuantMatMul):
        shapes = f"{_ranges(layer.a_quantizer)}; {_ranges(layer.b_quantizer)}"
        return LayerEntry(
            name=name,
            kind="product",
            weight_bits=32,
            input_bits=layer.a_quantizer.bits,
            weight_ranges="none",
            input_ranges=shapes,
        )
    return LayerEntry(
        name=name,
        kind="convolution" if isinstance(layer, QuantConv2d) else "linear",
        weight_bits=layer.weight_quantizer.bits,
        input_bits=layer.input_quantizer.bits,
        weight_ranges=_ranges(layer.weight_quantizer),
        input_ranges=_ranges(layer.input_quantizer),
    )


def _ranges(quantizer: AffineQuantizer) -> str:
    if quantizer.off:
        return "full precision"
    scale: Tensor = quantizer.scale
    return "per tensor" if scale.numel() == 1 else f"{scale.numel()} scales {tuple(scale.shape)}"
