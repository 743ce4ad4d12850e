"""Inputs of a segment's quantizable layers, collected over batches for the range searches."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.calibration.thinning import CONV_VALUES, ROWS, VALUES, in_pieces, positions, spread
from fimaq_core.chain import Segment
from fimaq_core.errors import NumericsError
from fimaq_core.layers import QuantLayer, QuantLinear, QuantMatMul, quant_layers
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.recipe import Recipe

#: Positional inputs of one call of a layer.
_Call = tuple[Tensor, ...]


class Capture:
    """Positional inputs of every quantized layer in a segment's block, collected by hooks.

    Samples of equal shapes are kept whole. N samples of varying shapes share a limit per layer, and
    each keeps an evenly spread Nth part of it (at least one row):

    * linear layers: 2**15 tokens and 2**25 values,
    * attention products: whole windows, with 2**15 rows over all heads and 2**25 values,
    * convolutions: 2**23 values, except the patch embedding, whose inputs are kept whole.

    Min-max ranges need no search: each sample keeps its smallest and largest values instead.

    Args:
        segment: segment of the block; hooks watch its layers until :meth:`remove`.
        recipe: all settings.
        samples: number N of samples of varying shapes, each ended by :meth:`settle`; None for
            samples of equal shapes.
        waiting: names of layers; of these, only the one called first is watched. By default all
            layers are.

    Attributes:
        layers: watched layers by name.
        first: name of the layer that was called first; None before the first call.
    """

    def __init__(
        self,
        segment: Segment,
        recipe: Recipe,
        samples: int | None = None,
        waiting: Collection[str] | None = None,
    ) -> None:
        self.label, self.samples, self.one = segment.label, samples, waiting is not None
        self.first: str | None = None
        self.whole = segment.kind == "patch_embed"
        # Reparameterisation searches the input's ranges, also in min-max recipes.
        self.extremes = recipe.range_search == "minmax" and not recipe.reparameterize
        found = quant_layers(segment.block)
        found = ((name, layer) for name, layer in found if waiting is None or name in waiting)
        self.layers = {name: layer for name, layer in found if quantizes(layer)}
        self._calls: dict[str, list[_Call]] = {name: [] for name in self.layers}
        self._settled: dict[str, list[_Call]] = {name: [] for name in self.layers}
        self._handles = [
            layer.register_forward_pre_hook(self._hook(name)) for name, layer in self.layers.items()
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not args[0].numel():
                return
            self.first = self.first or name
            if not self.one or name == self.first:
                self._calls[name].append(args)

        return keep

    def settle(self) -> None:
        """End a sample of varying shape: keep the part of its inputs that the searches need."""
        for name, calls in self._calls.items():
            if calls:
                for args in calls:
                    self._check_finite(args, name)
                self._settled[name] += self._thinned(self.layers[name], calls)
                calls.clear()

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        """Return all inputs of a layer: two of a product, one or more of a convolution.

        Raises:
            NumericsError: the layer got no input, or NaN or infinite values.
        """
        layer, seen = self.layers[name], (self._settled if self.samples else self._calls)[name]
        if not seen:
            raise NumericsError(
                f"No calibration image gave {self.label}.{name} any input, so it has no ranges: "
                "use more images for ranges (range_images), or others."
            )
        if not self.samples:
            found = _joined(layer, seen)
            self._check_finite(found, name)
            return found
        if isinstance(layer, QuantLinear):
            return (in_pieces(torch.cat([rows for (rows,) in seen])),)
        return _columns(seen) if isinstance(layer, QuantMatMul) else tuple(part for (part,) in seen)

    def forget(self, name: str) -> None:
        """Free the layer's inputs."""
        del self._calls[name], self._settled[name]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _thinned(self, layer: QuantLayer, calls: list[_Call]) -> list[_Call]:
        """Return the part of one sample's inputs of a layer that is kept."""
        if isinstance(layer, QuantLinear):
            return [self._chosen(layer, (_tokens(calls),), ROWS, VALUES)]
        if isinstance(layer, QuantMatMul):
            operands = _columns(calls)
            return [self._chosen(layer, operands, ROWS // operands[0][0, ..., 0].numel(), VALUES)]
        if self.whole:
            return calls
        every = torch.cat([positions(x) for (x,) in calls])
        (rows,) = self._chosen(layer, (every,), CONV_VALUES, CONV_VALUES)
        return [(rows.t()[None, :, :, None],)]

    def _chosen(self, layer: QuantLayer, operands: _Call, rows: int, values: int) -> _Call:
        """Return the same rows of all ``operands`` (count, ...).

        ``rows`` and ``values`` are the limits of all samples together.
        """
        assert self.samples is not None
        uniform = all(isinstance(part, AffineQuantizer) for part in _quantizers(layer))
        if self.extremes and uniform:
            return tuple(torch.stack([operand.amin(0), operand.amax(0)]) for operand in operands)
        limit = min(rows, *(values // operand[0].numel() for operand in operands))
        wanted = max(limit // self.samples, 1)
        if len(operands[0]) <= wanted:
            return operands
        index = spread(len(operands[0]), wanted, operands[0].device)
        return tuple(operand[index] for operand in operands)

    def _check_finite(self, tensors: _Call, name: str) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise NumericsError(
                f"The input of {self.label}.{name} has NaN or infinite values in full precision: "
                "check the images, their normalisation and the weights."
            )


def quantizes(layer: QuantLayer) -> bool:
    """Return True if any of the layer's quantizers is on."""
    return not all(part.off for part in _quantizers(layer))


def _quantizers(layer: QuantLayer) -> list[ActivationQuantizer]:
    return [part for part in layer.children() if isinstance(part, ActivationQuantizer)]


def _columns(calls: Sequence[_Call]) -> _Call:
    """Join each argument over all calls."""
    return tuple(torch.cat(parts) for parts in zip(*calls, strict=True))


def _tokens(calls: Sequence[_Call]) -> Tensor:
    """Join a linear layer's inputs as rows, (tokens, d)."""
    return torch.cat([x.reshape(-1, x.shape[-1]) for (x,) in calls])


def _joined(layer: QuantLayer, calls: list[_Call]) -> _Call:
    """Join whole inputs over all calls.

    If shapes differ, a linear layer gets (1, tokens, d) and a convolution several inputs.
    """
    shapes = {args[0].shape[1:] for args in calls}
    if len(shapes) == 1 or isinstance(layer, QuantMatMul):
        return _columns(calls)
    if isinstance(layer, QuantLinear):
        return (_tokens(calls)[None],)
    return tuple(x for (x,) in calls)
