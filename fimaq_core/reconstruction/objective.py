"""The objective of one block: its loss over a step's batch, each part over its own start value."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from fimaq_core.chain import BlockChain
from fimaq_core.fisher import losses
from fimaq_core.fisher.divergence import Divergence, kl_divergence
from fimaq_core.fisher.passes import mean_gradient_and_error, output_gradients
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.tape import Tape

logger = logging.getLogger(__name__)

_DPLR = ("fisher_lr", "fisher_diag", "fisher_dplr")


class BlockObjective:
    """Loss of the present block of a tape.

    The head's loss is ``KL(softmax(fp) || softmax(q))``, never divided. Every other loss (each part of it) is divided by
    its value at the first step, or at the first step after the last Fisher pass; Fisher losses start at 2, others at 1.

    All its state is in tensors of fixed shape that are changed in place, so that a compiled or captured step sees the
    changes; nothing here reads a number back from the device but a Fisher pass.

    Args:
        chain, tape: the model and its tape at the block; ``tape.target`` must be computed.
        recipe: loss and its settings.
        reference: (n, ...) full-precision outputs of the whole model.
        divergence: of the task.
        notes: receives sentences about anything that did not go as the recipe says.

    Attributes:
        starts: (parts,) values that the parts of the loss are divided by; 0 where none has been taken yet.
        gradients: (k, N) mean absolute gradients, zero rows for passes to come; None for losses without.
        mean_gradient: (N,) their mean over the passes done.
        root: (k, k) root of (D Dᵀ)⁻¹, zero for passes to come.
        sample_gradients: (n, N) one gradient a sample, where the tape lies (``fisher_brecq``).
        passes: Fisher passes done.
    """

    def __init__(
        self, chain: BlockChain, tape: Tape, recipe: Recipe, reference: Tensor, divergence: Divergence, notes: list[str]
    ) -> None:
        self.chain, self.tape, self.recipe = chain, tape, recipe
        self.reference, self.divergence, self.notes = reference, divergence, notes
        self.label = chain.segment(tape.index).label
        self.kind = "head" if chain.segment(tape.index).kind == "head" else recipe.loss
        self.passes = 0
        self._errors: list[Tensor] = []
        self._update_steps = self._fisher_steps()
        device, k = tape.storage.device, recipe.fisher_k
        assert tape.target is not None
        self.gradients: Tensor | None = None
        self.mean_gradient: Tensor | None = None
        self.root: Tensor | None = None
        self.sample_gradients: Tensor | None = None
        if self.kind in _DPLR:
            self.gradients = torch.zeros(k, tape.target[0].numel(), device=device)
            self.mean_gradient = torch.zeros_like(self.gradients[0])
            self.root = torch.zeros(k, k, device=device)
        if self.kind == "fisher_brecq":
            self._squared_gradient_pass()
        self.starts = torch.zeros(len(self.part_weights()), device=device)

    def part_weights(self) -> tuple[float, ...]:
        """Weight of each part of the loss."""
        if self.kind == "fisher_dplr":
            return self.recipe.fisher_p1, self.recipe.fisher_p2
        return (2.0,) if self.kind in _DPLR else (1.0,)

    def _fisher_steps(self) -> frozenset[int]:
        """Steps (from 0) before which a Fisher pass runs."""
        if self.kind not in _DPLR:
            return frozenset()
        k, steps = self.recipe.fisher_k, self.recipe.steps
        if self.recipe.fisher_mode == "qf":
            return frozenset(range(min(k, steps)))
        return frozenset(i * steps // k for i in range(k))

    @property
    def update_steps(self) -> frozenset[int]:
        """Steps (from 0) before which a Fisher pass is due."""
        return self._update_steps

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Take a Fisher pass. ``forward`` runs the block on a batch, quantized as it is at the present step."""
        assert self.tape.target is not None
        device = self.tape.storage.device
        gradient, error = mean_gradient_and_error(
            self.chain,
            self.tape.index,
            self.tape.full,
            self.tape.target,
            self.reference,
            self.divergence,
            self.tape.batch_size,
            device,
            self.recipe.frozen_dtype,
            forward,
        )
        assert self.gradients is not None
        assert self.mean_gradient is not None
        assert self.root is not None
        self.gradients[self.passes].copy_(gradient)
        self._errors.append(error)
        self.passes += 1
        self.mean_gradient.copy_(self.gradients[: self.passes].mean(0))
        if self.kind == "fisher_dplr":
            root, damped = losses.inverse_gram_root(torch.stack(self._errors))
            self.root[: self.passes, : self.passes].copy_(root)
            if damped:
                self._note(f"{self.label}: D Dᵀ of {self.passes} Fisher passes was near singular and has been damped")
        self.starts.zero_()

    def _squared_gradient_pass(self) -> None:
        """BRECQ's pass: prefix quantized, this block and the rest in full precision, one gradient a sample."""
        tape, device = self.tape, self.tape.storage.device
        assert tape.target is not None
        prefix = tape.full if tape.prefix is None else tape.prefix
        block = self.chain.segment(tape.index).block
        set_quantized(block, False)
        gradients = tape.storage.empty((tape.full.shape[0], tape.target[0].numel()), torch.float32)
        sweep = output_gradients(
            self.chain, tape.index, prefix, self.reference, self.divergence, tape.batch_size, device, self.recipe.frozen_dtype
        )
        for part, _, gradient in sweep:
            gradients[part].copy_(gradient.flatten(1))
        set_quantized(block, True)
        self.passes += 1
        # With nothing quantized before it the gradient is zero but for rounding.
        if tape.index == 0 or not gradients.abs().max() > 0:
            self._note(f"{self.label}: the gradient is zero (nothing before it is quantized); squared error used instead")
            self.kind = "mse"
            return
        self.sample_gradients = gradients

    def _note(self, sentence: str) -> None:
        logger.warning(sentence)
        self.notes.append(sentence)


def block_loss(
    kind: str,
    weights: tuple[float, ...],
    output: Tensor,
    target: Tensor,
    starts: Tensor,
    gradients: Tensor | None = None,
    mean_gradient: Tensor | None = None,
    root: Tensor | None = None,
    sample_gradients: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of a batch (a scalar), and the starts to go on with (parts,).

    Args:
        kind: name of the loss, or ``head``.
        weights: of its parts.
        output: (B, ...) the block's output with gradients.
        target: (B, ...) its full-precision output.
        starts: (parts,) what the parts are divided by; a part whose start is 0 takes its own value for it.
        gradients, mean_gradient, root: see :class:`BlockObjective`.
        sample_gradients: (B, N) of the batch's samples.
    """
    if kind == "head":
        return kl_divergence(output, target), starts
    delta = (output - target).flatten(1)
    parts: list[Tensor]
    if kind in losses.PLAIN:
        parts = [losses.PLAIN[kind](delta)]
    elif kind == "fisher_brecq":
        assert sample_gradients is not None
        parts = [losses.squared_gradient_loss(delta, sample_gradients)]
    else:
        assert mean_gradient is not None
        parts = []
        if kind in ("fisher_dplr", "fisher_lr"):
            assert gradients is not None
            assert root is not None
            dplr = kind == "fisher_dplr"
            parts.append(losses.low_rank_loss(delta, gradients, root) if dplr else losses.rank_one_loss(delta, mean_gradient))
        if kind != "fisher_lr":
            parts.append(losses.diagonal_loss(delta, mean_gradient))
    values = torch.stack(parts)
    now = values.detach()
    # A start of exactly zero (a block where nothing is quantized) must not turn into NaN.
    new = torch.where(starts > 0, starts, torch.where(now > 0, now, torch.ones_like(now)))
    ratios = values / new
    total = ratios[0] * weights[0]
    for number in range(1, len(weights)):
        total = total + ratios[number] * weights[number]
    return total, new
