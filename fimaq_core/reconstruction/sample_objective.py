"""The objective of a block for samples of varying shapes: Fisher information kept per sample.

Our variant of FIMA-Q (Wu et al., CVPR 2025, arXiv:2506.11543) for detectors, for which no code is
released. APHQ-ViT's code for detectors (Wu et al., CVPR 2025, arXiv:2504.02508) keeps its Hessians
in the same way. Each sample has its own absolute gradients g, errors d and Hessian, each scaled to
mean 1 over the sample's N values. The low-rank part is divided by N, so large and small images
count the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fimaq_core.fisher import losses
from fimaq_core.reconstruction.loss import Batch, LossState
from fimaq_core.reconstruction.objective import DIAGONAL, UPDATED, Objective
from fimaq_core.samples import Samples


class _Own(NamedTuple):
    """Fisher information of one sample, as in :class:`.loss.LossState`; ``root`` is over √N."""

    gradients: Tensor
    diagonal: Tensor
    root: Tensor
    errors: Tensor | None  # (k, N) absolute errors, if the loss needs them


class SampleObjective(Objective):
    """Objective of a block whose samples have varying shapes.

    Memory, where the tape lies: a loss with k Fisher passes keeps 2 k + 1 times the block's outputs
    (``fisher_diag`` and ``fisher_lr`` k + 1 times), a loss with Hessians keeps them once.
    """

    def _make_room(self) -> None:
        storage, k = self.tape.storage, 1 if self.kind == "least_squares" else self.recipe.fisher_k
        self._size = torch.zeros((), dtype=torch.float64, device=storage.device)
        self._own: list[_Own] = []
        if self.kind == "perturb_mean":  # Hessians of varying shapes have no mean
            self.kind = "perturb"
        for output in self.target if self.kind in UPDATED else ():
            shape = k, output.numel()
            errors = storage.empty(shape, torch.float32) if self.kind == "fisher_dplr" else None
            gradients = storage.empty(shape, torch.float32).zero_()
            diagonal = storage.empty(shape[1:], torch.float32)
            root = torch.zeros(k, k, device=storage.device)
            self._own.append(_Own(gradients, diagonal, root, errors))

    def _weight(self, rows: slice, values: Tensor, squared: bool) -> Tensor | None:
        """Return a sample's gradient scaled to mean square 1, or its Hessian to mean 1, (1, N)."""
        mean = (values.square() if squared else values).mean()
        self._size += mean
        return _over(values, mean.sqrt() if squared else mean).view(1, -1)

    def sample(self, index: int, mixed: bool) -> tuple[Batch, LossState]:
        """Return the tensors of one sample that a step reads, on the computing device.

        ``mixed`` adds the inputs behind the quantized prefix.
        """
        tape, device = self.tape, self.tape.storage.device

        def there(samples: Samples) -> Tensor:
            return samples[index].to(device, non_blocking=True)

        prefix = there(tape.prefix) if mixed and tape.prefix is not None else None
        weights = None if self.weights is None else there(self.weights)
        batch = Batch(there(tape.full), prefix, there(self.target), weights)
        if self.rest is not None:
            side, kept = tape.beside.rows(slice(index, index + 1), device)
            batch = batch._replace(reference=there(self.reference), side=side, kept=kept)
        if not self._own:
            return batch, self.state
        own = (part.to(device, non_blocking=True) for part in self._own[index][:3])
        return batch, LossState(self.state.starts, *own)

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        damped, sweep = 0, self._sweep(self.tape.beside)
        for rows, output, gradient in sweep.gradients(self.tape.full, forward):
            own = self._own[rows.start]
            delta = (output - self.target[rows].to(output.device)).flatten()
            if self.kind == "least_squares":
                self._fit(own, gradient.flatten(), delta)
            else:
                damped += self._stack(own, gradient.flatten().abs(), delta.abs())
        self.passes += 1
        self.state.starts.zero_()
        if damped:
            self._note_damping(f" for {damped} images")

    def mean_weight(self) -> float | None:
        """Return the mean over samples and passes, before scaling; None if the loss has none."""
        if self.kind not in DIAGONAL or not self.passes:
            return None
        return float(self._size) / (len(self.target) * self.passes)

    def _stack(self, own: _Own, gradient: Tensor, error: Tensor) -> bool:
        """Add a pass to the tensors of a sample; return True if D Dᵀ was damped."""
        row, so_far = self.passes, self.passes + 1
        self._size += gradient.mean()
        own.gradients[row].copy_(_over(gradient, gradient.mean()))
        own.diagonal.copy_(own.gradients[:so_far].mean(0))
        if own.errors is None:
            return False
        own.errors[row].copy_(_over(error, error.mean()))
        root, damped = losses.inverse_gram_root(own.errors[:so_far].to(gradient.device))
        own.root[:so_far, :so_far].copy_(root / error.numel() ** 0.5)
        return damped

    def _fit(self, own: _Own, gradient: Tensor, delta: Tensor) -> None:
        """Fit LS-ViT's h and u to one sample's pair (g, Δ), scaled so that h has mean 1 / N."""
        g, d = gradient.double(), delta.double()
        tiny = torch.finfo(torch.float64).tiny
        diagonal = (g * d / d.square().clamp(min=tiny)).clamp(min=0)
        direction = g / (g @ d).clamp(min=tiny).sqrt() if bool(g @ d > 0) else torch.zeros_like(g)
        total = diagonal.sum()
        self._size += total / len(diagonal)
        total = total if bool(total > 0) else torch.ones_like(total)
        own.diagonal.copy_(diagonal / total)
        own.gradients[0].copy_(direction / total.sqrt())


def _over(values: Tensor, size: Tensor) -> Tensor:
    """Return ``values / size``, or the values themselves if the size is 0."""
    return values / torch.where(size > 0, size, torch.ones_like(size))
