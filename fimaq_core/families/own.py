"""Modules of one's own: a model as stem, blocks, rest and head, with its layers swapped by type.

The model's forward is watched once. In the chain, the model itself runs what lies before the first block and what lies
between the last block and the head: its blocks and its head are replaced by slots, and its forward is stopped at one of them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fimaq_core.chain import BlockChain, NormPair, Segment
from fimaq_core.errors import ModelError
from fimaq_core.families.products import Recorder, RoutedMultiheadAttention, RoutedProducts
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul, quant_layers
from fimaq_core.quantizers.special import make_quantizer
from fimaq_core.recipe import Recipe


class _Arrived(Exception):
    """Ends a forward at a slot, with the slot's input."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class _Slot(nn.Module):
    """The place of a block or of the head in the model. The chain owns what stood there.

    Attributes that the model's forward reads of its blocks are still there.

    Attributes:
        stops: whether the model's forward ends here.
        given: the output; None to give the input.
    """

    def __init__(self, stood: nn.Module) -> None:
        super().__init__()
        self._stood = [stood]  # in a list: the chain must not own it twice
        self.stops = False
        self.given: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_stood" not in self.__dict__:
                raise
            return getattr(self._stood[0], name)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.stops:
            raise _Arrived(x)
        return x if self.given is None else self.given


class _Frame(nn.Module):
    """A model without its blocks and its head. ``forward`` is the stem: images (B, C, H, W) to the first block's input.

    Args:
        model: its blocks and head are slots.
        first, last, head: slots.
        shape: of one image.
    """

    def __init__(self, model: nn.Module, first: _Slot, last: _Slot, head: _Slot, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.shape = model, shape
        self._slots = first, last, head

    def forward(self, images: Tensor) -> Tensor:
        return self._until(self._slots[0], images)

    def rest(self, x: Tensor) -> Tensor:
        """The head's input for the last block's output ``x`` (B, ...). The stem sees blank images."""
        last, head = self._slots[1:]
        last.given = x
        try:
            return self._until(head, torch.zeros(len(x), *self.shape, device=x.device))
        finally:
            last.given = None

    def _until(self, slot: _Slot, images: Tensor) -> Tensor:
        slot.stops = True
        try:
            self.model(images)
        except _Arrived as arrived:
            return arrived.x
        finally:
            slot.stops = False
        raise ModelError("The model's forward did not call the same blocks again: it must not depend on the images.")


class _Rest(nn.Module):
    """What lies between the last block and the head, run by the model itself."""

    def __init__(self, frame: _Frame) -> None:
        super().__init__()
        self._frame = [frame]  # in a list: the first segment owns it

    def forward(self, x: Tensor) -> Tensor:
        return self._frame[0].rest(x)


class OwnBlock(nn.Module):
    """A block of one's own: a module, the other arguments that it is always called with, and its attention's products.

    Args:
        module: its layers are swapped already.
        args, kwargs: what it is called with beside its input.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.products = nn.ModuleList()
        self._constants: dict[int | str, Any] = dict(enumerate(args))
        self._constants.update(kwargs)
        for place, value in self._constants.items():
            if isinstance(value, Tensor):
                self.register_buffer(f"argument_{place}", value.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, RoutedProducts(self.products))

    def run(self, x: Tensor, mode: RoutedProducts) -> Tensor:
        """The module's output for the input ``x`` under a mode."""
        args, kwargs = [], {}
        for place, value in self._constants.items():
            present = getattr(self, f"argument_{place}") if isinstance(value, Tensor) else value
            if isinstance(place, int):
                args.append(present)
            else:
                kwargs[place] = present
        with mode:
            out: Tensor = self.module(x, *args, **kwargs)
        return out


@dataclass(frozen=True)
class _Call:
    """One call of a block or of the head."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def names_of(model: nn.Module, modules: Iterable[nn.Module], what: str) -> list[str]:
    """The names of ``modules`` inside ``model``.

    Args:
        what: they are, for the message.

    Raises:
        ModelError: there is none, one is not part of the model or comes twice.
    """
    known = {id(module): name for name, module in model.named_modules() if name}
    found = []
    for number, module in enumerate(modules):
        if id(module) not in known:
            raise ModelError(
                f"{what} must be modules inside the model, and number {number} ({type(module).__name__}) is none: "
                "give the model's own, such as blocks=model.blocks, head=model.head."
            )
        found.append(known[id(module)])
    if not found or len(set(found)) < len(found):
        raise ModelError(f"{what} must be one module or several different ones, not {found}.")
    return found


def own_chain(model: nn.Module, blocks: Sequence[str], head: str, images: Tensor, recipe: Recipe) -> BlockChain:
    """Turn a model of one's own into a chain. The chain takes the model over and changes it.

    The stem and what lies between the blocks and the head stay in full precision. Inside blocks and head ``nn.Linear``,
    ``nn.Conv2d`` and ``nn.MultiheadAttention`` are swapped, and ``F.scaled_dot_product_attention`` and products of activations
    are computed by quantizable products. A LayerNorm with one linear layer as its only consumer becomes a pair for
    reparameterisation.

    Args:
        model: in evaluation mode.
        blocks: names of its blocks in the order of its forward.
        head: name of its last part.
        images: (3, ...) or more, to watch the forward with.
        recipe: bits and quantizers.

    Raises:
        ModelError: the forward is not stem, blocks in a row, rest, head; or a part cannot be swapped.
    """
    labels = [*blocks, head]
    with torch.no_grad():
        calls, expected = _watched(model, labels, images[:2])
        others, _ = _watched(model, labels, images[2:3])
        _check_order(calls, labels, images[:2])
        for call, other in zip(calls, others, strict=True):
            _check_constants(call, other)
    memo: dict[int, nn.Module] = {}
    parts, slots = [], []
    for call in calls:
        bits = recipe.classifier_bits if call.label == head else recipe.a_bits
        module = model.get_submodule(call.label)
        parts.append(OwnBlock(_swapped(module, recipe, bits, memo), call.args[1:], call.kwargs))
        slots.append(_Slot(parts[-1].module))
        _replace(model, module, slots[-1])
    frame = _Frame(model, slots[0], slots[-2], slots[-1], tuple(images.shape[1:]))
    segments = []
    for call, part in zip(calls, parts, strict=True):
        pairs = _fill(part, call, recipe)
        before = frame if call is calls[0] else _Rest(frame) if call is calls[-1] else None
        segments.append(Segment(call.label, "head" if call is calls[-1] else "block", part, before=before, pairs=pairs))
    chain = BlockChain(segments)
    _check_equal(chain, images[:2], expected)
    return chain


def _watched(model: nn.Module, labels: Sequence[str], images: Tensor) -> tuple[list[_Call], Any]:
    """The calls of the modules ``labels`` in one forward, in their order, and the model's output."""
    calls: list[_Call] = []
    with _hooked(model, labels, calls):
        output = model(images)
    found = [call.label for call in calls]
    if sorted(found) != sorted(labels):
        wrong = next(label for label in labels if found.count(label) != 1)
        raise ModelError(f"The model's forward calls {wrong} {found.count(wrong)} times: it must be once.")
    if found != list(labels):
        raise ModelError(f"The model's forward calls {', '.join(found)} in this order: give blocks= and head= so.")
    return calls, output


@contextmanager
def _hooked(model: nn.Module, labels: Sequence[str], calls: list[_Call]) -> Iterator[None]:
    def hook(label: str) -> Any:
        return lambda module, args, kwargs, output: calls.append(_Call(label, args, kwargs, output))

    handles = [model.get_submodule(label).register_forward_hook(hook(label), with_kwargs=True) for label in labels]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_order(calls: Sequence[_Call], labels: Sequence[str], images: Tensor) -> None:
    """Each call takes and gives a tensor, and each block takes what the one before gave."""
    for call in calls:
        for what, value in (("first argument", call.args[0] if call.args else None), ("output", call.output)):
            if not isinstance(value, Tensor) or not value.is_floating_point() or len(value) != len(images):
                raise ModelError(
                    f"The {what} of {call.label} must be one tensor with the batch as its first dimension "
                    f"({len(images)} here), not {_described(value)}."
                )
    for before, after in pairwise(calls[:-1]):
        x = after.args[0]
        if x is not before.output and not (x.shape == before.output.shape and torch.equal(x, before.output)):
            raise ModelError(
                f"The input of {after.label} is not the output of {before.label}: blocks must follow one another directly. "
                "Make what lies between them part of one of them."
            )


def _described(value: Any) -> str:
    return f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check_constants(call: _Call, other: _Call) -> None:
    """The arguments beside the input are the same for all samples and sizes of a batch."""
    places = [*range(1, len(call.args)), *call.kwargs]
    for place in places:
        own, theirs = (one.args[place] if isinstance(place, int) else one.kwargs.get(place) for one in (call, other))
        own_values, own_structure = tree_flatten(own)
        values, structure = tree_flatten(theirs)
        if own_structure != structure or not all(map(_same, own_values, values)):
            name = f"argument {place}" if isinstance(place, int) else f"argument '{place}'"
            raise ModelError(
                f"{call.label} is called with another {name} for each batch: beside the input, a block's arguments must "
                "be the same for all samples."
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b or bool(type(a) is type(b) and a == b)


def _swapped(module: nn.Module, recipe: Recipe, bits: int, memo: dict[int, nn.Module]) -> nn.Module:
    """``module`` with its layers swapped by type, in place where it is none itself.

    Args:
        bits: of the inputs of linear layers.
        memo: what stands for modules that came before.
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


def _replace(model: nn.Module, module: nn.Module, slot: _Slot) -> None:
    """Put a slot wherever ``module`` stands in the model."""
    for name, found in list(model.named_modules(remove_duplicate=False)):
        if found is module:
            model.set_submodule(name, slot)


def _fill(part: OwnBlock, call: _Call, recipe: Recipe) -> tuple[NormPair, ...]:
    """Make the products of a block and the quantizers behind GELU; return the pairs for reparameterisation."""
    recorder, called = Recorder(call.label, part.module, part.products, recipe), Counter[str]()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.update([name])) for name, layer in quant_layers(part.module)
    ]
    with torch.no_grad():
        output = part.run(call.args[0], recorder)
    for handle in handles:
        handle.remove()
    recorder.check_calls(called)
    if not handles and not part.products:
        raise ModelError(f"{call.label} ({type(part.module).__name__}) has no layer that can be quantized: leave it out.")
    for product in part.products:
        assert isinstance(product, QuantMatMul)
        product.to(call.args[0].device)
    if recipe.gelu_quantizer != "uniform":
        for layer in recorder.behind_gelu():
            layer.input_quantizer = make_quantizer(recipe.gelu_quantizer, layer.input_quantizer.bits, "gelu")
    part.to(call.args[0].device)
    return tuple(NormPair(norm, f"module.{name}") for norm, name in recorder.norms_before(output))


@torch.no_grad()
def _check_equal(chain: BlockChain, images: Tensor, expected: Any) -> None:
    """The chain gives in full precision what the model gave. Raises ModelError."""
    wanted = getattr(expected, "logits", expected)
    found = chain(images)
    if not isinstance(wanted, Tensor) or found.shape != wanted.shape:
        raise ModelError(
            f"The head gives a tensor {tuple(found.shape)}, and the model {_described(wanted)}: the head must be the last part."
        )
    error = float((found - wanted).abs().max())
    if not error <= 1e-3 * float(wanted.abs().max()):
        raise ModelError(
            f"Blocks and head in a row do not give the model's output (they differ by up to {error:.2g}): everything must "
            "pass through the blocks, nothing may lead around them, and nothing may follow the head."
        )
