"""The objective of one block: its loss over a step's batch, each part over its own start value."""

import logging

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

    Args:
        chain, tape: the model and its tape at the block; ``tape.target`` must be computed.
        recipe: loss and its settings.
        reference: (n, ...) full-precision outputs of the whole model.
        divergence: of the task.
        notes: receives sentences about anything that did not go as the recipe says.
    """

    def __init__(
        self, chain: BlockChain, tape: Tape, recipe: Recipe, reference: Tensor, divergence: Divergence, notes: list[str]
    ) -> None:
        self.chain, self.tape, self.recipe = chain, tape, recipe
        self.reference, self.divergence, self.notes = reference, divergence, notes
        self.label = chain.segment(tape.index).label
        self.kind = "head" if chain.segment(tape.index).kind == "head" else recipe.loss
        self.starts: dict[str, Tensor] = {}
        self.passes = 0
        self._gradients: Tensor | None = None
        self._errors: Tensor | None = None
        self._inverse: Tensor | None = None
        self._update_steps = self._fisher_steps()
        if self.kind == "fisher_brecq":
            self._squared_gradient_pass()

    def _fisher_steps(self) -> frozenset[int]:
        """Steps (from 0) before which a Fisher pass runs."""
        if self.kind not in _DPLR:
            return frozenset()
        k, steps = self.recipe.fisher_k, self.recipe.steps
        if self.recipe.fisher_mode == "qf":
            return frozenset(range(min(k, steps)))
        return frozenset(i * steps // k for i in range(k))

    def before_step(self, step: int) -> None:
        """Take a Fisher pass if one is due before ``step`` (counted from 0)."""
        if step not in self._update_steps:
            return
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
        )
        self.passes += 1
        rows = [gradient[None]] if self._gradients is None else [self._gradients, gradient[None]]
        self._gradients = torch.cat(rows)
        rows = [error[None]] if self._errors is None else [self._errors, error[None]]
        self._errors = torch.cat(rows)
        if self.kind == "fisher_dplr":
            self._inverse, damped = losses.inverse_gram(self._errors)
            if damped:
                self._note(f"{self.label}: D Dᵀ of {self.passes} Fisher passes was near singular and has been damped")
        self.starts.clear()

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
        self._gradients = gradients

    def __call__(self, output: Tensor, target: Tensor, samples: Tensor) -> Tensor:
        """Loss of a batch, a scalar.

        Args:
            output: (B, ...) the block's output with gradients.
            target: (B, ...) its full-precision output.
            samples: (B,) their numbers among the calibration images.
        """
        if self.kind == "head":
            return kl_divergence(output, target)
        delta = (output - target).flatten(1)
        if self.kind in losses.PLAIN:
            return self._over_start(self.kind, losses.PLAIN[self.kind](delta))
        gradients = self._gradients
        assert gradients is not None
        if self.kind == "fisher_brecq":
            own = gradients[samples.to(gradients.device)].to(delta.device)
            return self._over_start("brecq", losses.squared_gradient_loss(delta, own))
        if self.kind == "fisher_diag":
            return 2 * self._over_start("diag", losses.diagonal_loss(delta, gradients))
        if self.kind == "fisher_lr":
            return 2 * self._over_start("lr", losses.rank_one_loss(delta, gradients))
        assert self._inverse is not None
        low_rank = self._over_start("lr", losses.low_rank_loss(delta, gradients, self._inverse))
        diagonal = self._over_start("diag", losses.diagonal_loss(delta, gradients))
        return self.recipe.fisher_p1 * low_rank + self.recipe.fisher_p2 * diagonal

    def _over_start(self, name: str, loss: Tensor) -> Tensor:
        if name not in self.starts:
            # A start of exactly zero (a block where nothing is quantized) must not turn into NaN.
            start = loss.detach()
            self.starts[name] = torch.where(start > 0, start, torch.ones_like(start))
        return loss / self.starts[name]

    def _note(self, sentence: str) -> None:
        logger.warning(sentence)
        self.notes.append(sentence)
