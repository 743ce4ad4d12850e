"""Module map of a quantized model: its quantized layers and its modules in full precision."""

from collections.abc import Iterator, Mapping
from dataclasses import fields

from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.layers import QuantMatMul, WeightLayer, quant_layers
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.recipe import OFF
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from tasks.common.record import LayerEntry, ModuleMap

#: Layers that multiply, including float layers that are not swapped for quantized ones.
Layer = nn.Linear | nn.Conv2d | nn.ConvTranspose2d | QuantMatMul

_KINDS = {
    QuantMatMul: "product",
    nn.Linear: "linear",
    nn.Conv2d: "convolution",
    nn.ConvTranspose2d: "transposed convolution",
}
#: Modules without children that the map leaves out.
_NOT_LISTED = nn.Identity | nn.Dropout | ActivationQuantizer


def module_map(chain: BlockChain, part: str = "") -> ModuleMap:
    """Return the module map of ``chain``: ``part`` and the names of modules in the float model.

    A quantizable layer is in full precision if all its quantizers are off.
    """
    quantized = []
    for segment in chain:
        for name, layer in quant_layers(segment.block):
            entry = layer_entry(part_name(part, f"{segment.label}.{name}".rstrip(".")), layer)
            if not _off(entry):
                quantized.append(entry)
    parts = chain_parts(chain)
    full = [leaf for name, module in parts for leaf in _leaves(module, part_name(part, name))]
    return ModuleMap(quantized=quantized, full_precision=full)


def whole_map(chains: Mapping[str, BlockChain], untouched: Mapping[str, nn.Module]) -> ModuleMap:
    """Return the module map of a model of several parts, including its ``untouched`` parts."""
    maps = [module_map(chain, part) for part, chain in chains.items()]
    rest = [leaf for part, module in untouched.items() for leaf in _leaves(module, part)]
    return ModuleMap(
        quantized=[entry for one in maps for entry in one.quantized],
        full_precision=[name for one in maps for name in one.full_precision] + rest,
    )


def chain_parts(chain: BlockChain) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of all parts of a chain: per segment ``before``, block and ``keep``."""
    for segment in chain:
        yield f"{segment.label}.before", segment.before
        yield segment.label, segment.block
        if segment.keep is not None:
            yield f"{segment.label}.keep", segment.keep


def part_name(part: str, name: str) -> str:
    """Return ``part.name``, or ``name`` if the part has no name."""
    return f"{part}.{name}" if part else name


def merge_logs(log: ReconstructionLog, part: str, own: ReconstructionLog) -> None:
    """Add the log ``own`` of one part of the model to the log of the model."""
    for field in fields(log):
        value = getattr(own, field.name)
        if isinstance(value, dict):
            named = {part_name(part, label): one for label, one in value.items()}
            getattr(log, field.name).update(named)
    log.notes += [part_name(part, note) for note in own.notes]
    if len(log.last_loss) > len(own.last_loss) and own.engine != log.engine:
        log.notes.append(f"{part}: reconstructed by the engine '{own.engine}'")
    else:
        log.engine = own.engine


def layer_entry(name: str, layer: Layer) -> LayerEntry:
    """Return the module map entry of a layer; a float layer has 32 bits and no quantizers."""
    weight = other = given = None
    if isinstance(layer, QuantMatMul):
        given, other = layer.a_quantizer, layer.b_quantizer
    elif isinstance(layer, WeightLayer):
        weight, given = layer.weight_quantizer, layer.input_quantizer
    return LayerEntry(
        name=name,
        kind=next(text for kind, text in _KINDS.items() if isinstance(layer, kind)),
        weight_bits=weight.bits if weight else OFF,
        input_bits=given.bits if given else OFF,
        weight_ranges="none" if other else _ranges(weight),
        input_ranges=_ranges(given) + (f"; {_ranges(other)}" if other else ""),
        weight_quantizer=_kind(weight),
        input_quantizer=_kind(given),
        other_bits=other.bits if other else None,
        other_quantizer=_kind(other) if other else None,
    )


def _kind(quantizer: ActivationQuantizer | None) -> str:
    return "none" if quantizer is None or quantizer.off else quantizer.kind


def _ranges(quantizer: ActivationQuantizer | None) -> str:
    if quantizer is None or quantizer.off:
        return "full precision"
    scale = quantizer.scale
    return "per tensor" if scale.numel() == 1 else f"{scale.numel()} scales {tuple(scale.shape)}"


def _off(entry: LayerEntry) -> bool:
    return min(entry.weight_bits, entry.input_bits, entry.other_bits or OFF) == OFF


def _leaves(module: nn.Module, prefix: str) -> list[str]:
    """Return name and class of all modules in full precision that have no children."""
    found = []
    for name, child in module.named_modules():
        where, kind = f"{prefix}.{name}".rstrip("."), type(child).__name__
        if isinstance(child, WeightLayer | QuantMatMul):
            if _off(layer_entry(where, child)):
                found.append(f"{where} ({kind.removeprefix('Quant')})")
        elif not isinstance(child, _NOT_LISTED) and not [*child.children()]:
            found.append(f"{where} ({kind})")
    return found
