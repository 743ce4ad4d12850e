"""The objective of one block: the tensors that the loss needs, and the passes that make them."""

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
from fimaq_core.recipe import UNDIVIDED, Recipe
from fimaq_core.reconstruction.loss import Batch, LossState
from fimaq_core.reconstruction.tape import Collected, Tape, mean_of
from fimaq_core.samples import Samples
from fimaq_core.settings import THROUGH_REST

logger = logging.getLogger(__name__)

DPLR = ("fisher_lr", "fisher_diag", "fisher_dplr")
PERTURB = ("perturb", "perturb_mean")
#: Losses that take Fisher passes through the quantized block during the optimisation.
UPDATED = (*DPLR, "least_squares")
#: Losses with a weight for each squared error.
DIAGONAL = ("fisher_brecq", "fisher_diag", "fisher_dplr", "least_squares", *PERTURB)


class Objective:
    """Base of a block's objectives, for samples of equal and of varying shapes.

    The head's loss is ``KL(softmax(fp) || softmax(q))``, not divided; for losses with a
    perturbation Hessian it is twice the KL over its start value, as in APHQ-ViT's code. PD-Quant's
    loss has no other one for the head. A neck's loss is the squared error. GLF-Q's loss ends at the
    penultimate feature, so the loss of a projection behind it is the squared error too. Each part
    of every other loss, except :data:`fimaq_core.recipe.UNDIVIDED`, is divided by its start value,
    from the first step or from the first one after the last Fisher pass. Fisher losses have the
    weight 2. ``loss_start`` of the recipe gives all losses, the head's too, another start value.

    Args:
        tape: the chain's tape at the block, the target computed.
        reference: (n, ...) rows with which the divergence compares the model's outputs; for
            ``glf`` the full-precision model's penultimate features.
        notes: list that receives a sentence about each deviation from the recipe.

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
        self.tape, self.recipe, self.reference = tape, recipe, Samples.of(reference)
        self.divergence, self.notes = divergence, notes
        segment = chain.segment(tape.index)
        self.label, self.kind = segment.label, recipe.loss  # kind: name of the loss
        if segment.kind == "head" and recipe.loss != "prediction_pdquant":
            relative = recipe.loss in PERTURB or recipe.loss_start is not None
            self.kind = "head_relative" if relative else "head"
        elif segment.kind == "neck" or (recipe.loss == "glf" and tape.index >= chain.feature_end):
            self.kind = "mse"
        #: (n, N) weights of each sample's errors, where the tape lies; None if the loss has none
        self.weights: Samples | None = None
        self.passes = 0  # number of Fisher passes done
        self.update_steps = self._fisher_steps()  # steps (from 0) before which a Fisher pass runs
        #: tensors that the loss needs in addition to the batch
        starts = torch.zeros(len(self.part_weights()), device=tape.storage.device)
        self.state = LossState(starts + float(self.kind in UNDIVIDED))
        self._make_room()
        if self.kind == "fisher_brecq":
            self._squared_gradient_pass()
        if self.kind in PERTURB:
            self._perturbation_pass()

    @property
    def target(self) -> Samples:
        """Full-precision outputs of the block, (n, ...)."""
        assert self.tape.target is not None
        return self.tape.target

    def part_weights(self) -> tuple[float, ...]:
        """Return the weight of each part of the loss."""
        recipe = self.recipe
        weights: tuple[float, ...] = (1.0,)
        if self.kind == "mse_adalog":
            return (0.1,)
        if self.kind == "prediction_pdquant":
            return 1.0, 1 / recipe.prediction_lambda
        if self.kind == "fisher_dplr":
            weights = recipe.fisher_p1, recipe.fisher_p2
        elif self.kind == "prediction":
            weights = 1 - recipe.prediction_share, recipe.prediction_share
        elif self.kind == "glf":
            weights = recipe.glf_weight, 1.0
        elif self.kind in (*UPDATED, *PERTURB, "head_relative"):
            weights = (2.0,)
        if recipe.loss_start is None:
            return weights
        return tuple(weight * recipe.loss_start / sum(weights) for weight in weights)

    @property
    def rest(self) -> Callable[[Tensor, Tensor | None, Kept], Tensor] | None:
        """The full-precision model behind the block, if the loss needs it.

        It ends at the output, or for ``glf`` at the penultimate feature.
        """
        if self.kind not in THROUGH_REST:
            return None
        return partial(self.tape.teacher.rest, self.tape.index, feature=self.kind == "glf")

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Take a Fisher pass. ``forward`` runs the block on a batch with its current variables."""
        raise NotImplementedError

    def mean_weight(self) -> float | None:
        """Return the mean of the loss's diagonal Fisher weight; None if the loss has none."""
        raise NotImplementedError

    def _make_room(self) -> None:
        """Make the tensors that the passes fill."""
        raise NotImplementedError

    def _weight(self, rows: slice, values: Tensor, squared: bool) -> Tensor | None:
        """Return the weights (B, N) of a batch from a pass's ``values`` at the block's outputs.

        ``values`` are gradients (``squared``) or Hessians; None means that their mean is kept.
        """
        raise NotImplementedError

    def _sweep(self, beside: Beside) -> Sweep:
        """Return a sweep in the batches of the divergence, if it has some, or of the tape."""
        tape, divergence = self.tape, self.divergence
        size, dtype = divergence.batch or tape.batch_size, self.recipe.frozen_dtype
        place = tape.storage.device, size, dtype, beside
        return Sweep(tape.teacher, tape.index, self.reference, divergence, *place)

    def _squared_gradient_pass(self) -> None:
        """Take BRECQ's pass: the prefix is quantized, block and rest are in full precision."""
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
        # If nothing before the block is quantized, the gradient is only rounding.
        if tape.index == 0 or not any(bool(one.abs().max() > 0) for one in self.weights.tensors):
            self._fall_back("the gradient is zero (nothing before it is quantized)")

    def _perturbation_pass(self) -> None:
        """Take APHQ-ViT's pass in full precision: one Hessian per sample, or their mean."""
        tape, found = self.tape, Collected(self.tape.storage, self.target)
        largest = torch.zeros((), device=tape.storage.device)
        sweep = self._sweep(tape.beside)
        for rows, hessian in sweep.hessians(self.target, self.recipe.perturbation):
            largest = torch.maximum(largest, hessian.max())
            weight = self._weight(rows, hessian, squared=False)
            if weight is not None:
                found.put(rows, weight)
        self.passes += 1
        if not torch.isfinite(largest):
            raise NumericsError(
                f"{self.label}: the perturbation Hessian is {float(largest)}: "
                "check the images and the weights."
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

    def _note_damping(self, images: str = "") -> None:
        passes = f"{self.passes} Fisher passes"
        self._note(f"{self.label}: D Dᵀ of {passes} was near singular{images} and has been damped")

    def _note(self, sentence: str) -> None:
        logger.warning(sentence)
        self.notes.append(sentence)


class BlockObjective(Objective):
    """Objective of a block whose samples have equal shapes.

    All state is in tensors of fixed shape that change in place, so a compiled or captured step sees
    the changes. Only a Fisher pass reads a number back from the device.
    """

    def _make_room(self) -> None:
        device, size, kind = self.tape.storage.device, self.target[0].numel(), self.kind
        k = self.recipe.fisher_k if kind in DPLR else 1
        diagonal = kind in (*UPDATED, "perturb_mean")
        self._errors: list[Tensor] = []
        self.state = LossState(
            self.state.starts,
            gradients=torch.zeros(k, size, device=device) if kind in UPDATED else None,
            diagonal=torch.zeros(size, device=device) if diagonal else None,
            root=torch.zeros(k, k, device=device) if kind in DPLR else None,
        )

    def _weight(self, rows: slice, values: Tensor, squared: bool) -> Tensor | None:
        if self.kind != "perturb_mean":
            return values.flatten(1)
        assert self.state.diagonal is not None
        self.state.diagonal.add_(values.flatten(1).sum(0) / len(self.target))
        return None

    def batch(self, mixed: bool) -> Batch:
        """Return the tensors that the steps read, of all samples; ``mixed`` adds the prefix."""
        tape = self.tape
        prefix = tape.prefix.whole if mixed and tape.prefix is not None else None
        weights = None if self.weights is None else self.weights.whole
        batch = Batch(tape.full.whole, prefix, self.target.whole, weights)
        if self.rest is None:
            return batch
        side, kept = tape.beside.rows(slice(None))
        return batch._replace(reference=self.reference.whole, side=side, kept=kept)

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
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
                self._note_damping()

    def mean_weight(self) -> float | None:
        """Return the mean of squared or absolute gradients, or of a Hessian, if there are any."""
        if self.weights is not None:
            return mean_of(self.weights, self.tape.batch_size, squared=self.kind == "fisher_brecq")
        diagonal = self.state.diagonal
        if diagonal is None or self.kind not in DIAGONAL:
            return None
        return float(diagonal.mean(dtype=torch.float64))
