"""Sensitivity: the divergence that quantizing one operand alone causes in the float model.

The exact form quantizes the operand, runs the model from its block on, and measures.

The gradient form needs a few backward passes for all operands together. The divergence of an
operand's error δ is ``½ (Jδ)ᵀ H (Jδ)`` to second order: J is the Jacobian of the outputs in the
operand, H the divergence's Hessian at the outputs, where its gradient is 0. For random signs ε, one
backward pass from ``H ε`` gives ``g = (H ε)ᵀ J δ`` for every operand, and the form is the mean of
``½ g² (εᵀ H ε) / |H ε|²`` over directions and samples, with the ratio of each sample's means. It is
exact on average if all eigenvalues of H other than 0 are equal; ranks need less. (Hutchinson's
estimate ``½ (εᵀ J δ) g``, Communications in Statistics 18, 1989, has the right mean always, but
drowns in noise where H ignores a direction, as the length of a CLIP embedding.) Products between
samples are left out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from fimaq_core.calibration.walk import Walk
from fimaq_core.chain import BlockChain
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.layers import QuantLayer, WeightLayer, quant_layers, set_quantized
from fimaq_core.mixed_bits import Place, places, quantizers_of
from fimaq_core.progress import OnProgress, Progress, silent
from fimaq_core.quantizers.special import LogQuantizer
from fimaq_core.samples import Samples


@dataclass(frozen=True)
class Sensitivity:
    """Divergence that quantizing one operand alone causes, mean over samples."""

    layer: str  # name as in the module map
    operand: str  # w (weight), a (input, or left operand of a product), b (right operand)
    bits: int
    values: int  # number of weights; of other operands: values per sample
    exact: float  # measured
    gradient: float | None = None  # to second order; None if it was not asked for


def sensitivities(
    chain: BlockChain,
    samples: Samples | Tensor,
    divergence: Divergence,
    *,
    images: int = 64,
    directions: int = 4,
    batch_size: int = 32,
    on_progress: OnProgress = silent,
) -> list[Sensitivity]:
    """Measure each quantized operand of a calibrated chain alone; the chain stays as it is.

    Example::

        q = quantize(model, x, w_bits=4, a_bits=4)
        rows = sensitivities(q.chain, x, ClassifierDivergence(20.0))
        worst = max(rows, key=lambda row: row.exact)

    Args:
        chain: chain with ranges, on any device. Full precision is its own float form.
        samples: (n, ...) inputs of the chain.
        divergence: divergence of the chain's outputs.
        images: number of samples to measure, the first ones.
        directions: random directions of the gradient form, one backward pass each; 0: no form.
        batch_size: samples per pass; a divergence that compares samples has its own.
        on_progress: receives one unit per operand.

    Returns:
        One entry per operand whose quantizer is on, in the order of the chain.
    """
    device, size = next(chain.parameters()).device, divergence.batch or batch_size
    every = Samples.of(samples)
    with _full_precision(chain):
        # The reference of samples that vary or are compared may need the outputs of all.
        wanted = every if divergence.batch or every.varying else every.first(images)
        outputs = wanted.map(lambda part: chain(part.to(device)).float(), size)
        reference, x = divergence.reference(outputs).first(images), every.first(images)
        found = _exact(Walk(chain, x, size), reference, divergence, on_progress)
        if not directions:
            return found
        sums = dict.fromkeys(((row.layer, row.operand) for row in found), 0.0)
        generator = torch.Generator().manual_seed(0)
        for rows in x.slices(size):
            measure = partial(divergence, reference=reference[rows].to(device))
            drawn = partial(_directions, measure, directions, generator)
            for key, value in _quadratic(chain, x[rows].to(device), drawn).items():
                sums[key] += value / len(x)
    return [replace(row, gradient=sums[row.layer, row.operand]) for row in found]


def agreement(rows: Sequence[Sensitivity]) -> float:
    """Return Spearman's rank correlation of the exact and the gradient form."""
    pairs = [(row.exact, row.gradient) for row in rows if row.gradient is not None]
    found: Any = stats.spearmanr(*zip(*pairs, strict=True))
    return float(found.statistic)


@contextmanager
def _full_precision(chain: BlockChain) -> Iterator[None]:
    """Run a chain in full precision, and restore the state of its layers afterwards."""
    states = [(layer, layer.quantized) for _, layer in quant_layers(chain)]
    set_quantized(chain, False)
    try:
        yield
    finally:
        for layer, quantized in states:
            layer.quantized = quantized


def _operands(place: Place) -> list[str]:
    return [name for name, quantizer in quantizers_of(place.layer).items() if not quantizer.off]


@torch.no_grad()
def _exact(
    walk: Walk, reference: Samples, divergence: Divergence, on_progress: OnProgress
) -> list[Sensitivity]:
    """Return the exact form of each operand; ``walk`` is at the first segment."""
    by_segment: dict[int, list[tuple[Place, str]]] = {}
    for place in places(walk.chain):
        own = by_segment.setdefault(id(place.segment), [])
        own += [(place, operand) for operand in _operands(place)]
    found: list[Sensitivity] = []
    total = sum(map(len, by_segment.values()))
    slices = list(reference.slices(walk.batch_size))
    while walk.index < len(walk.chain):
        own = by_segment.get(id(walk.segment), [])
        with _counted(own) as counts:
            outputs = walk.run()
        for place, operand in own:
            on_progress(Progress("sensitivity", len(found), total, place.name))
            with _quantized_alone(place.layer, operand):
                changed = walk.run()
            loss = 0.0
            for number, (rows, output) in enumerate(zip(slices, changed, strict=True)):
                beside = walk.sides[number], walk.kept[number]
                final = walk.chain.rest(walk.index, output.to(walk.device), *beside)
                expected = reference[rows].to(walk.device)
                loss += float(divergence(final.float(), expected)) * len(expected)
            values = round(counts[place.name, operand] / len(reference))
            if isinstance(place.layer, WeightLayer) and operand == "w":
                values = place.layer.weight.numel()
            bits = quantizers_of(place.layer)[operand].bits
            found.append(Sensitivity(place.name, operand, bits, values, loss / len(reference)))
        walk.advance(outputs)
    on_progress(Progress("sensitivity", total, total))
    return found


@contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


@contextmanager
def _counted(operands: Sequence[tuple[Place, str]]) -> Iterator[dict[tuple[str, str], int]]:
    """Count the values of all inputs of layers while the context lasts."""
    counts = {(place.name, operand): 0 for place, operand in operands}

    def count(key: tuple[str, str], _: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts[key] += args[key[1] == "b"].numel()

    hooks = (
        place.layer.register_forward_pre_hook(partial(count, (place.name, operand)))
        for place, operand in operands
    )
    with _hooks(hooks):
        yield counts


def _quantized(layer: QuantLayer, operand: str, x: Tensor) -> Tensor:
    """Return the quantized form of an operand's values ``x``."""
    if isinstance(layer, WeightLayer) and operand == "w":
        return layer.weight_quantizer.quantized(x)
    quantizer = quantizers_of(layer)[operand]
    out: Tensor = quantizer(x)
    if isinstance(quantizer, LogQuantizer) and bool(quantizer.folded):
        out = out - quantizer.shift  # the bias of the quantized form would subtract it
    return out


@contextmanager
def _quantized_alone(layer: QuantLayer, operand: str) -> Iterator[None]:
    """Quantize one operand of a layer in full precision."""
    if isinstance(layer, WeightLayer) and operand == "w":
        weight = layer.weight.data
        layer.weight.data = _quantized(layer, operand, weight)
        try:
            yield
        finally:
            layer.weight.data = weight
        return
    at = int(operand == "b")

    def change(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*args[:at], _quantized(layer, operand, args[at]), *args[at + 1 :])

    with _hooks([layer.register_forward_pre_hook(change)]):
        yield


def _quadratic(
    chain: BlockChain, x: Tensor, directions: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> dict[tuple[str, str], float]:
    """Return the gradient form of each operand, summed over the samples ``x`` (B, ...).

    Each operand gets a factor t per sample of its error, which is 0. So the derivative in t of a
    function of the outputs is the product of its gradient with J δ.
    """
    factors: dict[tuple[str, str], Tensor] = {}
    handles = []
    for place in places(chain):
        for operand in _operands(place):
            t = torch.zeros(len(x), device=x.device, requires_grad=True)
            factors[place.name, operand] = t
            if operand == "w":
                handles.append(place.layer.register_forward_hook(partial(_add_weight_error, t)))
            else:
                add = partial(_add_error, t, operand)
                handles.append(place.layer.register_forward_pre_hook(add))
    with _hooks(handles), torch.enable_grad():
        outputs = chain(x).float()

    signs, curved = directions(outputs.detach())
    ratio = (signs * curved).flatten(2).sum((0, 2)) / curved.square().flatten(2).sum((0, 2))
    ratio = ratio.nan_to_num(0.0).clamp(min=0.0)  # a sample may have no curvature
    sums = dict.fromkeys(factors, 0.0)
    for one in curved:
        products = torch.autograd.grad(
            (outputs * one).sum(), [*factors.values()], retain_graph=True
        )
        for key, product in zip(factors, products, strict=True):
            sums[key] += 0.5 * float((product.square() * ratio).sum()) / len(curved)
    return sums


def _per_row(t: Tensor, like: Tensor) -> Tensor:
    """Return factors per sample (B,) for rows of ``like``, with as many rows for each sample."""
    rows = t.repeat_interleave(len(like) // len(t))
    return rows.view(-1, *(1,) * (like.ndim - 1))


def _add_error(
    t: Tensor, operand: str, layer: QuantLayer, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    at = int(operand == "b")
    x = args[at]
    with torch.no_grad():
        error = _quantized(layer, operand, x.detach()) - x.detach()
    return (*args[:at], x + _per_row(t, x) * error, *args[at + 1 :])


def _add_weight_error(
    t: Tensor, layer: WeightLayer, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    with torch.no_grad():
        weight = layer.weight.detach()
        change = layer.compute(args[0].detach(), _quantized(layer, "w", weight) - weight, None)
    return output + _per_row(t, output) * change


def _directions(
    measure: Callable[[Tensor], Tensor], count: int, generator: torch.Generator, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return random signs ε and H ε, each (count, B, ...) for ``outputs`` (B, ...).

    H is the Hessian of the samples' sum of ``measure``, which maps outputs to their mean.
    """
    leaf = outputs.clone().requires_grad_(True)
    with torch.enable_grad():
        total = measure(leaf) * len(outputs)
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
    signs = torch.randint(2, (count, *outputs.shape), generator=generator).mul(2).sub(1).to(outputs)
    curved = [torch.autograd.grad(gradient, leaf, one, retain_graph=True)[0] for one in signs]
    return signs, torch.stack(curved)
