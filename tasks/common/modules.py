"""The module map of a quantized model: what is quantized and how, what stays in full precision."""

from collections.abc import Mapping

from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.layers import QuantMatMul, WeightLayer, quant_layers
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.recipe import OFF
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from tasks.common.macs import Layer
from tasks.common.record import LayerEntry, ModuleMap


def module_map(chain: BlockChain, part: str = "") -> ModuleMap:
    """List the layers of ``chain`` by their names in the original model, behind the name of its part where it has one.

    A quantizable layer whose quantizers are all off is in full precision.
    """
    quantized: list[LayerEntry] = []
    full: list[str] = []
    for segment in chain:
        label = part_name(part, segment.label)
        for name, layer in quant_layers(segment.block):
            entry = layer_entry(f"{label}.{name}".rstrip("."), layer)
            if not _off(entry):
                quantized.append(entry)
        full += [*_leaves(segment.before, f"{label}.before"), *_leaves(segment.block, label)]
        if segment.keep is not None:
            full += _leaves(segment.keep, f"{label}.keep")
    return ModuleMap(quantized=quantized, full_precision=full)


def whole_map(chains: Mapping[str, BlockChain], untouched: Mapping[str, nn.Module]) -> ModuleMap:
    """The module map of a model of several parts, and of those that are left as they are."""
    maps = [module_map(chain, part) for part, chain in chains.items()]
    rest = [leaf for part, module in untouched.items() for leaf in _leaves(module, part)]
    return ModuleMap(
        quantized=[entry for one in maps for entry in one.quantized],
        full_precision=[name for one in maps for name in one.full_precision] + rest,
    )


def part_name(part: str, name: str) -> str:
    """``name`` inside the part of a model; parts without a name add nothing."""
    return f"{part}.{name}" if part else name


def merge_logs(log: ReconstructionLog, part: str, own: ReconstructionLog) -> None:
    """Add to ``log`` what was done to a part of the model."""
    log.last_loss |= {part_name(part, label): value for label, value in own.last_loss.items()}
    log.fisher_passes |= {part_name(part, label): value for label, value in own.fisher_passes.items()}
    log.error |= {part_name(part, label): value for label, value in own.error.items()}
    log.fisher |= {part_name(part, label): value for label, value in own.fisher.items()}
    log.near_floor |= {part_name(part, label): count for label, count in own.near_floor.items()}
    log.notes += [part_name(part, note) for note in own.notes]
    if len(log.last_loss) > len(own.last_loss) and own.engine != log.engine:
        log.notes.append(f"{part}: reconstructed by the engine '{own.engine}'")
    else:
        log.engine = own.engine


def _off(entry: LayerEntry) -> bool:
    return min(entry.weight_bits, entry.input_bits, entry.other_bits or OFF) == OFF


def _leaves(module: nn.Module, prefix: str) -> list[str]:
    found = []
    for name, child in module.named_modules():
        where, kind = f"{prefix}.{name}".rstrip("."), type(child).__name__
        if isinstance(child, WeightLayer | QuantMatMul):
            if _off(layer_entry(where, child)):
                found.append(f"{where} ({kind.removeprefix('Quant')})")
        elif not any(True for _ in child.children()) and not isinstance(child, nn.Identity | nn.Dropout | ActivationQuantizer):
            found.append(f"{where} ({kind})")
    return found


def layer_entry(name: str, layer: Layer) -> LayerEntry:
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
    kind = "linear"
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        kind = "convolution" if isinstance(layer, nn.Conv2d) else "transposed convolution"
    if not isinstance(layer, WeightLayer):
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
