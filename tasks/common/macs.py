"""Multiplications with addition (MACs) of each layer for one image, by the shapes that a pass shows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.layers import QuantMatMul, quant_layers, set_quantized

#: What multiplies: also float layers that no family swapped.
Layer = nn.Linear | nn.Conv2d | nn.ConvTranspose2d | QuantMatMul


@torch.no_grad()
def count_macs(chain: BlockChain, image: Tensor) -> dict[str, int]:
    """MACs of every layer of ``chain`` for one input (1, ...), by the shapes seen in one full-precision pass.

    Windows of attention lie in the batch dimension, so a layer's inputs are counted whole. A layer used twice counts twice.

    Raises:
        ValueError: not one image.
    """
    if image.shape[0] != 1 and chain.segment(0).kind != "predictor":  # of which one image has many inputs
        raise ValueError(f"one image is needed, got {image.shape[0]}")
    macs = dict.fromkeys((name for name, _ in multiplying_layers(chain)), 0)

    def counter(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def add(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            macs[name] += _macs(layer, args, out)

        return add

    switched = [(layer, layer.quantized) for _, layer in quant_layers(chain)]
    handles = [layer.register_forward_hook(counter(name)) for name, layer in multiplying_layers(chain)]
    try:
        set_quantized(chain, False)
        chain(image)
    finally:
        for handle in handles:
            handle.remove()
        for layer, on in switched:
            layer.quantized = on
    return macs


def _macs(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> int:
    if isinstance(layer, QuantMatMul):
        a, b = args  # (batch, heads, rows, inner), (batch, heads, inner, columns)
        return int(a.numel() * b.shape[-1])
    if isinstance(layer, nn.ConvTranspose2d):
        # Every input value is multiplied with the kernels of its group's output channels. (By numbers of channels: float and
        # quantizable layers keep their weights in different layouts.)
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        return int(args[0].numel() * layer.out_channels // layer.groups * kernel)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    # Every output value is one row of the weight times as many inputs: input channels, or kernel x channels of a group.
    return int(out.numel() * layer.weight[0].numel())


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
