"""Bounds between two ways of computing the same; they hold on every processor.

Two ways of computing differ by rounding, about 1e-7 relative. Before a quantizer this is rarely
enough to move a value that lies between two codes to the other code. Such a flip changes one token
by a whole quantization step, and every later step a little. Therefore each step starts here from
the same state: a flip then concerns its own step only, most steps have none, and an error in the
computation shows in all of them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.flat import FlatStep
from fimaq_core.reconstruction.schedule import BETA1
from fimaq_core.reconstruction.textbook import TextbookStep

#: Relative distances of a step without a flip, and of any step.
TIGHT = {"loss": 1e-5, "starts": 1e-5, "gradient": 1e-4, "moved": 2e-3}
LOOSE = {"loss": 0.1, "starts": 0.1, "gradient": 0.3, "moved": 0.5}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """True if no element is further away than ``tolerance`` times the largest one."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def distance(found: Tensor, expected: Tensor, floor: float = 1e-7) -> float:
    """Norm of the difference over the norm of ``expected``, in float64; 0 for empty tensors."""
    wide = expected.detach().double()
    return float((found.detach().double() - wide).norm() / wide.norm().clamp(min=floor))


def assert_same_steps(expected: BlockTrainer, others: Sequence[BlockTrainer], steps: int) -> Tensor:
    """Compare steps 0 to ``steps - 1`` of flat engines with those of ``expected``.

    Each step starts from the same state. Compared are the loss and its starts, the gradients (by
    Adam's first moment) and how far the variables move. Three quarters of the steps must agree
    within rounding, and all of them within the effect of a flip.

    Returns:
        How far each variable of the weights of ``expected`` moved in all.
    """
    first = before = _variables(expected)
    flipped = [0] * len(others)
    for number in range(steps):
        starts = expected.objective.state.starts.clone()
        for made in others:
            _set(made, before, starts)
        loss = expected.step(number).clone()
        after = _variables(expected)
        for place, made in enumerate(others):
            apart = {
                "loss": distance(made.step(number), loss),
                "starts": distance(made.objective.state.starts, expected.objective.state.starts),
                **_apart(before, _variables(made), after),
            }
            _check_derived(made, number)
            beyond = {key: far for key, far in apart.items() if not far <= LOOSE[key.split()[0]]}
            assert not beyond, f"{made.engine}, step {number}: {beyond}"
            flipped[place] += any(far > TIGHT[key.split()[0]] for key, far in apart.items())
        before = after
    for made, count in zip(others, flipped, strict=True):
        message = f"{count} of {steps} steps of {made.engine} are not those of {expected.engine}"
        assert count <= steps // 4, message
    return (before[0] - first[0]).abs()


def _variables(made: BlockTrainer) -> list[Tensor]:
    """Copies of the weights' variables, scales, and Adam's two moments of each."""
    step, state = made._step, made.state
    step.finish()
    learned = state.soft[:0] if state.rounding is None else state.rounding.vectors[0]
    moments = state.moments
    if isinstance(step, TextbookStep):
        moments = [*_moments(step, step.variables), *_moments(step, step.scales)]
    return [tensor.clone() for tensor in (learned, state.scales, *moments)]


def _moments(step: TextbookStep, leaves: Sequence[Tensor]) -> Iterator[Tensor]:
    """First and second moments in PyTorch's Adam; zeros before the first step."""
    states = {leaf: own for optimizer in step.optimizers for leaf, own in optimizer.state.items()}
    for name in ("exp_avg", "exp_avg_sq"):
        kept = [states[leaf][name] if leaf in states else torch.zeros_like(leaf) for leaf in leaves]
        yield torch.cat([torch.zeros(0), *(tensor.detach().flatten() for tensor in kept)])


def _set(made: BlockTrainer, values: Sequence[Tensor], starts: Tensor) -> None:
    """Continue from the variables and the loss's starts of another trainer."""
    state = made.state
    if state.rounding is not None:
        state.rounding.vectors[0].copy_(values[0])
        state.soft.copy_(state.rounding.soft())
    for own, value in zip((state.scales, *state.moments), values[1:], strict=True):
        own.copy_(value)
    made.objective.state.starts.copy_(starts)


def _apart(before: list[Tensor], found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Distances of the gradients and of the moves of a step from ``before``."""
    apart = {}
    for name, variable, moment in (("weights", 0, 2), ("scales", 1, 4)):
        gradients = (after[moment] - BETA1 * before[moment] for after in (found, expected))
        moves = (after[variable] - before[variable] for after in (found, expected))
        apart[f"gradient of {name}"] = distance(*gradients, 1e-12)
        apart[f"moved {name}"] = distance(*moves, 1e-9)
    return apart


def _check_derived(made: BlockTrainer, number: int) -> None:
    """Check that step ``number`` has left the counter and the soft weights up to date."""
    assert isinstance(made._step, FlatStep)
    assert int(made._step.counter) == number + 1
    if made.state.rounding is not None:
        assert torch.allclose(made.state.soft, made.state.rounding.soft(), rtol=1e-5, atol=1e-6)
