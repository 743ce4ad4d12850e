"""Attention in a user's own model: its products are replaced while a module runs."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fimaq_core.errors import ModelError
from fimaq_core.families.attention import (
    ExplicitMultiheadAttention,
    additive_mask,
    attend,
    join_heads,
    products,
)
from fimaq_core.layers import QuantConv2d, QuantLinear, quant_layers
from fimaq_core.recipe import Recipe

#: Functions that multiply by a weight. Only quantizable layers may call them.
_WEIGHTED = ("linear", "conv2d")
#: Functions that compute ``a @ b``.
_PRODUCTS = ("matmul", "__matmul__")
#: Other functions that multiply. They have no quantizable form, so blocks must not call them.
_NEVER_SWAPPED = (
    *("conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear"),
    *("bmm", "baddbmm", "mm", "addmm", "mv", "einsum", "tensordot"),
    "multi_head_attention_forward",
)


class _Use(NamedTuple):
    """Function that made or took a tensor."""

    name: str = ""
    weight: int | None = None  # id of the weight of this call


class RoutedProducts(TorchFunctionMode):
    """Mode in which ``products`` compute attention, in the order of the calls.

    Two products replace a call of ``F.scaled_dot_product_attention``; one replaces ``a @ b``.
    """

    def __init__(self, products: nn.ModuleList) -> None:
        super().__init__()
        self.products, self.calls = products, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if kwargs.pop("enable_gqa", False):
                raise ModelError("Attention with grouped queries is not supported.")
            return self._attention(*args, **kwargs)
        if func.__name__ in _PRODUCTS:
            return _in_heads(lambda a, b: self._next()(a, b), *args)
        return func(*args, **kwargs)

    def _next(self) -> nn.Module:
        found = self.products[self.calls]
        self.calls += 1
        return found

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Compute ``F.scaled_dot_product_attention`` with the next two products."""
        if dropout_p:
            raise ModelError("Attention with dropout is not supported.")
        if is_causal:
            size = query.shape[-2], key.shape[-2]
            attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = additive_mask(attn_mask)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale

        def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend((self._next(), self._next()), q, k, v, factor, attn_mask)

        return _in_heads(attended, query, key, value)


class RoutedMultiheadAttention(ExplicitMultiheadAttention):
    """``nn.MultiheadAttention`` whose products :class:`RoutedProducts` computes."""

    def __init__(self, attention: nn.MultiheadAttention, recipe: Recipe) -> None:
        super().__init__(attention, recipe)
        del self.query_key, self.attention_value

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Recorder(RoutedProducts):
    """Mode that runs a block in full precision, makes its products, and records uses of tensors.

    ``label`` names the block in messages. Its layers must already be quantizable. The new products
    are appended to ``products``.
    """

    def __init__(
        self, label: str, block: nn.Module, products: nn.ModuleList, recipe: Recipe
    ) -> None:
        super().__init__(products)
        self.label, self.recipe = label, recipe
        self._layers: dict[int, tuple[str, QuantLinear | QuantConv2d]] = {}
        for name, layer in quant_layers(block):
            if isinstance(layer, QuantLinear | QuantConv2d):
                self._layers[id(layer.weight)] = name, layer
        self._owners = {id(value): name for name, value in block.named_parameters()}
        norms = [norm for norm in block.modules() if isinstance(norm, nn.LayerNorm)]
        self._norms = {id(norm.weight): norm for norm in norms if norm.weight is not None}
        self._origins: dict[int, _Use] = {}  # by id of a tensor: the call that made it
        self._uses: dict[int, list[_Use]] = {}  # by id of a tensor: the calls that took it
        self._weight_uses: Counter[str] = Counter()  # by name of a layer
        self._alive: list[Tensor] = []  # keeps ids unique: Python reuses the id of a freed tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        weight = _weight(name, args, kwargs)
        if name in _NEVER_SWAPPED or (name in _WEIGHTED and weight not in self._layers):
            self._refuse(name, (*args, *kwargs.values()))
        if name in _WEIGHTED and weight is not None:
            self._weight_uses[self._layers[weight][0]] += 1
        if func is F.scaled_dot_product_attention:
            self.products.extend(products(self.recipe))
        elif name in _PRODUCTS:
            self._add_product(name, args)
        result = super().__torch_function__(func, types, args, kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:  # not for a query of a tensor's shape
            taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._alive += [*made, *taken]
            for tensor in taken:
                self._uses.setdefault(id(tensor), []).append(_Use(name, weight))
            for tensor in made:
                self._origins.setdefault(id(tensor), _Use(name, weight))
        return result

    def _add_product(self, name: str, operands: tuple[Any, ...]) -> None:
        a, b = operands
        frozen = isinstance(a, nn.Parameter) or isinstance(b, nn.Parameter)
        if frozen or a.ndim != b.ndim or a.ndim not in (3, 4):
            self._refuse(name, operands)
        after_softmax = self._origins.get(id(a), _Use()).name == "softmax"
        self.products.append(products(self.recipe)[1 if after_softmax else 0])

    def _refuse(self, name: str, operands: tuple[Any, ...]) -> None:
        names = [self._owners[id(one)] for one in operands if id(one) in self._owners]
        of = f" with the parameter {self.label}.{names[0]}" if names else ""
        raise ModelError(
            f"{self.label} calls {name}{of}, which has no quantizable form here: use "
            "nn.Linear, nn.Conv2d, nn.MultiheadAttention, F.scaled_dot_product_attention or "
            "q @ k.transpose(-2, -1) inside blocks and head."
        )

    def check_calls(self, calls: Mapping[str, int]) -> None:
        """Raise ModelError for a layer that the forward does not call itself.

        ``calls`` are the numbers of calls by layer; they must equal the uses of the weights.
        """
        for name, _ in self._layers.values():
            if calls.get(name, 0) != self._weight_uses[name] or not calls.get(name, 0):
                raise ModelError(
                    f"The forward of {self.label} does not call {name} itself (it reads the "
                    "weight, or leaves the layer out), so this layer cannot be quantized: call it."
                )

    def after_gelu(self) -> Iterator[QuantLinear]:
        """Yield the linear layers whose input is the output of a GELU."""
        for tensor, uses in self._uses.items():
            if self._origins.get(tensor, _Use()).name != "gelu":
                continue
            for use in uses:
                layer = self._layers[use.weight][1] if use.weight in self._layers else None
                if isinstance(layer, QuantLinear):
                    yield layer

    def norms_before(self, output: Tensor) -> Iterator[tuple[nn.LayerNorm, str]]:
        """Yield each LayerNorm whose only consumer is one linear layer, and that layer's name.

        A norm that makes the block's ``output`` also has consumers outside of the block.
        """
        calls = Counter(call.weight for call in self._origins.values())
        for tensor, (origin, weight) in self._origins.items():
            if origin != "layer_norm" or weight not in self._norms or tensor == id(output):
                continue
            uses = self._uses.get(tensor, [])
            if len(uses) != 1 or uses[0].name != "linear":
                continue
            linear = uses[0].weight
            if linear in self._layers and calls[weight] == calls[linear] == 1:
                yield self._norms[weight], self._layers[linear][0]


def _weight(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the id of a call's weight; None without a weight."""
    place = {"linear": 1, "conv2d": 1, "layer_norm": 2}.get(name)
    if place is None:
        return None
    found = args[place] if len(args) > place else kwargs.get("weight")
    return None if found is None else id(found)


def _in_heads(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """Call ``function`` on operands (batch, heads, rows, columns); 3D operands are one head."""
    if operands[0].ndim == 3:
        return function(*(one.unsqueeze(1) for one in operands)).squeeze(1)
    return function(*operands)
