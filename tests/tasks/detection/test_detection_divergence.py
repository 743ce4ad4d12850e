"""The divergence of a detector against its definition, level by level."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.samples import Samples
from tasks.detection.divergence import SCORE, ProposalDivergence, binary_kl

ANCHORS, CLASSES = 3, 4
LEVELS = ([20, 6, 2], [12, 4, 1])


def outputs(seed: int, proposals: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for levels in LEVELS:
        maps = 2 * torch.randn(
            1, sum(levels) * 5 * ANCHORS + proposals * CLASSES, generator=generator
        )
        rows.append(maps)
    return Samples(rows)


def terms_by_definition(
    found: Tensor, full: Tensor, levels: list[int], proposals: int
) -> list[Tensor]:
    """Terms one by one, from maps (A, h w) of scores and (A, 4, h w) of boxes per level."""
    classes, boxes, start = (
        torch.zeros((), dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
        0,
    )
    for count in levels:
        sl = slice(start * 15, (start + count) * 15)
        a, b = (part[0, sl].double().view(count, 15) for part in (found, full))
        p, q = torch.sigmoid(b[:, :3]), torch.sigmoid(a[:, :3])
        classes = classes + (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
        total = torch.zeros((), dtype=torch.float64)
        for position in range(count):
            for anchor in range(3):
                if p[position, anchor] > SCORE:
                    for coordinate in range(4):
                        place = 3 + 4 * anchor + coordinate
                        gap = (a[position, place] - b[position, place]).abs()
                        total = total + (0.5 * gap**2 if gap < 1 else gap - 0.5)
        boxes = boxes + total / (count * 12)
        start += count
    terms = [classes, boxes]
    if proposals:
        a, b = (part[0, start * 15 :].double().view(proposals, CLASSES) for part in (found, full))
        p = b.softmax(1)
        terms.append((p * (p.log() - a.log_softmax(1))).sum() / proposals)
    return terms


@pytest.mark.parametrize("proposals", [0, 7])
def test_gradient_is_that_of_the_terms_over_their_values(proposals: int) -> None:
    divergence = ProposalDivergence(LEVELS, ANCHORS, CLASSES if proposals else 0)
    full, other = outputs(0, proposals), outputs(1, proposals)
    reference = divergence.reference(full)
    for index, levels in enumerate(LEVELS):
        leaf, again = (other[index].double().requires_grad_(True) for _ in range(2))
        value = divergence(leaf, reference[index])
        assert float(value) == pytest.approx(3 if proposals else 2)
        (found,) = torch.autograd.grad(value, leaf)
        terms = terms_by_definition(again, full[index], levels, proposals)
        assert torch.allclose(
            divergence.terms(again.detach(), reference[index]), torch.stack(terms).detach()
        )
        (expected,) = torch.autograd.grad(sum(term / float(term) for term in terms), again)
        # the reference keeps its weights in float32
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("proposals", [0, 7])
def test_the_sharp_form_is_the_sum_of_the_terms(proposals: int) -> None:
    divided = ProposalDivergence(LEVELS, ANCHORS, CLASSES if proposals else 0)
    full, other = outputs(0, proposals), outputs(1, proposals)
    reference, plain = divided.reference(full), divided.sharp()
    for index, levels in enumerate(LEVELS):
        terms = terms_by_definition(other[index], full[index], levels, proposals)
        value = float(plain(other[index], reference[index]))
        assert value == pytest.approx(float(sum(terms)), rel=1e-5)
        assert float(plain(full[index], reference[index])) == 0
    assert float(divided(other[0], reference[0])) == pytest.approx(3 if proposals else 2)


def test_maps_and_flat_outputs_are_the_same() -> None:
    divergence = ProposalDivergence(LEVELS, ANCHORS)
    flat, other = outputs(0), outputs(1)
    maps = Samples([row.view(1, -1, 5 * ANCHORS) for row in flat])
    for index in range(2):
        reference = divergence.reference(maps)[index]
        assert torch.equal(reference, divergence.reference(flat)[index])
        gradients = []
        for shape in (other[index].shape, maps[index].shape):
            leaf = other[index].view(shape).clone().requires_grad_(True)
            gradients.append(torch.autograd.grad(divergence(leaf, reference), leaf)[0].flatten())
        assert torch.equal(*gradients)


def test_no_box_counts_where_no_score_is_high() -> None:
    divergence = ProposalDivergence([[5]], ANCHORS)
    full = torch.zeros(1, 5, 15)  # scores of one half
    reference = divergence.reference(Samples([full]))[0]
    leaf = torch.randn(1, 5, 15, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(divergence(leaf, reference), leaf)
    assert torch.isfinite(gradient).all()
    assert not gradient[:, :, 3:].any()
    assert gradient[:, :, :3].abs().min() > 0


def test_equal_outputs_have_no_gradient() -> None:
    divergence = ProposalDivergence(LEVELS, ANCHORS)
    full = outputs(0)
    leaf = full[0].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(divergence(leaf, divergence.reference(full)[0]), leaf)
    assert torch.isfinite(gradient).all()


def test_binary_kl_in_closed_form() -> None:
    a, b = (
        torch.tensor([0.3, -4.0, 2.0], dtype=torch.float64),
        torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64),
    )
    p, q = torch.sigmoid(b), torch.sigmoid(a)
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert torch.allclose(binary_kl(a, b), expected, atol=1e-15)
    assert float(binary_kl(torch.tensor(0.0), torch.tensor(0.0))) == 0
    assert math.isfinite(float(binary_kl(torch.tensor(80.0), torch.tensor(-80.0))))
    assert F.binary_cross_entropy_with_logits(a, p).item() - F.binary_cross_entropy_with_logits(
        b, p
    ).item() == pytest.approx(float(expected.mean()))
