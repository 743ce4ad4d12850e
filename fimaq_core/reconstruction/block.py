"""Optimisation of one block: weights and activation scales (AdaRound, BRECQ, QDrop, GLF-Q)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from fimaq_core.chain import Segment
from fimaq_core.errors import NumericsError
from fimaq_core.layers import decide_roundings, set_quantized
from fimaq_core.numerics import tf32_allowed
from fimaq_core.progress import Tick
from fimaq_core.quantizers.dropping import draw_keys
from fimaq_core.reconstruction.engines import STEPS
from fimaq_core.reconstruction.objective import Objective
from fimaq_core.reconstruction.schedule import Schedule, block_generator
from fimaq_core.reconstruction.starts import round_block
from fimaq_core.reconstruction.state import BlockState
from fimaq_core.resources import Engine

#: Called before (True) and after (False) each Fisher pass, with the number of steps done.
OnPass = Callable[[bool, int], None]


class BlockTrainer:
    """Optimisation of one block: call :meth:`step` for all steps in order, then :meth:`finish`.

    The target of the objective's tape must be computed before. The recipe's seed and the block's
    label determine batches, input mixing and dropping.

    Example::

        trainer = BlockTrainer(segment, objective, "fused")
        losses = [float(trainer.step(number)) for number in range(recipe.steps)]
        trainer.finish()
    """

    def __init__(
        self,
        segment: Segment,
        objective: Objective,
        engine: Engine = "fused",
        on_pass: OnPass = lambda begins, number: None,
    ) -> None:
        self.segment, self.objective, self.engine = segment, objective, engine
        self.recipe, self._on_pass = objective.recipe, on_pass
        set_quantized(segment.block, True)
        learning, starts = self.recipe.weight_learning, None
        if self.recipe.start != "nearest":
            starts = round_block(objective.tape, self.recipe, notes=objective.notes)
        self.state = BlockState(  # the variables
            segment,
            self.recipe.learn_scales,
            straight_through=learning == "straight-through",
            starts=starts,
        )
        seed, streams = self.recipe.seed, self.state.layout.streams
        self.schedule = Schedule.build(
            self.recipe, objective.tape.full, streams, block_generator(seed, segment.label)
        ).to(objective.tape.storage.device)
        self._pass_generator = block_generator(seed, f"{segment.label}/fisher")
        self.state.attach(STEPS[engine].form, self.recipe.activation_prob)
        self._step = STEPS[engine](segment, self.state, objective, self.schedule)

    def step(self, number: int) -> Tensor:
        """Do step ``number`` (from 0); return its loss, a scalar that later steps may overwrite."""
        if number in self.objective.update_steps:
            self._on_pass(True, number)
            self._fisher_pass()
            self._on_pass(False, number)
        with tf32_allowed(self.recipe.step_dtype == "tf32"):
            return self._step.run(number)

    def _fisher_pass(self) -> None:
        """Take a Fisher pass, with random dropping if the recipe says so."""
        state, probability = self.state, self.recipe.activation_prob
        self._step.finish()
        state.attach("fused", probability if self.recipe.fisher_drop else 1.0)
        soft, scales = state.soft.detach(), state.scales.detach()

        def forward(x: Tensor) -> Tensor:
            keys = draw_keys(state.layout.streams, self._pass_generator).to(x.device)
            tensors = state.layout.tensors(soft, scales, keys)
            return functional_call(self.segment.block, tensors, (x,))  # type: ignore[no-any-return]

        self.objective.update(forward)
        state.attach(self._step.form, probability)

    def finish(self) -> int:
        """Decide the roundings, write the codes and end the optimisation.

        Returns:
            The number of learned activation scales that ended at or near their lower bound.

        Raises:
            NumericsError: a scale is NaN or infinite.
        """
        self._step.finish()
        state = self.state
        if state.rounding is not None:
            for layer, codes in zip(state.layers, state.rounding.codes(), strict=True):
                layer.weight_quantizer.set_codes(codes)
        state.detach()
        if not bool(torch.isfinite(state.scales).all()):
            raise NumericsError(
                f"{self.segment.label}: a learned activation scale is NaN or infinite: "
                f"lower lr_scale (now {self.recipe.lr_scale})."
            )
        return state.scales_near_floor()


def optimise_block(
    segment: Segment, objective: Objective, engine: Engine, on_pass: OnPass, tick: Tick
) -> tuple[Tensor, int]:
    """Optimise the block of ``segment`` in place; see :class:`BlockTrainer` for the arguments.

    Returns:
        The last loss (a scalar), and the number of learned scales at or near their lower bound.
    """
    trainer = BlockTrainer(segment, objective, engine, on_pass)
    loss = torch.zeros(())
    for number in range(objective.recipe.steps):
        loss = trainer.step(number)
        tick(number + 1, loss)
    loss = loss.clone()
    near_floor = trainer.finish()
    decide_roundings(segment.block)
    return loss, near_floor
