"""The objective of a block for samples of varying shapes: the Fisher information is kept for each sample apart.

Our variant of FIMA-Q (Wu et al., CVPR 2025, arXiv:2506.11543) for detectors, whose released code has none; APHQ-ViT's code for
detectors (Wu et al., CVPR 2025, arXiv:2504.02508) keeps its Hessians so too. Absolute gradients g and errors d, and Hessians, are
a sample's own, each scaled to mean 1 over its N values; the low-rank part is divided by N, so that a large image counts no more
than a small one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fimaq_core.chain import BlockChain
from fimaq_core.errors import NumericsError
from fimaq_core.fisher import losses
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.fisher.passes import output_gradients, perturbation_hessian, rest_of
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.loss import Batch, LossState
from fimaq_core.reconstruction.objective import DIAGONAL, PERTURB, UPDATED, BlockObjective, Objective
from fimaq_core.reconstruction.tape import Tape
from fimaq_core.samples import Ragged, Samples, slices


@dataclass
class _Own:
    """What one sample's loss rests on, where the tape lies.

    Attributes:
        gradients: (k, N) absolute gradients; for ``least_squares`` (1, N), u.
        errors: (k, N) absolute errors, where the loss has use for them.
        diagonal: (N,) mean of the gradients so far; for ``least_squares`` h.
        root: (k, k) root of (D Dᵀ)⁻¹ over √N.
    """

    gradients: Tensor
    errors: Tensor | None
    diagonal: Tensor
    root: Tensor


class SampleObjective(Objective):
    """Loss of the present block of a tape whose samples have varying shapes; they are taken one by one.

    Memory: a loss with k Fisher passes keeps 2 k + 1 times the block's outputs (``fisher_diag`` and ``fisher_lr`` k + 1 times),
    one with Hessians once, where the tape lies.

    Raises:
        NumericsError: a Hessian is NaN or infinite.

    Attributes:
        weights: what weights each sample's errors, (1, N) each; None for losses without.
    """

    def __init__(
        self, chain: BlockChain, tape: Tape, recipe: Recipe, reference: Samples, divergence: Divergence, notes: list[str]
    ) -> None:
        super().__init__(chain, tape, recipe, reference, divergence, notes)
        self.weights: Ragged | None = None
        self._size = torch.zeros((), dtype=torch.float64, device=tape.storage.device)
        self._own: list[_Own] = []
        if self.kind == "fisher_brecq":
            self._squared_gradient_pass()
        if self.kind in PERTURB:
            self._perturbation_pass()
        if self.kind in UPDATED:
            self._own = [self._empty(output.numel()) for output in self._targets]
        self.update_steps = self._fisher_steps()
        self.state = LossState(torch.zeros(len(self.part_weights()), device=tape.storage.device))

    @property
    def _targets(self) -> Ragged:
        assert isinstance(self.tape.target, Ragged)
        return self.tape.target

    def sample(self, index: int, mixed: bool) -> tuple[Batch, LossState]:
        """What a step reads of one sample, on the computing device; ``mixed``: with the quantized prefix."""
        tape, device = self.tape, self.tape.storage.device

        def there(samples: Samples | None) -> Tensor | None:
            found = None if samples is None else samples[index].to(device, non_blocking=True)
            assert found is None or isinstance(found, Tensor)
            return found

        full, target = there(tape.full), there(self._targets)
        assert full is not None
        assert target is not None
        batch = Batch(full, there(tape.prefix) if mixed else None, target, there(self.weights))
        if self.kind == "prediction":
            side, kept = tape.beside.rows(slice(index, index + 1), device).tensors
            batch = batch._replace(reference=there(self.reference), side=side, kept=kept)
        if not self._own:
            return batch, self.state
        own = self._own[index]
        parts = (own.gradients, own.diagonal, own.root)
        return batch, LossState(self.state.starts, *(part.to(device, non_blocking=True) for part in parts))

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Objective`."""
        damped = 0
        for part, output, gradient in self._sweep(self.tape.full, prefix=False, forward=forward):
            index = part.start
            delta = (output - self._targets[index].to(output.device)).flatten()
            if self.kind == "least_squares":
                self._fit(self._own[index], gradient.flatten(), delta)
            else:
                damped += self._stack(self._own[index], gradient.flatten().abs(), delta.abs())
        self.passes += 1
        self.state.starts.zero_()
        if damped:
            passes = f"{self.passes} Fisher passes"
            self._note(f"{self.label}: D Dᵀ of {passes} was near singular for {damped} images and has been damped")

    def mean_weight(self) -> float | None:
        """See :class:`Objective`: before each sample's is scaled to mean 1, the mean over samples and passes."""
        if self.kind not in DIAGONAL or not self.passes:
            return None
        return float(self._size) / (len(self._targets) * self.passes)

    def _empty(self, size: int) -> _Own:
        storage, k = self.tape.storage, 1 if self.kind == "least_squares" else self.recipe.fisher_k
        errors = storage.empty((k, size), torch.float32) if self.kind == "fisher_dplr" else None
        root = torch.zeros(k, k, device=storage.device)
        return _Own(storage.empty((k, size), torch.float32).zero_(), errors, storage.empty((size,), torch.float32), root)

    def _stack(self, own: _Own, gradient: Tensor, error: Tensor) -> bool:
        """Add a pass to a sample's own; return whether D Dᵀ had to be damped."""
        row, so_far = self.passes, self.passes + 1
        self._size += gradient.mean()
        own.gradients[row].copy_(_to_mean_one(gradient))
        own.diagonal.copy_(own.gradients[:so_far].mean(0))
        if own.errors is None:
            return False
        own.errors[row].copy_(_to_mean_one(error))
        root, damped = losses.inverse_gram_root(own.errors[:so_far].to(gradient.device))
        own.root[:so_far, :so_far].copy_(root / error.numel() ** 0.5)
        return damped

    def _fit(self, own: _Own, gradient: Tensor, delta: Tensor) -> None:
        """LS-ViT's fit to the pair of one sample, scaled so that h has mean 1 / N."""
        g, d = gradient.double(), delta.double()
        tiny = torch.finfo(torch.float64).tiny
        diagonal = (g * d / d.square().clamp(min=tiny)).clamp(min=0)
        direction = g / (g @ d).clamp(min=tiny).sqrt() if bool(g @ d > 0) else torch.zeros_like(g)
        total = diagonal.sum()
        self._size += total / len(diagonal)
        total = total if bool(total > 0) else torch.ones_like(total)
        own.diagonal.copy_(diagonal / total)
        own.gradients[0].copy_(direction / total.sqrt())

    def _sweep(
        self, inputs: Samples, prefix: bool, forward: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        tape = self.tape
        beside = tape.beside_prefix if prefix else tape.beside
        return output_gradients(
            tape.teacher,
            tape.index,
            inputs,
            self.reference,
            self.divergence,
            1,
            tape.storage.device,
            self.recipe.frozen_dtype,
            forward,
            beside,
        )

    def _squared_gradient_pass(self) -> None:
        """BRECQ's pass: prefix quantized, this block and the rest in full precision, one gradient a sample, of mean square 1."""
        tape = self.tape
        set_quantized(tape.teacher.segment(tape.index).block, False)
        prefix = tape.full if tape.prefix is None else tape.prefix
        found = []
        for _, _, gradient in self._sweep(prefix, prefix=True):
            square = gradient.square().mean()
            self._size += square
            found.append(self._kept(_over(gradient, square.sqrt())))
        self.passes += 1
        # With nothing quantized before it the gradient is zero but for rounding.
        if tape.index == 0 or not any(bool(gradient.abs().max() > 0) for gradient in found):
            self._fall_back("the gradient is zero (nothing before it is quantized)")
            return
        self.weights = Ragged(found)

    def _perturbation_pass(self) -> None:
        """APHQ-ViT's pass, everything in full precision: a Hessian a sample."""
        tape, device = self.tape, self.tape.storage.device
        self.kind = "perturb"
        found = []
        for part in slices(self._targets, 1):
            reference = self.reference[part].to(device)
            assert isinstance(reference, Tensor)
            hessian = perturbation_hessian(
                rest_of(tape.teacher, tape.index, tape.beside.rows(part, device)),
                self._targets[part.start].to(device),
                reference,
                self.divergence,
                self.recipe.perturbation,
                self.recipe.frozen_dtype,
            )
            if not bool(torch.isfinite(hessian).all()):
                raise NumericsError(f"{self.label}: the perturbation Hessian is not finite: check the images and the weights.")
            self._size += hessian.mean()
            found.append(self._kept(_to_mean_one(hessian)))
        self.passes += 1
        if not any(bool(hessian.max() > 0) for hessian in found):
            self._fall_back("the perturbation Hessian is zero")
            return
        self.weights = Ragged(found)

    def _kept(self, values: Tensor) -> Tensor:
        """``values`` of one sample as (1, N), where the tape lies."""
        return self.tape.storage.empty((1, values.numel()), torch.float32).copy_(values.view(1, -1))


def _to_mean_one(values: Tensor) -> Tensor:
    """Values that are not negative, scaled to mean 1; zeros stay zeros."""
    return _over(values, values.mean())


def _over(values: Tensor, size: Tensor) -> Tensor:
    """``values`` over their size; zeros stay zeros."""
    return values / torch.where(size > 0, size, torch.ones_like(size))


def make_objective(
    chain: BlockChain, tape: Tape, recipe: Recipe, reference: Samples, divergence: Divergence, notes: list[str]
) -> Objective:
    """The objective for the tape's samples; arguments as of :class:`Objective`."""
    if isinstance(tape.full, Ragged):
        return SampleObjective(chain, tape, recipe, reference, divergence, notes)
    assert isinstance(reference, Tensor)
    return BlockObjective(chain, tape, recipe, reference, divergence, notes)
