"""Quantizers of single operands, and how to give them other bits."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from fimaq_core.bits_map import BitsMap
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.documents import clipped
from fimaq_core.errors import RecipeError, suggest
from fimaq_core.layers import QuantLayer, QuantMatMul, WeightLayer, quant_layers
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import WeightQuantizer
from fimaq_core.quantizers.special import make_quantizer

#: Attribute of the quantizer of each operand.
_OF_WEIGHTED = {"w": "weight_quantizer", "a": "input_quantizer"}
_OF_PRODUCT = {"a": "a_quantizer", "b": "b_quantizer"}


class Place(NamedTuple):
    """A quantizable layer of a chain."""

    name: str  # as in the module map, without the part of the model
    segment: Segment
    inner: str  # name inside the segment's block
    layer: QuantLayer


def places(chain: BlockChain) -> Iterator[Place]:
    """Yield every quantizable layer of ``chain``, in order."""
    for segment in chain:
        for inner, layer in quant_layers(segment.block):
            yield Place(f"{segment.label}.{inner}".rstrip("."), segment, inner, layer)


def quantizers_of(layer: QuantLayer) -> dict[str, ActivationQuantizer]:
    """Return the quantizers of a layer by operand; see :class:`.bits_map.BitsMap`."""
    names = _OF_PRODUCT if isinstance(layer, QuantMatMul) else _OF_WEIGHTED
    return {operand: getattr(layer, name) for operand, name in names.items()}


def set_bits(layer: QuantLayer, operand: str, bits: int) -> None:
    """Give an operand a new quantizer of the same kind, without ranges, with ``bits``."""
    product = isinstance(layer, QuantMatMul)
    old = quantizers_of(layer)[operand]
    if operand == "w":
        new: ActivationQuantizer = WeightQuantizer(bits)
    else:
        new = make_quantizer(old.kind, bits, "softmax" if product else "gelu")
    setattr(layer, (_OF_PRODUCT if product else _OF_WEIGHTED)[operand], new.to(old.scale.device))
    if isinstance(layer, WeightLayer):
        layer.quantized_bias = torch.empty(0, device=old.scale.device)


def apply_bits_map(chains: Mapping[str, BlockChain], bits: BitsMap | None) -> None:
    """Give the layers of uncalibrated ``chains``, by part, the bits of a map, in place.

    Raises:
        RecipeError: the map names a layer or an operand that the model does not have.
    """
    if bits is None:
        return
    known = {
        f"{part}.{place.name}" if part else place.name: place.layer
        for part, chain in chains.items()
        for place in places(chain)
    }
    if unknown := [name for name, _ in bits if name not in known]:
        more = f" and {len(unknown) - 1} other layers" if len(unknown) > 1 else ""
        hint = clipped(suggest(unknown[0], known))
        raise RecipeError(
            f"bits_map names '{clipped(unknown[0], 100)}'{more}, which this model does not have."
            f"{hint}"
        )
    for name, widths in bits:
        for operand, width in widths:
            own = quantizers_of(known[name])
            if operand not in own:
                raise RecipeError(
                    f"bits_map gives bits to '{operand}' of {name}, which has only "
                    f"{' and '.join(own)}."
                )
            set_bits(known[name], operand, width)
