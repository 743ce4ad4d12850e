"""The objective of one block: what its loss rests on, and the passes that make it."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from fimaq_core.chain import BlockChain, Kept
from fimaq_core.errors import NumericsError
from fimaq_core.fisher import losses
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.fisher.passes import (
    least_squares_hessian,
    mean_gradient_and_error,
    output_gradients,
    perturbation_hessian,
    rest_of,
)
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.figures import mean_of
from fimaq_core.reconstruction.loss import Batch, LossState
from fimaq_core.reconstruction.tape import Tape
from fimaq_core.samples import Samples, slices

logger = logging.getLogger(__name__)

DPLR = ("fisher_lr", "fisher_diag", "fisher_dplr")
PERTURB = ("perturb", "perturb_mean")
#: Losses that take a pass with the block quantized while it trains.
UPDATED = (*DPLR, "least_squares")
#: Losses that weigh squared errors one by one.
DIAGONAL = ("fisher_brecq", "fisher_diag", "fisher_dplr", "least_squares", *PERTURB)


class Objective:
    """What the losses of a block have in common, whatever the samples.

    The head's loss is ``KL(softmax(fp) || softmax(q))``, not divided (with a perturbation Hessian: twice that over its
    start, as APHQ-ViT's code has it); a neck's is the squared error. Every other loss (each part of it) is divided by its value
    at the first step, or at the first step after the last Fisher pass; Fisher losses start at 2, others at 1.

    Args:
        chain, tape: the model and its tape at the block; ``tape.target`` must be computed.
        recipe: loss and its settings.
        reference: (n, ...) what the divergence compares the whole model's outputs with.
        divergence: of the task.
        notes: receives sentences about anything that did not go as the recipe says.

    Attributes:
        kind: name of the loss.
        state: what the loss rests on, whatever the batch.
        passes: Fisher passes done.
        update_steps: steps (from 0) before which a Fisher pass runs.
    """

    state: LossState
    update_steps: frozenset[int]

    def __init__(
        self, chain: BlockChain, tape: Tape, recipe: Recipe, reference: Samples, divergence: Divergence, notes: list[str]
    ) -> None:
        self.chain, self.tape, self.recipe = chain, tape, recipe
        self.reference, self.divergence, self.notes = reference, divergence, notes
        segment = chain.segment(tape.index)
        self.label, self.kind = segment.label, recipe.loss
        if segment.kind == "head":
            self.kind = "head_relative" if recipe.loss in PERTURB else "head"
        elif segment.kind == "neck":
            self.kind = "mse"
        self.passes = 0

    def part_weights(self) -> tuple[float, ...]:
        """Weight of each part of the loss."""
        if self.kind == "fisher_dplr":
            return self.recipe.fisher_p1, self.recipe.fisher_p2
        if self.kind == "prediction":
            return 1 - self.recipe.prediction_share, self.recipe.prediction_share
        return (2.0,) if self.kind in (*UPDATED, *PERTURB, "head_relative") else (1.0,)

    @property
    def rest(self) -> Callable[[Tensor, Tensor | None, Kept], Tensor] | None:
        """From the block's output (and what travels beside it) to the model's in full precision, for the loss that needs it."""
        return self._rest if self.kind == "prediction" else None

    def _rest(self, output: Tensor, side: Tensor | None = None, kept: Kept = ()) -> Tensor:
        return self.tape.teacher.rest(self.tape.index, output, side, kept)

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Take a Fisher pass. ``forward`` runs the block on a batch, quantized as it is at the present step."""
        raise NotImplementedError

    def mean_weight(self) -> float | None:
        """Mean of the diagonal Fisher weight in the loss as it is now; None for losses without."""
        raise NotImplementedError

    @property
    def _batch_size(self) -> int:
        """Samples a pass: what fits, unless the divergence says which samples belong together."""
        return self.divergence.batch or self.tape.batch_size

    def _fisher_steps(self) -> frozenset[int]:
        if self.kind == "least_squares":
            return frozenset({0})
        if self.kind not in DPLR:
            return frozenset()
        k, steps = self.recipe.fisher_k, self.recipe.steps
        if self.recipe.fisher_mode == "qf":
            return frozenset(range(min(k, steps)))
        return frozenset(i * steps // k for i in range(k))

    def _fall_back(self, reason: str) -> None:
        self._note(f"{self.label}: {reason}; squared error used instead")
        self.kind = "mse"

    def _note(self, sentence: str) -> None:
        logger.warning(sentence)
        self.notes.append(sentence)


class BlockObjective(Objective):
    """Loss of the present block of a tape whose samples have equal shapes.

    All its state is in tensors of fixed shape that are changed in place, so that a compiled or captured step sees the
    changes; nothing here reads a number back from the device but a Fisher pass.

    Raises:
        NumericsError: the perturbation Hessian is NaN or infinite.

    Attributes:
        weights: (n, N) what weights each sample's errors, where the tape lies; None for losses without.
    """

    def __init__(
        self, chain: BlockChain, tape: Tape, recipe: Recipe, reference: Tensor, divergence: Divergence, notes: list[str]
    ) -> None:
        super().__init__(chain, tape, recipe, reference, divergence, notes)
        self._errors: list[Tensor] = []
        self.weights: Tensor | None = None
        device, size, k = tape.storage.device, self._target[0].numel(), recipe.fisher_k
        gradients = diagonal = root = None
        if self.kind in DPLR:
            gradients, root = torch.zeros(k, size, device=device), torch.zeros(k, k, device=device)
        if self.kind == "least_squares":
            gradients = torch.zeros(1, size, device=device)
        if self.kind in (*UPDATED, "perturb_mean"):
            diagonal = torch.zeros(size, device=device)
        if self.kind == "fisher_brecq":
            self._squared_gradient_pass()
        if self.kind in PERTURB:
            self._perturbation_pass(diagonal)
        self.update_steps = self._fisher_steps()
        self.state = LossState(torch.zeros(len(self.part_weights()), device=device), gradients, diagonal, root)

    @property
    def _target(self) -> Tensor:
        assert isinstance(self.tape.target, Tensor)
        return self.tape.target

    def batch(self, mixed: bool) -> Batch:
        """What the steps read, all images; ``mixed``: with the quantized prefix."""
        tape = self.tape
        assert isinstance(tape.full, Tensor)
        assert isinstance(self.reference, Tensor)
        prefix = tape.prefix if mixed else None
        assert prefix is None or isinstance(prefix, Tensor)
        if self.kind != "prediction":
            return Batch(tape.full, prefix, self._target, self.weights)
        return Batch(tape.full, prefix, self._target, self.weights, self.reference, *tape.beside.tensors)

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Objective`."""
        tape, state = self.tape, self.state
        assert state.gradients is not None
        assert state.diagonal is not None
        assert isinstance(tape.full, Tensor)
        assert isinstance(self.reference, Tensor)
        sweep = least_squares_hessian if self.kind == "least_squares" else mean_gradient_and_error
        first, second = sweep(
            tape.teacher,
            tape.index,
            tape.full,
            self._target,
            self.reference,
            self.divergence,
            self._batch_size,
            tape.storage.device,
            self.recipe.frozen_dtype,
            forward,
            tape.beside,
        )
        self.passes += 1
        state.starts.zero_()
        if self.kind == "least_squares":
            state.diagonal.copy_(first)
            state.gradients[0].copy_(second)
            return
        state.gradients[self.passes - 1].copy_(first)
        self._errors.append(second)
        state.diagonal.copy_(state.gradients[: self.passes].mean(0))
        if self.kind == "fisher_dplr":
            assert state.root is not None
            root, damped = losses.inverse_gram_root(torch.stack(self._errors))
            state.root[: self.passes, : self.passes].copy_(root)
            if damped:
                self._note(f"{self.label}: D Dᵀ of {self.passes} Fisher passes was near singular and has been damped")

    def mean_weight(self) -> float | None:
        """See :class:`Objective`: for ``fisher_brecq`` the mean of squared gradients, else of absolute ones or of a Hessian."""
        if self.weights is not None:
            return mean_of(self.weights, self.tape.batch_size, squared=self.kind == "fisher_brecq")
        diagonal = self.state.diagonal
        return None if diagonal is None or self.kind not in DIAGONAL else float(diagonal.mean(dtype=torch.float64))

    def _squared_gradient_pass(self) -> None:
        """BRECQ's pass: prefix quantized, this block and the rest in full precision, one gradient a sample."""
        tape, device = self.tape, self.tape.storage.device
        prefix = tape.full if tape.prefix is None else tape.prefix
        block = tape.teacher.segment(tape.index).block
        set_quantized(block, False)
        gradients = tape.storage.empty((len(self._target), self._target[0].numel()), torch.float32)
        sweep = output_gradients(
            tape.teacher,
            tape.index,
            prefix,
            self.reference,
            self.divergence,
            self._batch_size,
            device,
            self.recipe.frozen_dtype,
            beside=tape.beside_prefix,
        )
        for part, _, gradient in sweep:
            gradients[part].copy_(gradient.flatten(1))
        self.passes += 1
        # With nothing quantized before it the gradient is zero but for rounding.
        if tape.index == 0 or not gradients.abs().max() > 0:
            self._fall_back("the gradient is zero (nothing before it is quantized)")
            return
        self.weights = gradients

    def _perturbation_pass(self, mean: Tensor | None) -> None:
        """APHQ-ViT's pass, everything in full precision: into ``mean`` (N,), or else one Hessian a sample."""
        tape, device, target = self.tape, self.tape.storage.device, self._target
        samples, largest = None, torch.zeros((), device=device)
        if mean is None:
            samples = tape.storage.empty((len(target), target[0].numel()), torch.float32)
        for part in slices(target, self._batch_size):
            reference = self.reference[part].to(device)
            assert isinstance(reference, Tensor)
            found = perturbation_hessian(
                rest_of(tape.teacher, tape.index, tape.beside.rows(part, device)),
                target[part].to(device),
                reference,
                self.divergence,
                self.recipe.perturbation,
                self.recipe.frozen_dtype,
            ).flatten(1)
            largest = torch.maximum(largest, found.max())
            if mean is not None:
                mean += found.sum(0) / len(target)
            else:
                assert samples is not None
                samples[part].copy_(found)
        self.passes += 1
        if not torch.isfinite(largest):
            raise NumericsError(f"{self.label}: the perturbation Hessian is {float(largest)}: check the images and the weights.")
        if not largest > 0:
            self._fall_back("the perturbation Hessian is zero")
            return
        self.weights = samples
