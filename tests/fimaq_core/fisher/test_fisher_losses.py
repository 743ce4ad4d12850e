"""Block losses against explicit loops, and the root of the Gram matrix's inverse."""

import pytest
import torch
from torch import Tensor

from fimaq_core.fisher import losses
from fimaq_core.fisher.divergence import ClassifierDivergence, kl_divergence


def example(batch: int = 4, width: int = 7, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Δ (B, N), G and D (k, N), double."""
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    gradients = torch.rand(k, width, generator=generator, dtype=torch.float64)
    errors = torch.rand(k, width, generator=generator, dtype=torch.float64)
    return delta, gradients, errors


def test_squared_and_absolute_error() -> None:
    delta, _, _ = example()
    squared = sum(sum(v * v for v in row) for row in delta.tolist()) / 4
    absolute = sum(sum(abs(v) for v in row) for row in delta.tolist()) / 4
    assert float(losses.squared_error(delta)) == pytest.approx(squared, rel=1e-12)
    assert float(losses.absolute_error(delta)) == pytest.approx(absolute, rel=1e-12)


def test_squared_gradient_loss() -> None:
    delta, _, _ = example()
    gradient = torch.randn_like(delta)
    total = sum(
        (d * g) ** 2
        for ds, gs in zip(delta.tolist(), gradient.tolist(), strict=True)
        for d, g in zip(ds, gs, strict=True)
    )
    assert float(losses.squared_gradient_loss(delta, gradient)) == pytest.approx(
        total / delta.numel(), rel=1e-12
    )


def test_diagonal_loss() -> None:
    delta, gradients, _ = example()
    total = 0.0
    for row in delta.tolist():
        for n, value in enumerate(row):
            total += value**2 * sum(gradients[k, n].item() for k in range(3)) / 3
    assert float(losses.diagonal_loss(delta, gradients.mean(0))) == pytest.approx(
        total / delta.numel(), rel=1e-12
    )


def test_rank_one_loss() -> None:
    delta, gradients, _ = example()
    total = 0.0
    for row in delta.tolist():
        mean = sum(abs(v) * gradients[:, n].mean().item() for n, v in enumerate(row)) / len(row)
        total += mean**2
    assert float(losses.rank_one_loss(delta, gradients.mean(0))) == pytest.approx(
        total / 4, rel=1e-12
    )


def test_low_rank_loss() -> None:
    delta, gradients, errors = example()
    root, damped = losses.inverse_gram_root(errors)
    assert not damped
    matrix = torch.linalg.inv(errors @ errors.t())
    total = 0.0
    for row in delta.abs():
        a = [float(row @ gradients[i]) for i in range(3)]
        total += sum(a[i] * matrix[i, j].item() * a[j] for i in range(3) for j in range(3))
    assert float(losses.low_rank_loss(delta, gradients, root.double())) == pytest.approx(
        total / 4, rel=1e-5
    )


def test_low_rank_loss_of_one_pass_equals_its_formula() -> None:
    delta, gradients, errors = example(k=1)
    root, damped = losses.inverse_gram_root(errors)
    expected = (
        sum(float((row.abs() * gradients[0]).sum()) ** 2 for row in delta)
        / 4
        / float((errors[0] * errors[0]).sum())
    )
    assert not damped
    assert float(losses.low_rank_loss(delta, gradients, root.double())) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize(
    "name", ["squared", "absolute", "brecq", "diagonal", "rank one", "low rank"]
)
def test_losses_can_be_differentiated(name: str) -> None:
    delta, gradients, errors = example()
    delta.requires_grad_(True)
    root = losses.inverse_gram_root(errors)[0].double()
    functions = {
        "squared": losses.squared_error,
        "absolute": losses.absolute_error,
        "brecq": lambda d: losses.squared_gradient_loss(d, gradients[:1].expand_as(d)),
        "diagonal": lambda d: losses.diagonal_loss(d, gradients.mean(0)),
        "rank one": lambda d: losses.rank_one_loss(d, gradients.mean(0)),
        "low rank": lambda d: losses.low_rank_loss(d, gradients, root),
    }
    assert torch.autograd.gradcheck(functions[name], (delta,))


def test_passes_to_come_add_nothing() -> None:
    """Zero rows of G and zeros in the root stand for passes to come."""
    delta, gradients, errors = example()
    root = losses.inverse_gram_root(errors)[0].double()
    later_gradients, later_root = (
        torch.zeros(5, 7, dtype=torch.float64),
        torch.zeros(5, 5, dtype=torch.float64),
    )
    later_gradients[:3], later_root[:3, :3] = gradients, root
    now = losses.low_rank_loss(delta, gradients, root)
    assert float(losses.low_rank_loss(delta, later_gradients, later_root)) == pytest.approx(
        float(now), rel=1e-12
    )


def test_root_of_well_conditioned_errors() -> None:
    torch.manual_seed(0)
    errors = torch.rand(5, 400)
    root, damped = losses.inverse_gram_root(errors)
    assert not damped
    assert root.dtype == torch.float32
    expected = torch.linalg.inv(errors.double() @ errors.double().t())
    assert torch.allclose(
        root.double() @ root.double().t(),
        expected,
        rtol=1e-5,
        atol=1e-6 * float(expected.abs().max()),
    )


@pytest.mark.parametrize("kind", ["equal rows", "nearly equal rows", "a zero row", "k above N"])
def test_singular_errors_are_damped(kind: str) -> None:
    torch.manual_seed(1)
    row = torch.rand(1, 50)
    errors = {
        "equal rows": row.repeat(4, 1),
        "nearly equal rows": row.repeat(4, 1) * (1 + 1e-6 * torch.rand(4, 50)),
        "a zero row": torch.cat([torch.rand(2, 50), torch.zeros(1, 50)]),
        "k above N": torch.rand(6, 3),
    }[kind]
    root, damped = losses.inverse_gram_root(errors)
    assert damped
    assert torch.isfinite(root).all()
    assert (torch.linalg.svdvals(root.double()) > 0).all()
    # Eigenvalues of D Dᵀ are kept above the damped share of the largest.
    gram = errors.double() @ errors.double().t()
    values, vectors = torch.linalg.eigh(gram)
    floored = values.clamp(min=losses.DAMPING * float(values[-1]))
    expected = vectors / floored @ vectors.t()
    assert torch.allclose(
        root.double() @ root.double().t(),
        expected,
        rtol=1e-4,
        atol=1e-5 * float(expected.abs().max()),
    )
    width = errors.shape[1]
    delta = torch.randn(8, width, requires_grad=True)
    loss = losses.low_rank_loss(delta, torch.rand(errors.shape[0], width), root)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.item() >= 0
    assert delta.grad is not None
    assert torch.isfinite(delta.grad).all()


def test_no_error_at_all() -> None:
    root, damped = losses.inverse_gram_root(torch.zeros(3, 10))
    assert damped
    assert torch.equal(root, torch.zeros(3, 3))


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_divergence(temperature: float) -> None:
    torch.manual_seed(0)
    reference, logits = torch.randn(6, 5) * 3, torch.randn(6, 5) * 3
    p, q = (
        (reference.double() / temperature).softmax(-1),
        (logits.double() / temperature).softmax(-1),
    )
    expected = sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(6)) / 6
    assert float(kl_divergence(logits, reference, temperature)) == pytest.approx(expected, rel=1e-4)
    assert float(ClassifierDivergence(temperature)(logits, reference)) == pytest.approx(
        expected, rel=1e-4
    )
    assert float(kl_divergence(reference, reference, temperature)) == pytest.approx(0, abs=1e-6)
