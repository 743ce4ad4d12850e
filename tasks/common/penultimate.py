"""Penultimate features: the inputs of a classifier during a forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain


def classifiers(model: object) -> Sequence[nn.Module]:
    """Return the last linear layers of a chain or a timm model: one, or DeiT's two; else none."""
    if isinstance(model, BlockChain):
        if model.feature_end == len(model):
            return ()
        block = model.segment(model.feature_end).block
        found = block[-1] if isinstance(block, nn.Sequential) else block
        pair = [getattr(found, name, None) for name in ("head", "head_dist")]
        layers = pair if all(isinstance(one, nn.Module) for one in pair) else [found]
    else:
        getter = getattr(model, "get_classifier", None)
        layers = getter() if callable(getter) else ()
        layers = layers if isinstance(layers, tuple | list) else [layers]
    return [one for one in layers if isinstance(one, nn.Linear)]


@contextmanager
def penultimate(model: object) -> Iterator[Callable[[], Tensor | None]]:
    """Give a function that returns the features (B, d) of the latest forward pass, or None.

    The feature is the input of :func:`classifiers`; DeiT's two are joined.
    """
    inputs: dict[int, Tensor] = {}

    def keep(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[id(layer)] = given[0].detach()

    hooks = [layer.register_forward_pre_hook(keep) for layer in classifiers(model)]
    try:
        yield lambda: torch.cat([*inputs.values()], 1).float() if inputs else None
    finally:
        for hook in hooks:
            hook.remove()
