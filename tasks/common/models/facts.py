"""What a quantized model weighs and computes: bits of its weights, and operations for one image.

A layer's bit operations (BOPs) are its MACs times the bits of both factors (Bayesian Bits: van Baalen et al., NeurIPS 2020,
arXiv:2005.07093): weight and input, or a product's two operands. A quantizer that is off counts as 32 bits, so a MAC in full
precision is 32 x 32. "Full precision" is the same chain with all quantizers off.

Counted are the MACs of linear layers, convolutions and attention products as they are computed: the windows' and convolutions'
padding is among them. Sizes count every value of the chain: weights in their bits; scales and zero points of weights and
activations apart (overhead); biases, norms, embeddings and tables in 32 bits.

Not counted are softmax, norms, GELU, residual additions, biases' additions, and the quantizing itself. Nor is anything here
measured on hardware: quantization is simulated, so neither the checkpoint's file nor the running time is smaller. The numbers say
what integer storage and arithmetic would come to.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fimaq_core.chain import BlockChain
from fimaq_core.layers import QuantMatMul, WeightLayer, quant_layers, set_quantized
from fimaq_core.recipe import OFF
from tasks.common.models.module_map import Layer, chain_parts, layer_entry, part_name
from tasks.common.record import LayerEntry


@dataclass(frozen=True)
class LayerFacts:
    """One layer that multiplies; a float layer that no family swapped is one too, with 32 bits.

    Attributes:
        entry: its line of the module map.
        shape: of the weight; None for a product.
        macs: multiplications with addition for one image.
        overhead_bits: what scales and zero points of its quantizers take.
    """

    entry: LayerEntry
    shape: tuple[int, ...] | None
    macs: int
    overhead_bits: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return 0 if self.shape is None else torch.Size(self.shape).numel()

    @property
    def weight_size(self) -> int:
        """Bits of all weights, without the overhead."""
        return self.weights * self.entry.weight_bits

    @property
    def factor_bits(self) -> tuple[int, int]:
        """Bits of the two factors: input and weight, or the two operands."""
        other = self.entry.other_bits
        return self.entry.input_bits, self.entry.weight_bits if other is None else other

    @property
    def bops(self) -> int:
        """Bit operations for one image."""
        first, second = self.factor_bits
        return self.macs * first * second


@dataclass(frozen=True)
class ValueFacts:
    """Values that stay in full precision.

    Attributes:
        name: of the module, or of the tensor where a bigger module owns it.
        kind: class of the module, ``bias``, ``parameter`` or ``buffer``.
        values: how many, 32 bits each.
    """

    name: str
    kind: str
    values: int


@dataclass(frozen=True)
class ModelFacts:
    """Layers in order, what stays in full precision, and sums."""

    layers: list[LayerFacts]
    full_precision: list[ValueFacts]

    @property
    def totals(self) -> dict[str, int | float]:
        """Sums; sizes in bits, operations for one image, ratios full precision over quantized."""
        weights, weight_bits, overhead, macs, bops = (
            sum(getattr(layer, name) for layer in self.layers)
            for name in ("weights", "weight_size", "overhead_bits", "macs", "bops")
        )
        quantized = sum(layer.macs for layer in self.layers if min(layer.factor_bits) < OFF)
        values = sum(part.values for part in self.full_precision)
        size, full_size, full_bops = (
            weight_bits + overhead + values * OFF,
            (weights + values) * OFF,
            macs * OFF * OFF,
        )
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
    """Return facts about ``chain``, which is left as it was. Uncalibrated, it has no overhead.

    ``image`` and the error are those of :func:`count_macs`.
    """
    macs = count_macs(chain, image)
    layers = []
    for name, layer in _multiplying_layers(chain):
        shape = None if isinstance(layer, QuantMatMul) else tuple(layer.weight.shape)
        layers.append(LayerFacts(layer_entry(name, layer), shape, macs[name], _overhead(layer)))
    return ModelFacts(layers, list(_full_precision(chain)))


def joined_facts(parts: Mapping[str, ModelFacts], untouched: Mapping[str, nn.Module]) -> ModelFacts:
    """Return facts about a model of several parts, by names that begin with the part's.

    Values of ``untouched`` parts count as full precision; what these compute is not counted.
    """
    layers = [
        replace(
            layer, entry=layer.entry.model_copy(update={"name": part_name(part, layer.entry.name)})
        )
        for part, facts in parts.items()
        for layer in facts.layers
    ]
    values = [
        replace(value, name=part_name(part, value.name))
        for part, facts in parts.items()
        for value in facts.full_precision
    ]
    for part, module in untouched.items():
        for name, child in module.named_modules(prefix=part):
            values += _own_values(name, child)
    return ModelFacts(layers, values)


@torch.no_grad()
def count_macs(chain: BlockChain, image: Tensor) -> dict[str, int]:
    """Return the MACs of every layer of ``chain`` for one input (1, ...) in full precision.

    PyTorch counts them while the input passes. A layer that is used twice counts twice. Only the
    input's shape matters.

    Raises:
        ValueError: not one image.
    """
    if (
        image.shape[0] != 1 and chain.segment(0).kind != "predictor"
    ):  # of which one image has many inputs
        raise ValueError(f"one image is needed, got {image.shape[0]}")
    flops = FlopCounterMode(display=False)
    macs = dict.fromkeys((name for name, _ in _multiplying_layers(chain)), 0)

    def count(name: str, sign: int) -> Callable[..., None]:
        def add(*_: object) -> None:
            macs[name] += sign * flops.get_total_flops() // 2  # two operations per MAC

        return add

    switched = [(layer, layer.quantized) for _, layer in quant_layers(chain)]
    handles = []
    for name, layer in _multiplying_layers(chain):
        handles.append(layer.register_forward_pre_hook(count(name, -1)))
        handles.append(layer.register_forward_hook(count(name, 1)))
    try:
        set_quantized(chain, False)
        with flops:
            chain(image)
    finally:
        for handle in handles:
            handle.remove()
        for layer, on in switched:
            layer.quantized = on
    return macs


def _multiplying_layers(chain: BlockChain) -> Iterator[tuple[str, Layer]]:
    """Every layer that multiplies, by its name in the module map."""
    for prefix, part in chain_parts(chain):
        for name, module in part.named_modules(prefix=prefix):
            if isinstance(module, Layer):
                yield name, module


def _overhead(layer: Layer) -> int:
    if isinstance(layer, QuantMatMul):
        return _range_bits(layer.a_quantizer) + _range_bits(layer.b_quantizer)
    if isinstance(layer, WeightLayer):
        return _range_bits(layer.weight_quantizer) + _range_bits(layer.input_quantizer)
    return 0


def _range_bits(quantizer: Any) -> int:
    """Bits of what a quantizer keeps beside codes: zero points in its own bits, all else in 32."""
    if quantizer.off:
        return 0
    kept = {
        name: tensor.numel()
        for name, tensor in quantizer.state_dict().items()
        if name not in ("codes", "folded")
    }
    return sum(
        count * (quantizer.bits if name == "zero_point" else 32) for name, count in kept.items()
    )


def _full_precision(chain: BlockChain) -> Iterator[ValueFacts]:
    """Biases of layers, and all floating-point values outside of them that a checkpoint keeps."""
    for prefix, part in chain_parts(chain):
        inside: set[int] = set()
        for name, module in part.named_modules(prefix=prefix):
            if id(module) in inside:
                continue
            if isinstance(module, Layer):
                inside.update(id(child) for child in module.modules())
                count = 0 if isinstance(module, QuantMatMul) else _bias_values(module)
                if count:
                    yield ValueFacts(f"{name}.bias", "bias", count)
                continue
            yield from _own_values(name, module)


def _bias_values(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> int:
    """Values of the bias that the quantized form adds: its own, where it has one."""
    own = getattr(layer, "quantized_bias", None)
    if own is not None and own.numel():
        return int(own.numel())
    return 0 if layer.bias is None else layer.bias.numel()


def _own_values(name: str, module: nn.Module) -> Iterator[ValueFacts]:
    """What ``module`` itself keeps: one line, or one a tensor where it has parts of its own."""
    own = {
        key: value
        for key, value in module.state_dict().items()
        if "." not in key and value.is_floating_point()
    }
    # A buffer may be looked up from a smaller table, which is what has to be stored.
    tables: dict[str, int] = getattr(module, "looked_up", {})
    counts = {key: tables.get(key, value.numel()) for key, value in own.items()}
    if not any(True for _ in module.children()):
        if sum(counts.values()):
            yield ValueFacts(name, type(module).__name__, sum(counts.values()))
        return
    parameters = {key for key, _ in module.named_parameters(recurse=False)}
    for key, count in counts.items():
        yield ValueFacts(f"{name}.{key}", "parameter" if key in parameters else "buffer", count)
