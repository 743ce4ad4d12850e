"""The contrastive divergence against its definition, pair by pair."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.fisher.passes import Tail, divergence_gradient
from fimaq_core.samples import Samples
from tasks.retrieval.divergence import ContrastiveDivergence


def embeddings(rows: int, seed: int, width: int = 6) -> Tensor:
    return torch.randn(
        rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def kl(p: Tensor, q: Tensor) -> float:
    return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))


def by_definition(full: Tensor, quantized: Tensor, other: Tensor, scale: float) -> float:
    """Softmax form, one distribution after the other."""
    unit = [F.normalize(x, dim=-1) for x in (full, quantized, other)]
    before, after = scale * unit[0] @ unit[2].T, scale * unit[1] @ unit[2].T
    total = 0.0
    for a, b in ((before, after), (before.T, after.T)):
        for x, y in zip(a, b, strict=True):
            p, q = x.softmax(0), y.softmax(0)
            total += (kl(p, q) + kl(q, p)) / 2 / len(full)
    return total / 2


def by_definition_sigmoid(
    full: Tensor, quantized: Tensor, other: Tensor, scale: float, bias: float
) -> float:
    unit = [F.normalize(x, dim=-1) for x in (full, quantized, other)]
    total = 0.0
    for row in range(len(full)):
        for column in range(len(full)):
            p, q = (
                torch.sigmoid(scale * unit[which][row] @ unit[2][column] + bias) for which in (0, 1)
            )
            pair, changed = torch.stack([p, 1 - p]), torch.stack([q, 1 - q])
            total += (kl(pair, changed) + kl(changed, pair)) / 2 / len(full)
    return total


@pytest.mark.parametrize("rows", [2, 7])
def test_softmax_form(rows: int) -> None:
    full, quantized, other = (embeddings(rows, seed) for seed in range(3))
    divergence = ContrastiveDivergence(other, 10.0, None, 32)
    found = float(divergence(quantized, divergence.reference(Samples(full)).whole))
    assert found == pytest.approx(by_definition(full, quantized, other, 10.0), rel=1e-9)


@pytest.mark.parametrize("bias", [-10.0, 0.5])
def test_sigmoid_form(bias: float) -> None:
    full, quantized, other = (embeddings(5, seed) for seed in range(3))
    divergence = ContrastiveDivergence(other, 8.0, bias, 32)
    found = float(divergence(quantized, divergence.reference(Samples(full)).whole))
    assert found == pytest.approx(
        by_definition_sigmoid(full, quantized, other, 8.0, bias), rel=1e-9
    )


@pytest.mark.parametrize("bias", [None, -5.0])
def test_equal_outputs_of_any_length_diverge_by_nothing(bias: float | None) -> None:
    full, other = embeddings(6, 0).float(), embeddings(6, 1).float()
    divergence = ContrastiveDivergence(other, 100.0, bias, 32)
    leaf = (3 * full).requires_grad_(True)
    value = divergence(leaf, divergence.reference(Samples(full)).whole)
    value.backward()
    assert abs(float(value.detach())) < 1e-10
    assert leaf.grad is not None
    assert float(leaf.grad.abs().max()) < 1e-4


def test_a_small_change_is_not_lost_in_rounding() -> None:
    """At 8 bits and a scale of 100 the divergence is small; float32 has to be right to 0.3 %."""
    full, other = embeddings(8, 0), embeddings(8, 1)
    quantized = full + 1e-4 * embeddings(8, 2)
    exact, rounded = (
        ContrastiveDivergence(other.to(dtype), 100.0, None, 32)
        for dtype in (torch.float64, torch.float32)
    )
    truth = float(exact(quantized, exact.reference(Samples(full)).whole))
    assert truth < 1e-3
    assert float(
        rounded(quantized.float(), rounded.reference(Samples(full.float())).whole)
    ) == pytest.approx(truth, rel=2e-2)


def test_it_depends_on_which_pairs_share_a_batch() -> None:
    full, quantized, other = (embeddings(8, seed) for seed in range(3))
    divergence = ContrastiveDivergence(other, 10.0, None, 4)
    reference = divergence.reference(Samples(full)).whole
    assert reference.shape == (8, 12)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def over_batches(chosen: Tensor) -> float:
        return (
            sum(
                float(divergence(quantized[part], reference[part]))
                for part in chosen.split(divergence.batch)
            )
            / 2
        )

    assert over_batches(torch.arange(8)) != pytest.approx(over_batches(order), rel=1e-3)
    whole = float(divergence(quantized, reference))
    assert whole == pytest.approx(float(divergence(quantized[order], reference[order])), rel=1e-9)


@pytest.mark.parametrize("bias", [None, -5.0])
@pytest.mark.parametrize("size", [0.3, 0.03])
def test_its_own_products_do_not_take_the_models_arithmetic(
    bias: float | None, size: float
) -> None:
    """The model may compute in bfloat16, which would lose small changes of similarities."""
    full, other = embeddings(16, 0, 64).float(), embeddings(16, 1, 64).float()
    quantized = full + size * embeddings(16, 2, 64).float()
    divergence = ContrastiveDivergence(other, 100.0, bias, 32)
    reference = divergence.reference(Samples(full)).whole

    def rest(output: Tensor) -> Tensor:
        return (
            output.to(torch.bfloat16)
            if torch.is_autocast_enabled("cpu")
            else output.to(torch.bfloat16).float()
        )

    wide, narrow = (
        divergence_gradient(Tail(rest, reference, divergence, dtype), quantized)
        for dtype in ("float32", "bfloat16")
    )
    assert float(torch.cosine_similarity(wide.flatten(), narrow.flatten(), dim=0)) > 0.999
    assert float(narrow.norm() / wide.norm()) == pytest.approx(1, abs=0.02)
