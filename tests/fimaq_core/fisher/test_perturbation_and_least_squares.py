"""Perturbation Hessian and least-squares fit against closed forms; their losses against loops."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_models import chain_of, images, quick, vit
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.fisher import losses
from fimaq_core.fisher.divergence import ClassifierDivergence, Divergence, kl_divergence
from fimaq_core.fisher.passes import Sweep, Tail, least_squares_hessian, perturbation_hessian
from fimaq_core.samples import Samples

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(hessian: Tensor) -> Divergence:
    """Mean over samples of ½ (z - r)ᵀ H (z - r)."""

    def divergence(outputs: Tensor, reference: Tensor) -> Tensor:
        error = (outputs - reference).flatten(1)
        return 0.5 * ((error @ hessian) * error).sum(1).mean()

    return divergence


def itself(z: Tensor) -> Tensor:
    return z


# Perturbation Hessian.


@pytest.mark.parametrize(("epsilon", "tolerance"), [(0.25, 1e-12), (1e-3, 1e-10), (1e-6, 1e-7)])
def test_of_a_quadratic_it_is_twice_epsilon_times_the_row_sums(
    epsilon: float, tolerance: float
) -> None:
    """``2 ε |H 1|``, whatever the point; differences of gradients lose digits as ε gets small."""
    half = normal(12, 12)
    hessian = half @ half.t() - 2 * torch.eye(
        12, dtype=torch.float64
    )  # indefinite: the absolute value matters
    assert (hessian.sum(1) < 0).any()
    z, r = normal(5, 3, 4, seed=1), normal(5, 3, 4, seed=2)
    found = perturbation_hessian(Tail(itself, r, quadratic(hessian)), z, epsilon)
    assert found.shape == z.shape
    expected = 2 * epsilon * hessian.sum(1).abs().view(3, 4).expand(5, 3, 4)
    assert torch.allclose(found, expected, rtol=0, atol=tolerance * float(expected.max()))


def test_of_a_diagonal_quadratic_it_is_twice_epsilon_times_the_diagonal() -> None:
    diagonal = normal(7).square()
    found = perturbation_hessian(
        Tail(itself, normal(4, 7, seed=2), quadratic(diagonal.diag())), normal(4, 7, seed=1), 0.125
    )
    assert torch.allclose(found, (0.25 * diagonal).expand(4, 7), rtol=1e-12)


def test_each_sample_has_its_own_hessian_whatever_the_batch() -> None:
    """Behind a cube the Hessian at z is diagonal: of ½ (z³ - r)² it is 15 z⁴ - 6 r z.

    The perturbation ± ε takes the mean slope.
    """
    z, r = normal(6, 5, seed=1), normal(6, 5, seed=2)
    half_square = quadratic(torch.eye(5, dtype=torch.float64))

    def at(rows: slice) -> Tensor:
        return perturbation_hessian(Tail(lambda x: x**3, r[rows], half_square), z[rows], 1e-4)

    whole, alone = at(slice(None)), [at(slice(i, i + 1)) for i in range(6)]
    assert torch.allclose(whole, torch.cat(alone), rtol=1e-9, atol=1e-15)
    exact = 2e-4 * (15 * z**4 - 6 * r * z).abs()
    assert torch.allclose(whole, exact, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(whole[0], whole[1], rtol=0.1)


def test_it_leaves_the_output_alone() -> None:
    z = normal(3, 4)
    before = z.clone()
    half_square = quadratic(torch.eye(4, dtype=torch.float64))
    perturbation_hessian(Tail(itself, normal(3, 4, seed=1), half_square), z, 0.5)
    assert torch.equal(z, before)
    assert not z.requires_grad


def hessian_times(
    rest: Callable[[Tensor], Tensor], z: Tensor, reference: Tensor, direction: Tensor
) -> Tensor:
    """Exact Hessian of the divergence at z times a direction, by differentiating twice."""
    leaf = z.detach().requires_grad_(True)
    value = kl_divergence(rest(leaf), reference, 2.0) * len(z)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), leaf)
    return product


@torch.no_grad()
def pre_norm_vit() -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The model behind a ViT's first block, the block's outputs, and another reference."""
    chain, x = chain_of(vit(3), quick()).double(), images(4).double()
    z = chain.segment(1)(chain.segment(0)(x))
    return lambda output: chain.tail(2, output), z, chain(x) + normal(4, 10)


def without_norms() -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A network of linear layers and GELU."""
    torch.manual_seed(3)
    chain = (
        nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Linear(16, 6)).double().requires_grad_(False)
    )
    z = normal(4, 9)
    return chain, z, chain(z) + normal(4, 6, seed=1)


def test_a_shift_of_all_channels_is_a_null_direction_behind_layer_norms() -> None:
    """H 1 is zero in a pre-norm transformer, so the difference of gradients is only rounding."""
    rest, z, reference = pre_norm_vit()
    ones, direction = torch.ones_like(z), normal(*z.shape, seed=5)
    size = float(hessian_times(rest, z, reference, direction).abs().max())
    assert size > 1e-4
    assert float(hessian_times(rest, z, reference, ones).abs().max()) < 1e-12 * size
    # A shift of one token alone is a null direction too, one of a single channel is not.
    token, channel = torch.zeros_like(z), torch.zeros_like(z)
    token[:, 3], channel[:, :, 3] = 1, 1
    assert float(hessian_times(rest, z, reference, token).abs().max()) < 1e-12 * size
    assert float(hessian_times(rest, z, reference, channel).abs().max()) > 0.01 * size
    # So the size of ε does not matter; for a quadratic, 2 ε |H 1| would grow by a million.
    small, large = (
        perturbation_hessian(Tail(rest, reference, ClassifierDivergence(2.0)), z, epsilon)
        for epsilon in (1e-8, 1e-2)
    )
    assert 0 < float(large.mean()) < 100 * float(small.mean()) < 1e-10 * size


def test_without_layer_norms_it_is_no_null_direction() -> None:
    rest, z, reference = without_norms()
    ones, direction = torch.ones_like(z), normal(*z.shape, seed=5)
    size = float(hessian_times(rest, z, reference, direction).abs().max())
    exact = hessian_times(rest, z, reference, ones).abs()
    assert float(exact.max()) > 0.1 * size
    found = perturbation_hessian(Tail(rest, reference, ClassifierDivergence(2.0)), z, 1e-5)
    assert torch.allclose(found, 2e-5 * exact, rtol=1e-4, atol=1e-7 * float(exact.max()))


# The fit of g by Δ.


def fit(delta: Tensor, gradient: Tensor, batch: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """h and u of images b with errors ``delta[b]``, gradients ``gradient[b]``, (n, N), float64."""
    chain = BlockChain(
        [Segment("block", "block", nn.Identity()), Segment("head", "head", nn.Identity())]
    )
    targets = normal(*delta.shape, seed=9)
    inputs = targets + delta
    # Of ½ |z - r|² the gradient is z - r.
    divergence = quadratic(torch.eye(delta.shape[1], dtype=torch.float64))
    sweep = Sweep(chain, 0, Samples(inputs - gradient), divergence, CPU, batch)
    found = least_squares_hessian(sweep, inputs, targets)
    assert all(part.dtype == torch.float32 and part.shape == delta.shape[1:] for part in found)
    return found[0].double().numpy(), found[1].double().numpy()


def by_images(delta: Tensor, gradient: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The same image by image."""
    width = delta.shape[1]
    above, below, upper, lower = np.zeros(width), np.zeros(width), np.zeros(width), 0.0
    for d, g in zip(delta.numpy(), gradient.numpy(), strict=True):
        for n in range(width):
            above[n] += g[n] * d[n]
            below[n] += d[n] ** 2
        inner = float(np.dot(g, d))
        if inner > 0:
            upper += g * np.sqrt(inner)
            lower += inner
    return np.maximum(above / below, 0), upper / lower


def test_fit_equals_the_sums_image_by_image() -> None:
    delta = normal(11, 8)
    gradient = 0.1 * delta + normal(11, 8, seed=1)
    inner = (delta * gradient).sum(1)
    assert 0 < int((inner <= 0).sum()) < 11  # some images count for u, some do not
    h, u = fit(delta, gradient)
    expected_h, expected_u = by_images(delta, gradient)
    assert 0 < int((expected_h == 0).sum()) < 8
    assert h == pytest.approx(expected_h, rel=1e-6)
    assert u == pytest.approx(expected_u, rel=1e-6)


def test_a_known_diagonal_is_found_and_its_negative_entries_are_set_to_zero() -> None:
    diagonal = torch.tensor([3.0, 0.5, -1.0, 0.0, 1e-6, -1e-6, 40.0], dtype=torch.float64)
    delta = normal(9, 7)
    h, _ = fit(delta, diagonal * delta)
    assert h == pytest.approx(diagonal.clamp(min=0).numpy(), rel=1e-6)
    assert h[2] == h[3] == h[5] == 0


def test_an_output_without_error_has_no_curvature() -> None:
    """0 / 0 is 0 there."""
    delta, gradient = normal(4, 5), normal(4, 5, seed=1)
    delta[:, 2] = 0
    h, u = fit(delta, gradient)
    assert h[2] == 0
    assert np.isfinite(h).all()
    assert np.isfinite(u).all()
    for part in fit(torch.zeros(4, 5, dtype=torch.float64), gradient):
        assert not part.any()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_known_direction_is_found_but_for_its_sign(sign: int) -> None:
    """For g = (uᵀΔ) u with uᵀΔ of one sign in all images; the loss needs only (uᵀΔ)²."""
    direction, delta = normal(6, seed=2), normal(10, 6, seed=3)
    delta *= (sign * torch.sign(delta @ direction))[:, None]
    _, u = fit(delta, (delta @ direction)[:, None] * direction)
    assert u == pytest.approx(sign * direction.numpy(), rel=1e-6)
    others = normal(20, 6, seed=4)
    zero = torch.zeros(6, dtype=torch.float64)
    for error in others:
        found = float(losses.least_squares_loss(error[None], zero, torch.from_numpy(u)))
        assert found == pytest.approx(
            0.5 * float(error @ direction[:, None] @ direction[None] @ error), rel=1e-5
        )


def test_images_whose_errors_differ_in_sign_shrink_the_direction() -> None:
    """The fit takes the positive root for each image: with s = uᵀΔ, Σ s|s| / Σ s² of u is left."""
    direction, delta = normal(6, seed=2), normal(10, 6, seed=3)
    s = delta @ direction
    assert (s > 0).any()
    assert (s < 0).any()
    _, u = fit(delta, s[:, None] * direction)
    left = float((s * s.abs()).sum() / s.square().sum())
    assert abs(left) < 0.9
    assert u == pytest.approx(left * direction.numpy(), rel=1e-6)


def test_images_against_their_gradient_add_nothing_to_the_direction() -> None:
    delta = normal(8, 5)
    gradient = delta * normal(8, 5, seed=1).square()
    gradient[3:] *= -1  # Δᵀg is negative for these
    _, u = fit(delta, gradient)
    _, expected = fit(delta[:3], gradient[:3])
    assert u == pytest.approx(expected, rel=1e-6)
    h, none = fit(delta[3:], gradient[3:])
    assert not none.any()
    assert not h.any()


@pytest.mark.parametrize("batch", [1, 4, 11, 50])
def test_fit_does_not_depend_on_the_batch_size(batch: int) -> None:
    delta = normal(11, 8)
    gradient = delta + normal(11, 8, seed=1)
    for found, expected in zip(fit(delta, gradient, batch), fit(delta, gradient, 3), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_inputs_of_any_shape_run_through_the_block_as_it_is_given() -> None:
    """``forward`` replaces the block, tokens and channels are one long vector."""
    torch.manual_seed(0)
    chain = BlockChain(
        [Segment("block", "block", nn.Identity()), Segment("head", "head", nn.Linear(4, 3))]
    )
    inputs = torch.randn(5, 2, 4)
    targets, reference = inputs.clone(), torch.randn(5, 2, 3)
    divergence: Divergence = lambda a, b: (a - b).square().flatten(1).sum(1).mean()  # noqa: E731
    sweep = Sweep(chain, 0, Samples(reference), divergence, CPU, 2)
    h, u = least_squares_hessian(sweep, inputs, targets, lambda x: 1.5 * x)
    assert h.shape == u.shape == (8,)
    weight, bias = (part.detach() for part in chain.segment(1).block.parameters())
    gradient = 2 * (1.5 * inputs @ weight.t() + bias - reference) @ weight
    expected_h, expected_u = by_images(
        (0.5 * inputs).flatten(1).double(), gradient.flatten(1).double()
    )
    assert h.numpy() == pytest.approx(expected_h, rel=1e-4, abs=1e-5)
    assert u.numpy() == pytest.approx(expected_u, rel=1e-4, abs=1e-5)


# Losses.


def test_least_squares_loss_equals_a_loop() -> None:
    delta, diagonal, direction = normal(4, 7), normal(7, seed=1).square(), normal(7, seed=2)
    total = 0.0
    for row in delta.tolist():
        total += 0.5 * sum(h * d * d for h, d in zip(diagonal.tolist(), row, strict=True))
        total += 0.5 * sum(u * d for u, d in zip(direction.tolist(), row, strict=True)) ** 2
    assert float(losses.least_squares_loss(delta, diagonal, direction)) == pytest.approx(
        total / 4, rel=1e-12
    )


@pytest.mark.parametrize("own", [False, True])
def test_diagonal_loss_of_one_hessian_or_of_one_a_sample(own: bool) -> None:
    delta = normal(4, 7)
    diagonal = normal(4, 7, seed=1).abs() if own else normal(7, seed=1).abs()
    total = 0.0
    for b, n in itertools.product(range(4), range(7)):
        total += delta[b, n].item() ** 2 * (diagonal[b, n] if own else diagonal[n]).item()
    assert float(losses.diagonal_loss(delta, diagonal)) == pytest.approx(total / 28, rel=1e-12)


def test_their_gradients() -> None:
    delta, diagonal, direction = (
        normal(4, 7).requires_grad_(True),
        normal(7, seed=1).square(),
        normal(7, seed=2),
    )
    assert torch.autograd.gradcheck(
        lambda d: losses.least_squares_loss(d, diagonal, direction), (delta,)
    )
    assert torch.autograd.gradcheck(
        lambda d: losses.diagonal_loss(d, diagonal.expand(4, 7)), (delta,)
    )
