"""Divergence of a detector: changes of the RPN's maps and, optionally, of its proposals' classes.

The form without proposals is that of APHQ-ViT's code for detectors (Wu et al., CVPR 2025,
arXiv:2504.02508). Each term is divided by its own value, so that a small term counts as much as a
large one. Fisher passes use only the gradient of the divergence, not its value.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.fisher.divergence import Divergence, at_least_float32
from fimaq_core.samples import Samples

#: Boxes count at positions whose full-precision score is above this.
SCORE = 0.7

#: Largest difference of two logits for which :func:`binary_kl` uses its exact form.
_NEAR = 30.0
#: Smallest divisor of a term.
_NOTHING = 1e-30


class ProposalDivergence(Divergence):
    """Sum of the terms of one image, each divided by its own value.

    Classes: mean binary KL between full-precision and quantized scores, summed over levels. Boxes:
    mean smooth-L1 distance of the box deltas over all positions, summed over levels; a position
    counts as 0 if its full-precision score is at most :data:`SCORE`. Proposals (if ``classes`` is
    K > 0): mean KL of the classes that the first box head gives the full-precision proposals.

    Outputs are flat per image, (1, M). Each position of all ``levels`` has A = ``anchors`` class
    logits and 4 A box deltas (those of anchor a at 4 a to 4 a + 3). K logits per proposal follow.
    """

    def __init__(self, levels: Sequence[Sequence[int]], anchors: int, classes: int = 0) -> None:
        self.levels, self.anchors, self.classes = levels, anchors, classes
        self.divided = True  # False: the plain sum of the terms

    def sharp(self) -> "ProposalDivergence":
        plain = copy.copy(self)
        plain.divided = False
        return plain

    def reference(self, outputs: Samples) -> Samples:
        """Append a weight per position to the outputs: 1 / number of its level's positions."""
        rows = []
        for output, levels in zip(outputs, self.levels, strict=True):
            weights = torch.cat([torch.full((1, count), 1 / count) for count in levels], 1)
            rows.append(torch.cat([output.flatten(1), weights.to(output)], 1))
        return Samples(rows)

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        terms = self.terms(outputs, reference)
        if self.divided:
            terms = terms / terms.detach().clamp(min=_NOTHING)
        total = terms.sum()
        return at_least_float32(total.to(outputs.dtype))

    def terms(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Return the terms (2 or 3,) before the division, float64."""
        # In float64: close to full precision, the terms are differences of nearly equal numbers.
        found, full = outputs.flatten(1).double(), reference.double()
        positions = full.shape[1] - found.shape[1]
        full, weights = full[:, :-positions], full[:, -positions:]
        end = positions * 5 * self.anchors
        maps = [part[:, :end].reshape(-1, positions, 5 * self.anchors) for part in (found, full)]
        (scores, boxes), (full_scores, full_boxes) = (
            part.split([self.anchors, 4 * self.anchors], 2) for part in maps
        )
        terms = [(binary_kl(scores, full_scores).mean(2) * weights).sum()]
        chosen = (full_scores.sigmoid() > SCORE).repeat_interleave(4, 2)
        far = F.smooth_l1_loss(boxes * chosen, full_boxes * chosen, reduction="none")
        terms.append((far.mean(2) * weights).sum())
        if self.classes:
            logits, full_logits = (
                part[:, end:].reshape(-1, self.classes).log_softmax(1) for part in (found, full)
            )
            terms.append(F.kl_div(logits, full_logits, reduction="batchmean", log_target=True))
        return torch.stack(terms)


def binary_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """Compute ``KL(p || q)`` in nats, elementwise, p = sigmoid(reference), q = sigmoid(logits)."""
    p, gap = reference.sigmoid(), logits - reference
    # log(1 + p (exp(gap) - 1)) - p gap is exact for small gaps; exp overflows for large ones.
    near = gap.clamp(-_NEAR, _NEAR)
    close = torch.log1p(p * torch.expm1(near)) - p * near
    far = F.softplus(logits) - F.softplus(reference) - p * gap
    return torch.where(gap.abs() > _NEAR, far, close)
