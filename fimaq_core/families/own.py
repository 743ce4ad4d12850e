"""Chain of a user's own model: stem, blocks, rest and head, with layers replaced by type.

The model's forward is recorded once. In the chain, the model itself computes the stem (all before
the first block) and the rest (all between last block and head): slots replace its blocks and its
head, and the forward stops at a slot.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fimaq_core.chain import BlockChain, NormPair, Segment
from fimaq_core.errors import ModelError
from fimaq_core.families.products import Recorder, RoutedMultiheadAttention, RoutedProducts
from fimaq_core.families.rotation import not_rotated
from fimaq_core.layers import QuantConv2d, QuantLinear, quant_layers
from fimaq_core.quantizers.special import make_quantizer
from fimaq_core.recipe import Recipe


class _Arrived(Exception):
    """Exception that ends a forward at a slot; ``x`` is the slot's input."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class _Slot(nn.Module):
    """Placeholder of a block or the head in the model, with the same attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = [module]  # in a list, so that it is no child: the chain owns it
        self.stops = False  # True while the model's forward ends here
        self.seen: Tensor | None = None  # the input, if a trace cannot end here
        self.given: Tensor | None = None  # the output; None returns the input

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_module" not in self.__dict__:
                raise
            return getattr(self._module[0], name)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.stops and torch.compiler.is_exporting():
            self.seen = x  # an exception would break the trace, which leaves out what is not used
        elif self.stops:
            raise _Arrived(x)
        return x if self.given is None else self.given


class _Frame(nn.Module):
    """Stem: from images (B, C, H, W), each of ``shape``, to the first block's input.

    It holds the model, whose blocks and head are replaced by ``slots``, the head's last.
    """

    def __init__(self, model: nn.Module, slots: Sequence[_Slot], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.shape = model, shape
        self._slots = tuple(slots)

    def forward(self, images: Tensor) -> Tensor:
        return self._until(self._slots[0], images)

    def rest(self, x: Tensor) -> Tensor:
        """Compute the head's input for the last block's output ``x``, on blank images."""
        last, head = self._slots[-2:]
        last.given = x
        try:
            return self._until(head, torch.zeros(x.shape[0], *self.shape, device=x.device))
        finally:
            last.given = None

    def _until(self, slot: _Slot, images: Tensor) -> Tensor:
        slot.stops, slot.seen = True, None
        try:
            self.model(images)
            if slot.seen is not None:
                return slot.seen
        except _Arrived as arrived:
            return arrived.x
        finally:
            slot.stops = False
        raise ModelError("The model's forward must call the same blocks for all images.")


class _Rest(nn.Module):
    """Part between the last block and the head, computed by the model itself."""

    def __init__(self, frame: _Frame) -> None:
        super().__init__()
        self._frame = [frame]  # in a list, so that it is no child: the first segment owns it

    def forward(self, x: Tensor) -> Tensor:
        return self._frame[0].rest(x)


class OwnBlock(nn.Module):
    """Block with quantizable layers, its constant arguments and its attention's products."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.products = nn.ModuleList()
        self._constants: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for place, value in self._constants.items():
            if isinstance(value, Tensor):
                self.register_buffer(f"argument_{place}", value.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, RoutedProducts(self.products))

    def run(self, x: Tensor, mode: RoutedProducts) -> Tensor:
        """Compute the block's output for the input ``x`` under ``mode``."""
        values = {
            place: getattr(self, f"argument_{place}") if isinstance(value, Tensor) else value
            for place, value in self._constants.items()
        }
        args = [value for place, value in values.items() if isinstance(place, int)]
        kwargs = {place: value for place, value in values.items() if isinstance(place, str)}
        with mode:
            out: Tensor = self.module(x, *args, **kwargs)
        return out


@dataclass(frozen=True)
class _Call:
    """Recorded call of a block or of the head."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def names_of(model: nn.Module, modules: Iterable[nn.Module], what: str) -> list[str]:
    """Find the names of ``modules`` in ``model``; ``what`` names the argument in messages.

    Raises:
        ModelError: there are no modules, one is given twice, or one is not part of the model.
    """
    known = {id(module): name for name, module in model.named_modules() if name}
    found = []
    for number, module in enumerate(modules):
        if id(module) not in known:
            raise ModelError(
                f"{what} must be modules inside the model, and number {number} "
                f"({type(module).__name__}) is not: give the model's own modules, such as "
                "blocks=model.blocks, head=model.head."
            )
        found.append(known[id(module)])
    if not found or len(set(found)) < len(found):
        raise ModelError(f"{what} must be one module or several different ones, not {found}.")
    return found


def own_chain(
    model: nn.Module, labels: Sequence[str], images: Tensor, recipe: Recipe
) -> BlockChain:
    """Turn a user's own model into a chain. The chain owns the model and changes it.

    Stem and rest stay in full precision. Inside blocks and head, ``nn.Linear``, ``nn.Conv2d``,
    ``nn.MultiheadAttention``, ``F.scaled_dot_product_attention`` and ``a @ b`` are replaced by
    quantizable forms. A LayerNorm whose only consumer is one linear layer becomes a pair for
    reparameterisation.

    Args:
        model: model in evaluation mode.
        labels: names of the blocks in the order of the forward, then the name of the head.
        images: images (3, C, H, W) to run the forward on; only their shape matters.

    Raises:
        ModelError: the forward is not stem, blocks in a row, rest and head; a part cannot be
            replaced; or the recipe asks for a rotation.
    """
    if recipe.rotate != "none":
        raise not_rotated("blocks= and head=, whose residual stream is not known,")
    calls, expected = _watched(model, labels, images[:2])
    others, _ = _watched(model, labels, images[2:3])
    _check_order(calls, len(images[:2]))
    for call, other in zip(calls, others, strict=True):
        _check_constants(call, other)
    memo: dict[int, nn.Module] = {}
    segments, slots = [], []
    for call in calls:
        bits = recipe.classifier_bits if call is calls[-1] else recipe.a_bits
        module = model.get_submodule(call.label)
        part = OwnBlock(_swapped(module, recipe, bits, memo), call.args[1:], call.kwargs)
        slots.append(_Slot(part.module))
        for name, found in list(model.named_modules(remove_duplicate=False)):
            if found is module:
                model.set_submodule(name, slots[-1])
        segments.append(Segment(call.label, "block", part, pairs=_fill(part, call, recipe)))
    frame = _Frame(model, slots, tuple(images.shape[1:]))
    segments[0].before, segments[-1].before, segments[-1].kind = frame, _Rest(frame), "head"
    chain = BlockChain(segments)
    _check_equal(chain, images[:2], expected)
    return chain


@torch.no_grad()
def _watched(model: nn.Module, labels: Sequence[str], images: Tensor) -> tuple[list[_Call], Any]:
    """Run the forward once; return the calls of the modules ``labels`` and the model's output."""
    calls: list[_Call] = []

    def hook(label: str) -> Any:
        return lambda module, args, kwargs, output: calls.append(_Call(label, args, kwargs, output))

    with ExitStack() as hooks:
        for label in dict.fromkeys(labels):
            module = model.get_submodule(label)
            hooks.enter_context(module.register_forward_hook(hook(label), with_kwargs=True))
        output = model(images)
    found = [call.label for call in calls]
    for label in labels:
        if (times := found.count(label)) != 1:
            raise ModelError(f"The model calls {label} {times} times: it must call it once.")
    if found != list(labels):
        order = ", ".join(found)
        raise ModelError(f"Give blocks= and head= in the order in which they are called: {order}.")
    return calls, output


def _check_order(calls: Sequence[_Call], batch: int) -> None:
    """Check that calls take and give tensors, and each block takes the previous block's output."""
    for call in calls:
        values = {"first argument": call.args[0] if call.args else None, "output": call.output}
        for what, value in values.items():
            floats = isinstance(value, Tensor) and value.is_floating_point()
            if not floats or len(value) != batch:
                raise ModelError(
                    f"The {what} of {call.label} must be one float tensor with the batch as its "
                    f"first dimension ({batch} here), not {described(value)}."
                )
    for before, after in pairwise(calls[:-1]):
        if not _same(after.args[0], before.output):
            raise ModelError(
                f"The input of {after.label} is not the output of {before.label}: blocks must "
                "follow one another directly. Make what lies between them part of one of them."
            )


def described(value: Any) -> str:
    """Describe a value in a message: dtype and shape of a tensor, else the type."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _check_constants(call: _Call, other: _Call) -> None:
    """Check that arguments other than the input do not depend on samples or batch size."""
    given, others = ({**dict(enumerate(one.args)), **one.kwargs} for one in (call, other))
    for place in given.keys() - {0}:
        values, structure = tree_flatten(given[place])
        theirs, another = tree_flatten(others.get(place))
        if structure != another or not all(map(_same, values, theirs)):
            raise ModelError(
                f"{call.label} is called with another argument {place!r} for each batch: beside "
                "the input, a block's arguments must be the same for all samples."
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return a is b or bool(type(a) is type(b) and a == b)


def _swapped(module: nn.Module, recipe: Recipe, bits: int, memo: dict[int, nn.Module]) -> nn.Module:
    """Replace ``module`` by type, or (in place) the layers inside of it; return the result.

    ``bits`` are for the inputs of linear layers. ``memo`` holds the replacement of each module by
    its id, so that a module that is used twice is replaced once. A new type of layer also needs an
    entry in ``_WEIGHTED``, and none in ``_NEVER_SWAPPED``, both in `products.py`.
    """
    if id(module) not in memo:
        if type(module) is nn.Linear:
            memo[id(module)] = QuantLinear.from_float(module, recipe.w_bits, bits)
        elif type(module) is nn.Conv2d:
            memo[id(module)] = QuantConv2d.from_float(module, recipe.w_bits, recipe.a_bits)
        elif type(module) is nn.MultiheadAttention:
            memo[id(module)] = RoutedMultiheadAttention(module, recipe)
        else:
            memo[id(module)] = module
            for name, child in list(module.named_children()):
                setattr(module, name, _swapped(child, recipe, bits, memo))
    return memo[id(module)]


def _fill(part: OwnBlock, call: _Call, recipe: Recipe) -> tuple[NormPair, ...]:
    """Make a block's products and quantizers after GELU; return its pairs of norm and layer."""
    recorder = Recorder(call.label, part.module, part.products, recipe)
    called: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: called.update([name])

    layers = list(quant_layers(part.module))
    with torch.no_grad(), ExitStack() as hooks:
        for name, layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(count(name)))
        output = part.run(call.args[0], recorder)
    recorder.check_calls(called)
    if not layers and not part.products:
        kind = type(part.module).__name__
        raise ModelError(f"{call.label} ({kind}) has no layer that can be quantized: leave it out.")
    gelu = recipe.gelu_quantizer
    for layer in recorder.after_gelu() if gelu != "uniform" else ():
        layer.input_quantizer = make_quantizer(gelu, layer.input_quantizer.bits, "gelu")
    part.to(call.args[0].device)
    norms = recorder.norms_before(output)
    return tuple(NormPair(norm, f"module.{name}") for norm, name in norms)


@torch.no_grad()
def _check_equal(chain: BlockChain, images: Tensor, expected: Any) -> None:
    """Check that the chain gives the model's output in full precision. Raises ModelError."""
    wanted = getattr(expected, "logits", expected)
    found = chain(images)
    if not isinstance(wanted, Tensor) or found.shape != wanted.shape:
        ours, theirs = described(found), described(wanted)
        raise ModelError(f"The head gives {ours}, the model {theirs}: it must be the last part.")
    error = float((found - wanted).abs().max())
    if not error <= 1e-3 * float(wanted.abs().max()):
        raise ModelError(
            "Blocks and head one after another do not give the model's output (the outputs differ "
            f"by up to {error:.2g}): all data must pass through the blocks, none may bypass them, "
            "and nothing may follow the head."
        )
