"""The objective of one block: what its loss rests on, and the passes that make it."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fimaq_core.chain import Beside, BlockChain, Kept
from fimaq_core.errors import NumericsError
from fimaq_core.fisher import losses
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.fisher.passes import Sweep, least_squares_hessian, mean_gradient_and_error
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.loss import Batch, LossState
from fimaq_core.reconstruction.tape import Collected, Tape, mean_of
from fimaq_core.samples import Samples

logger = logging.getLogger(__name__)

DPLR = ("fisher_lr", "fisher_diag", "fisher_dplr")
PERTURB = ("perturb", "perturb_mean")
#: Losses that take a pass with the block quantized while it trains.
UPDATED = (*DPLR, "least_squares")
#: Losses that weigh squared errors one by one.
DIAGONAL = ("fisher_brecq", "fisher_diag", "fisher_dplr", "least_squares", *PERTURB)


class Objective:
    """What the losses of a block have in common, whatever the samples.

    The head's loss is ``KL(softmax(fp) || softmax(q))``, not divided (with a perturbation Hessian
    twice that over its start, as APHQ-ViT's code has it); a neck's is the squared error. Each part
    of every other loss is divided by its value at the first step, or at the first step after the
    last Fisher pass; Fisher losses start at 2, others at 1.

    Args:
        tape: at the block, its target computed.
        reference: (n, ...) what the divergence compares the whole model's outputs with.
        notes: receives sentences about anything that did not go as the recipe says.

    Raises:
        NumericsError: the perturbation Hessian is NaN or infinite.
    """

    def __init__(
        self,
        chain: BlockChain,
        tape: Tape,
        recipe: Recipe,
        reference: Samples | Tensor,
        divergence: Divergence,
        notes: list[str],
    ) -> None:
        self.chain, self.tape, self.recipe = chain, tape, recipe
        self.reference, self.divergence, self.notes = Samples.of(reference), divergence, notes
        segment = chain.segment(tape.index)
        self.label, self.kind = segment.label, recipe.loss  # kind: name of the loss
        if segment.kind == "head":
            self.kind = "head_relative" if recipe.loss in PERTURB else "head"
        elif segment.kind == "neck":
            self.kind = "mse"
        #: (n, N) what weighs each sample's errors, where the tape lies; None for losses without
        self.weights: Samples | None = None
        self.passes = 0  # Fisher passes done
        self.update_steps = self._fisher_steps()  # steps (from 0) before which a Fisher pass runs
        #: what the loss rests on, whatever the batch
        self.state = LossState(torch.zeros(len(self.part_weights()), device=tape.storage.device))
        self._make_room()
        if self.kind == "fisher_brecq":
            self._squared_gradient_pass()
        if self.kind in PERTURB:
            self._perturbation_pass()

    @property
    def target(self) -> Samples:
        """Full-precision outputs of the block."""
        assert self.tape.target is not None
        return self.tape.target

    def part_weights(self) -> tuple[float, ...]:
        """Weight of each part of the loss."""
        if self.kind == "fisher_dplr":
            return self.recipe.fisher_p1, self.recipe.fisher_p2
        if self.kind == "prediction":
            return 1 - self.recipe.prediction_share, self.recipe.prediction_share
        return (2.0,) if self.kind in (*UPDATED, *PERTURB, "head_relative") else (1.0,)

    @property
    def rest(self) -> Callable[[Tensor, Tensor | None, Kept], Tensor] | None:
        """From the block's output to the model's in full precision, if the loss needs it."""
        return (
            partial(self.tape.teacher.rest, self.tape.index) if self.kind == "prediction" else None
        )

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Take a Fisher pass. ``forward`` runs the block on a batch, quantized as it is now."""
        raise NotImplementedError

    def mean_weight(self) -> float | None:
        """Mean of the diagonal Fisher weight in the loss as it is now; None for losses without."""
        raise NotImplementedError

    def _make_room(self) -> None:
        """Make what the passes fill."""
        raise NotImplementedError

    def _weight(self, rows: slice, values: Tensor, squared: bool) -> Tensor | None:
        """What a pass's values at a batch's outputs put into ``weights``, (B, N), if anything."""
        raise NotImplementedError

    def _sweep(self, beside: Beside) -> Sweep:
        """A sweep over what a batch can hold, unless the divergence says what belongs together."""
        tape, divergence = self.tape, self.divergence
        size = divergence.batch or tape.batch_size
        device, dtype = tape.storage.device, self.recipe.frozen_dtype
        return Sweep(
            tape.teacher, tape.index, self.reference, divergence, device, size, dtype, beside
        )

    def _squared_gradient_pass(self) -> None:
        """BRECQ's pass: prefix quantized, block and rest in full precision, a gradient per sample."""
        tape = self.tape
        set_quantized(tape.teacher.segment(tape.index).block, False)
        prefix = tape.full if tape.prefix is None else tape.prefix
        found = Collected(tape.storage, prefix)
        for rows, _, gradient in self._sweep(tape.beside_prefix).gradients(prefix):
            weight = self._weight(rows, gradient, squared=True)
            assert weight is not None
            found.put(rows, weight)
        self.passes += 1
        self.weights = found.samples
        # With nothing quantized before it the gradient is zero but for rounding.
        if tape.index == 0 or not any(bool(one.abs().max() > 0) for one in self.weights.tensors):
            self._fall_back("the gradient is zero (nothing before it is quantized)")

    def _perturbation_pass(self) -> None:
        """APHQ-ViT's pass, everything in full precision: a Hessian per sample, or their mean."""
        tape, target = self.tape, self.target
        found, largest = (
            Collected(tape.storage, target),
            torch.zeros((), device=tape.storage.device),
        )
        for rows, hessian in self._sweep(tape.beside).hessians(target, self.recipe.perturbation):
            largest = torch.maximum(largest, hessian.max())
            weight = self._weight(rows, hessian, squared=False)
            if weight is not None:
                found.put(rows, weight)
        self.passes += 1
        if not torch.isfinite(largest):
            raise NumericsError(
                f"{self.label}: the perturbation Hessian is {float(largest)}: check the images and the weights."
            )
        if self.kind == "perturb":
            self.weights = found.samples
        if not largest > 0:
            self._fall_back("the perturbation Hessian is zero")

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
        self.kind, self.weights = "mse", None

    def _note(self, sentence: str) -> None:
        logger.warning(sentence)
        self.notes.append(sentence)


class BlockObjective(Objective):
    """Loss of the present block of a tape whose samples have equal shapes.

    All state is in tensors of fixed shape that change in place, so a compiled or captured step sees
    the changes; only a Fisher pass reads a number back from the device.
    """

    def _make_room(self) -> None:
        device, size, k = self.tape.storage.device, self.target[0].numel(), self.recipe.fisher_k
        self._errors: list[Tensor] = []
        gradients = diagonal = root = None
        if self.kind in DPLR:
            gradients, root = torch.zeros(k, size, device=device), torch.zeros(k, k, device=device)
        if self.kind == "least_squares":
            gradients = torch.zeros(1, size, device=device)
        if self.kind in (*UPDATED, "perturb_mean"):
            diagonal = torch.zeros(size, device=device)
        self.state = LossState(self.state.starts, gradients, diagonal, root)

    def _weight(self, rows: slice, values: Tensor, squared: bool) -> Tensor | None:
        if self.kind != "perturb_mean":
            return values.flatten(1)
        assert self.state.diagonal is not None
        self.state.diagonal.add_(values.flatten(1).sum(0) / len(self.target))
        return None

    def batch(self, mixed: bool) -> Batch:
        """What the steps read, all samples; ``mixed``: with the quantized prefix."""
        tape = self.tape
        prefix = tape.prefix.whole if mixed and tape.prefix is not None else None
        weights = None if self.weights is None else self.weights.whole
        batch = Batch(tape.full.whole, prefix, self.target.whole, weights)
        if self.kind != "prediction":
            return batch
        side, kept = tape.beside.rows(slice(None))
        return batch._replace(reference=self.reference.whole, side=side, kept=kept)

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Objective`."""
        state = self.state
        assert state.gradients is not None
        assert state.diagonal is not None
        measure = least_squares_hessian if self.kind == "least_squares" else mean_gradient_and_error
        first, second = measure(self._sweep(self.tape.beside), self.tape.full, self.target, forward)
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
                self._note(
                    f"{self.label}: D Dᵀ of {self.passes} Fisher passes was near singular and has been damped"
                )

    def mean_weight(self) -> float | None:
        """See :class:`Objective`: of squared gradients, of absolute ones or of a Hessian."""
        if self.weights is not None:
            return mean_of(self.weights, self.tape.batch_size, squared=self.kind == "fisher_brecq")
        diagonal = self.state.diagonal
        return (
            None
            if diagonal is None or self.kind not in DIAGONAL
            else float(diagonal.mean(dtype=torch.float64))
        )
