"""Sizes and operations of a quantized model: bits of its values, and MACs and BOPs per image.

The bit operations (BOPs) of a layer are its MACs times the bits of both factors: weight and input,
or the two operands of a product (Bayesian Bits: van Baalen et al., NeurIPS 2020, arXiv:2005.07093).
A quantizer that is off counts as 32 bits, so a MAC in full precision counts 32 x 32 BOPs. "Full
precision" means the same chain with all quantizers off.

MACs count linear layers, convolutions and attention products, including the padding of windows and
convolutions. Sizes count every value of the chain: weights in their bits; scales and zero points
as overhead; biases, norms, embeddings and tables in 32 bits.

Softmax, norms, GELU, additions and the quantization itself are not counted. The numbers are those
of integer storage and integer arithmetic. They are not measured: quantization is simulated, so the
checkpoint is not smaller and the model is not faster.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fimaq_core.chain import BlockChain
from fimaq_core.layers import QuantMatMul, WeightLayer, quant_layers, set_quantized
from fimaq_core.recipe import OFF
from tasks.common.models.module_map import Layer, chain_parts, layer_entry, part_name
from tasks.common.record import LayerEntry


class LayerFacts(LayerEntry):
    """Module map entry of a layer that multiplies, with its sizes and operations.

    Each field is a column of the command ``inspect``.
    """

    weight_shape: tuple[int, ...] | None  # None for an attention product
    weights: int  # number of weights
    size_bits: int  # of all weights, without the overhead
    overhead_bits: int  # of all scales and zero points
    macs: int  # per image
    bops: int  # per image


@dataclass(frozen=True)
class ValueFacts:
    """Values in full precision, of 32 bits each."""

    name: str  # of the module; of the tensor if the module has children
    kind: str  # class of the module; for a tensor "bias", "parameter" or "buffer"
    values: int  # number of values


@dataclass(frozen=True)
class ModelFacts:
    """Layers in order, values in full precision, and sums over both."""

    layers: list[LayerFacts]
    full_precision: list[ValueFacts]

    @property
    def totals(self) -> dict[str, int | float]:
        """Sums: sizes in bits, operations per image, and ratios (full precision / quantized)."""
        weights, weight_bits, overhead, macs, bops = (
            sum(getattr(layer, name) for layer in self.layers)
            for name in ("weights", "size_bits", "overhead_bits", "macs", "bops")
        )
        quantized = sum(one.macs for one in self.layers if one.bops < one.macs * OFF * OFF)
        values = sum(part.values for part in self.full_precision)
        size = weight_bits + overhead + values * OFF
        full_size, full_bops = (weights + values) * OFF, macs * OFF * OFF
        return {
            "weights": weights,
            "weight_bits": weight_bits,
            "full_weight_bits": weights * OFF,
            "weight_ratio": weights * OFF / weight_bits,
            "overhead_bits": overhead,
            "full_precision_values": values,
            "full_precision_bits": values * OFF,
            "size_bits": size,
            "full_size_bits": full_size,
            "size_ratio": full_size / size,
            "macs": macs,
            "quantized_macs": quantized,
            "quantized_share": quantized / macs,
            "bops": bops,
            "full_bops": full_bops,
            "bops_ratio": full_bops / bops,
        }


def model_facts(chain: BlockChain, image: Tensor) -> ModelFacts:
    """Return facts about ``chain``; a chain that is not calibrated has no overhead.

    ``image`` and the error are those of :func:`count_macs`.
    """
    macs = count_macs(chain, image)
    layers = []
    for name, layer in _multiplying_layers(chain):
        entry = layer_entry(name, layer)
        shape = None if isinstance(layer, QuantMatMul) else tuple(layer.weight.shape)
        weights = 0 if shape is None else prod(shape)
        second = entry.weight_bits if entry.other_bits is None else entry.other_bits
        facts = LayerFacts(
            **dict(entry),
            weight_shape=shape,
            weights=weights,
            size_bits=weights * entry.weight_bits,
            overhead_bits=_overhead(layer),
            macs=macs[name],
            bops=macs[name] * entry.input_bits * second,
        )
        layers.append(facts)
    return ModelFacts(layers, list(_full_precision(chain)))


def joined_facts(parts: Mapping[str, ModelFacts], untouched: Mapping[str, nn.Module]) -> ModelFacts:
    """Return facts about a model of several parts; each name starts with the name of its part.

    Values of ``untouched`` parts count as full precision. Operations of these parts do not count.
    """
    layers, values = [], []
    for part, facts in parts.items():
        for layer in facts.layers:
            layers.append(layer.model_copy(update={"name": part_name(part, layer.name)}))
        values += [replace(one, name=part_name(part, one.name)) for one in facts.full_precision]
    for part, module in untouched.items():
        for name, child in module.named_modules(prefix=part):
            values += _own_values(name, child)
    return ModelFacts(layers, values)


@torch.no_grad()
def count_macs(chain: BlockChain, image: Tensor) -> dict[str, int]:
    """Return the MACs of every layer of ``chain`` for one input (1, ...) in full precision.

    PyTorch's counter sees one forward pass, so a layer that runs twice counts twice. Only the shape
    of the input matters. A chain that begins with a predictor may take several inputs per image.
    Raises ValueError: the input is not one image.
    """
    if image.shape[0] != 1 and chain.segment(0).kind != "predictor":
        raise ValueError(f"one image is needed, got {image.shape[0]}")
    # Hooks, since the counter itself misses layers that a chain holds at two places.
    flops = FlopCounterMode(display=False)
    macs = dict.fromkeys((name for name, _ in _multiplying_layers(chain)), 0)

    def count(name: str, sign: int, *_: object) -> None:
        macs[name] += sign * flops.get_total_flops() // 2  # one MAC is two operations

    states = [(layer, layer.quantized) for _, layer in quant_layers(chain)]
    handles = []
    for name, layer in _multiplying_layers(chain):
        handles.append(layer.register_forward_pre_hook(partial(count, name, -1)))
        handles.append(layer.register_forward_hook(partial(count, name, 1)))
    try:
        set_quantized(chain, False)
        with flops:
            chain(image)
    finally:
        for handle in handles:
            handle.remove()
        for layer, quantized in states:
            layer.quantized = quantized
    return macs


def _multiplying_layers(chain: BlockChain) -> Iterator[tuple[str, Layer]]:
    """Yield (name in the module map, layer) of every layer that multiplies."""
    for prefix, part in chain_parts(chain):
        for name, module in part.named_modules(prefix=prefix):
            if isinstance(module, Layer):
                yield name, module


def _overhead(layer: Layer) -> int:
    """Return the bits that the quantizers of a layer store besides integer codes.

    A zero point has the bits of its quantizer. All other values have 32 bits.
    """
    quantizers: tuple[Any, ...] = ()
    if isinstance(layer, QuantMatMul):
        quantizers = layer.a_quantizer, layer.b_quantizer
    elif isinstance(layer, WeightLayer):
        quantizers = layer.weight_quantizer, layer.input_quantizer
    return sum(
        tensor.numel() * (quantizer.bits if name == "zero_point" else OFF)
        for quantizer in quantizers
        if not quantizer.off
        for name, tensor in quantizer.state_dict().items()
        if name not in ("codes", "folded")
    )


def _full_precision(chain: BlockChain) -> Iterator[ValueFacts]:
    """Yield the biases of multiplying layers, and all floating-point values of other modules."""
    for prefix, part in chain_parts(chain):
        inside: set[int] = set()
        for name, module in part.named_modules(prefix=prefix):
            if id(module) in inside:
                continue
            if isinstance(module, Layer):
                inside.update(id(child) for child in module.modules())
                # A quantized layer adds its bias, or the one that calibration computed instead.
                biases = (getattr(module, key, None) for key in ("quantized_bias", "bias"))
                count = next((one.numel() for one in biases if one is not None and one.numel()), 0)
                if count:
                    yield ValueFacts(f"{name}.bias", "bias", count)
                continue
            yield from _own_values(name, module)


def _own_values(name: str, module: nn.Module) -> Iterator[ValueFacts]:
    """Yield one entry for ``module`` itself, or one per tensor if it has children."""
    # A buffer may be computed from a smaller table. Then only the table has to be stored.
    tables: dict[str, int] = getattr(module, "looked_up", {})
    counts = {
        key: tables.get(key, value.numel())
        for key, value in module.state_dict().items()
        if "." not in key and value.is_floating_point()
    }
    if not [*module.children()]:
        if sum(counts.values()):
            yield ValueFacts(name, type(module).__name__, sum(counts.values()))
        return
    parameters = {key for key, _ in module.named_parameters(recurse=False)}
    for key, count in counts.items():
        yield ValueFacts(f"{name}.{key}", "parameter" if key in parameters else "buffer", count)
