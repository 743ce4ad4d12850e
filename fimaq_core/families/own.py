"""Modules of one's own: a model as stem, blocks, rest and head, with its layers swapped by type.

The model's forward is watched once. In the chain, the model itself runs stem and rest: its blocks
and its head are replaced by slots, and its forward is stopped at one of them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fimaq_core.chain import BlockChain, NormPair, Segment
from fimaq_core.errors import ModelError
from fimaq_core.families.products import Recorder, RoutedMultiheadAttention, RoutedProducts
from fimaq_core.layers import QuantConv2d, QuantLinear, quant_layers
from fimaq_core.quantizers.special import make_quantizer
from fimaq_core.recipe import Recipe


class _Arrived(Exception):
    """Ends a forward at a slot, with the slot's input."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class _Slot(nn.Module):
    """The place of a block or of the head in the model. The chain owns what stood there.

    The model's forward may still read its attributes.
    """

    def __init__(self, stood: nn.Module) -> None:
        super().__init__()
        self._stood = [stood]  # in a list: the chain must not own it twice
        self.stops = False  # whether the model's forward ends here
        self.given: Tensor | None = None  # the output; None to give the input

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
    """A model with slots for its blocks and, at the end of ``slots``, for its head.

    ``forward`` is the stem: images (B, C, H, W), each of ``shape``, to the first block's input.
    """

    def __init__(self, model: nn.Module, slots: Sequence[_Slot], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.shape = model, shape
        self._slots = tuple(slots)

    def forward(self, images: Tensor) -> Tensor:
        return self._until(self._slots[0], images)

    def rest(self, x: Tensor) -> Tensor:
        """The head's input for the last block's output ``x``. The stem sees blank images."""
        last, head = self._slots[-2:]
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
        raise ModelError("The model's forward must call the same blocks for all images.")


class _Rest(nn.Module):
    """What lies between the last block and the head, run by the model itself."""

    def __init__(self, frame: _Frame) -> None:
        super().__init__()
        self._frame = [frame]  # in a list: the first segment owns it

    def forward(self, x: Tensor) -> Tensor:
        return self._frame[0].rest(x)


class OwnBlock(nn.Module):
    """A block whose layers are swapped, with its constant arguments and its attention's products."""

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
        """The block's output for the input ``x`` under a mode."""
        present = dict(self._constants)
        present |= {
            place: getattr(self, f"argument_{place}")
            for place, value in present.items()
            if isinstance(value, Tensor)
        }
        args = [value for place, value in present.items() if isinstance(place, int)]
        kwargs = {place: value for place, value in present.items() if isinstance(place, str)}
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
    """The names of ``modules`` inside ``model``; ``what`` they are, for the message.

    Raises:
        ModelError: there is none, one is not part of the model or comes twice.
    """
    known = {id(module): name for name, module in model.named_modules() if name}
    found = []
    for number, module in enumerate(modules):
        if id(module) not in known:
            raise ModelError(
                f"{what} must be modules inside the model, and number {number} "
                f"({type(module).__name__}) is none: give the model's own, such as "
                "blocks=model.blocks, head=model.head."
            )
        found.append(known[id(module)])
    if not found or len(set(found)) < len(found):
        raise ModelError(f"{what} must be one module or several different ones, not {found}.")
    return found


def own_chain(
    model: nn.Module, labels: Sequence[str], images: Tensor, recipe: Recipe
) -> BlockChain:
    """Turn a model of one's own into a chain. The chain takes the model over and changes it.

    Stem and rest stay in full precision. Inside blocks and head, ``nn.Linear``, ``nn.Conv2d`` and
    ``nn.MultiheadAttention`` are swapped. Quantizable products compute
    ``F.scaled_dot_product_attention`` and products of activations. A LayerNorm whose only consumer
    is one linear layer becomes a pair for reparameterisation.

    Args:
        model: in evaluation mode.
        labels: names of its blocks in the order of its forward, then the name of its head.
        images: (3, C, H, W), to watch the forward with; only their shape matters.

    Raises:
        ModelError: the forward is not stem, blocks in a row, rest and head; or a part cannot be
            swapped.
    """
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
    """The calls of the modules ``labels`` in one forward, and the model's output."""
    calls: list[_Call] = []

    def hook(label: str) -> Any:
        return lambda module, args, kwargs, output: calls.append(_Call(label, args, kwargs, output))

    modules = {label: model.get_submodule(label) for label in labels}  # one hook per module
    handles = [
        one.register_forward_hook(hook(label), with_kwargs=True) for label, one in modules.items()
    ]
    try:
        output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    found = [call.label for call in calls]
    for label in labels:
        if (times := found.count(label)) != 1:
            raise ModelError(f"The model calls {label} {times} times: it must be once.")
    if found != list(labels):
        order = ", ".join(found)
        raise ModelError(f"The model calls {order} in this order: give blocks= and head= so.")
    return calls, output


def _check_order(calls: Sequence[_Call], batch: int) -> None:
    """Each call takes and gives a tensor, and each block takes what the one before gave."""
    for call in calls:
        values = {"first argument": call.args[0] if call.args else None, "output": call.output}
        for what, value in values.items():
            if not (
                isinstance(value, Tensor) and value.is_floating_point() and len(value) == batch
            ):
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
    """The value in a message: a tensor's dtype and shape, or a type."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _check_constants(call: _Call, other: _Call) -> None:
    """The arguments beside the input are the same for all samples and sizes of a batch."""
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
    """``module`` with its layers swapped by type, or itself, changed in place.

    ``bits`` are those of linear layers' inputs; ``memo`` holds what stands for a module.
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
    """Make a block's products and its quantizers behind GELU; return its pairs."""
    recorder = Recorder(call.label, part.module, part.products, recipe)
    called: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: called.update([name])

    layers = list(quant_layers(part.module))
    handles = [layer.register_forward_pre_hook(count(name)) for name, layer in layers]
    with torch.no_grad():
        output = part.run(call.args[0], recorder)
    for handle in handles:
        handle.remove()
    recorder.check_calls(called)
    if not handles and not part.products:
        kind = type(part.module).__name__
        raise ModelError(f"{call.label} ({kind}) has no layer that can be quantized: leave it out.")
    gelu = recipe.gelu_quantizer
    for layer in recorder.behind_gelu() if gelu != "uniform" else ():
        layer.input_quantizer = make_quantizer(gelu, layer.input_quantizer.bits, "gelu")
    part.to(call.args[0].device)
    norms = recorder.norms_before(output)
    return tuple(NormPair(norm, f"module.{name}") for norm, name in norms)


@torch.no_grad()
def _check_equal(chain: BlockChain, images: Tensor, expected: Any) -> None:
    """The chain gives in full precision what the model gave. Raises ModelError."""
    wanted = getattr(expected, "logits", expected)
    found = chain(images)
    if not isinstance(wanted, Tensor) or found.shape != wanted.shape:
        ours, theirs = described(found), described(wanted)
        raise ModelError(f"The head gives {ours}, the model {theirs}: it must be the last part.")
    error = float((found - wanted).abs().max())
    if not error <= 1e-3 * float(wanted.abs().max()):
        raise ModelError(
            "Blocks and head in a row do not give the model's output (they differ by up to "
            f"{error:.2g}): everything must pass through the blocks, nothing may lead around them, "
            "and nothing may follow the head."
        )
