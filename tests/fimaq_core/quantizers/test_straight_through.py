"""Straight-through weights against their definition by autograd."""

import pytest
import torch
from torch import Tensor

from fimaq_core.quantizers.affine import fake_quantize
from fimaq_core.quantizers.straight_through import StraightThrough

Ranges = tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]
OFF = torch.tensor(0.0)


def ranges(seed: int = 0) -> Ranges:
    """A matrix and a convolution weight of different bits, with ranges that clamp at both ends."""
    torch.manual_seed(seed)
    weights = [torch.randn(6, 10), torch.randn(4, 3, 2, 2) * 0.5]
    scales = [torch.rand(6, 1) * 0.2 + 0.1, torch.rand(4, 1) * 0.1 + 0.15]
    zeros = [torch.randint(1, 7, (6, 1)).float(), torch.randint(0, 4, (4, 1)).float()]
    return weights, scales, zeros, [8, 4]


def test_at_the_start_weights_are_rounded_to_nearest() -> None:
    """The flat weights are those of the quantizer, and the codes are integers of the grid."""
    problem = StraightThrough.build(*ranges())
    split = problem.split(problem.soft())
    for found, codes, weight, scale, zero, levels in zip(
        split, problem.codes(), *ranges(), strict=True
    ):
        assert found.shape == weight.shape
        expected = fake_quantize(weight.flatten(1), scale, zero, levels)
        assert torch.allclose(found.flatten(1), expected, rtol=1e-6, atol=0)
        nearest = (torch.round(weight.flatten(1) / scale) + zero).clamp(0, levels - 1)
        assert torch.equal(codes, nearest)
        assert float(codes.min()) == 0.0
        assert float(codes.max()) == levels - 1


def test_gradient_is_autograds_with_rounding_as_the_identity() -> None:
    weights, scales, zeros, levels = ranges()
    problem = StraightThrough.build(weights, scales, zeros, levels)
    slope = torch.randn(problem.soft().shape)
    expected = []
    pieces = zip(weights, scales, zeros, levels, problem.split(slope), strict=True)
    for weight, scale, zero, count, piece in pieces:
        leaf = weight.flatten(1).clone().requires_grad_(True)
        ratio = leaf / scale
        codes = (ratio + (ratio.round() - ratio).detach() + zero).clamp(0, count - 1)
        quantized = scale * (codes - zero)
        (found,) = torch.autograd.grad((quantized * piece.flatten(1)).sum(), leaf)
        expected.append(found.flatten())
    gradient = problem.vectors.gradient(slope, OFF, OFF)
    assert torch.allclose(gradient, torch.cat(expected), rtol=1e-5, atol=1e-7)
    clamped = float((gradient == 0).double().mean())
    assert 0.1 < clamped < 0.6


@pytest.mark.parametrize(
    ("weight", "code", "passes"),
    [(-1.0, 0, 0.0), (-0.6, 0, 1.0), (0.2, 1, 1.0), (1.2, 3, 1.0), (1.3, 3, 0.0)],
)
def test_codes_and_gradients_of_single_weights(weight: float, code: int, passes: float) -> None:
    """Scale 0.5, zero point 1, four levels: the grid is -0.5, 0, 0.5, 1."""
    one = torch.ones(1, 1)
    problem = StraightThrough.build([weight * one], [0.5 * one], [one], [4])
    assert float(problem.codes()[0]) == code
    assert float(problem.soft()) == 0.5 * (code - 1)
    assert float(problem.vectors.gradient(torch.tensor([3.0]), OFF, OFF)) == 3 * passes
