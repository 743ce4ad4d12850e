"""Multiplications with addition (MACs) of each layer for one image."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fimaq_core.chain import BlockChain
from fimaq_core.layers import QuantMatMul, quant_layers, set_quantized

#: What multiplies: also float layers that no family swapped.
Layer = nn.Linear | nn.Conv2d | nn.ConvTranspose2d | QuantMatMul


@torch.no_grad()
def count_macs(chain: BlockChain, image: Tensor) -> dict[str, int]:
    """Return the MACs of every layer of ``chain`` for one input (1, ...), in full precision.

    PyTorch counts them while the input passes. A layer that is used twice counts twice.

    Raises:
        ValueError: not one image.
    """
    if image.shape[0] != 1 and chain.segment(0).kind != "predictor":  # of which one image has many inputs
        raise ValueError(f"one image is needed, got {image.shape[0]}")
    flops = FlopCounterMode(display=False)
    macs = dict.fromkeys((name for name, _ in multiplying_layers(chain)), 0)

    def count(name: str, sign: int) -> Callable[..., None]:
        def add(*_: object) -> None:
            macs[name] += sign * flops.get_total_flops() // 2  # two operations per MAC

        return add

    switched = [(layer, layer.quantized) for _, layer in quant_layers(chain)]
    handles = []
    for name, layer in multiplying_layers(chain):
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


def multiplying_layers(chain: BlockChain) -> Iterator[tuple[str, Layer]]:
    """Every layer that multiplies, by its name in the module map."""
    for prefix, part in chain_parts(chain):
        for name, module in part.named_modules(prefix=prefix):
            if isinstance(module, Layer):
                yield name, module


def chain_parts(chain: BlockChain) -> Iterator[tuple[str, nn.Module]]:
    """What comes before each segment's block, the block, and what keeps of its output, by the module map's names."""
    for segment in chain:
        yield f"{segment.label}.before", segment.before
        yield segment.label, segment.block
        if segment.keep is not None:
            yield f"{segment.label}.keep", segment.keep
