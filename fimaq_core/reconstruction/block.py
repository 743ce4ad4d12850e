"""Optimising one block: rounding of weights and scales of activations (AdaRound, QDrop, BRECQ)."""

from collections.abc import Callable

import torch
from torch import Tensor

from fimaq_core.chain import Segment
from fimaq_core.errors import NumericsError
from fimaq_core.layers import decide_roundings, set_quantized
from fimaq_core.numerics import tf32_allowed
from fimaq_core.quantizers.dropping import draw_keys
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.engines import STEPS, Engine
from fimaq_core.reconstruction.objective import Objective
from fimaq_core.reconstruction.schedule import Schedule, block_generator
from fimaq_core.reconstruction.state import BlockState, run_block
from fimaq_core.reconstruction.tape import Tape


class BlockTrainer:
    """One block's optimisation: :meth:`step` for every step in order, then :meth:`finish`.

    Args:
        tape: at that block, target computed.
        seed: of batches, input mixing and dropping, together with the block's label.
        on_pass: called before (True) and after (False) each Fisher pass, with the steps done.
    """

    def __init__(
        self,
        segment: Segment,
        tape: Tape,
        objective: Objective,
        recipe: Recipe,
        seed: int,
        engine: Engine = "fused",
        on_pass: Callable[[bool, int], None] = lambda begins, number: None,
    ) -> None:
        self.segment, self.objective, self.recipe, self.engine = segment, objective, recipe, engine
        self._on_pass = on_pass
        set_quantized(segment.block, True)
        self.state = BlockState(segment, recipe.learn_scales)  # the variables
        generator, streams = block_generator(seed, segment.label), self.state.layout.streams
        #: tables of the steps
        self.schedule = Schedule.build(
            recipe, len(tape.full), streams, generator, tape.storage.device, tape.full.varying
        )
        self._pass_generator = block_generator(seed, f"{segment.label}/fisher")
        self.state.attach(STEPS[engine].form, recipe.activation_prob)
        self._step = STEPS[engine](segment, self.state, tape, objective, recipe, self.schedule)

    def step(self, number: int) -> Tensor:
        """Do step ``number`` (from 0); return its loss, a scalar that later steps may overwrite."""
        if number in self.objective.update_steps:
            self._on_pass(True, number)
            self._fisher_pass()
            self._on_pass(False, number)
        with tf32_allowed(self.recipe.step_dtype == "tf32"):
            return self._step.run(number)

    def _fisher_pass(self) -> None:
        """A Fisher pass; dropping stays active unless the recipe says otherwise."""
        state, probability = self.state, self.recipe.activation_prob
        self._step.finish()
        state.attach("fused", probability if self.recipe.fisher_drop else 1.0)

        def forward(x: Tensor) -> Tensor:
            keys = draw_keys(state.layout.streams, self._pass_generator).to(x.device)
            return run_block(
                self.segment.block,
                state.layout,
                state.soft.detach(),
                state.scales.detach(),
                keys,
                x,
            )

        self.objective.update(forward)
        state.attach(self._step.form, probability)

    def finish(self) -> int:
        """Decide the rounding, fold it into the codes and leave training.

        Returns the number of learned activation scales that ended at or near their lower bound.

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
    segment: Segment,
    tape: Tape,
    objective: Objective,
    recipe: Recipe,
    engine: Engine,
    on_pass: Callable[[bool, int], None],
    tick: Callable[[int, Tensor], None],
) -> tuple[Tensor, int]:
    """Optimise the block of ``segment`` in place.

    ``tick`` is called after every step with its number (from 1) and its loss, still on the device,
    and refuses one that is not finite.

    Returns:
        The last loss (a scalar), and the number of learned scales at or near their lower bound.
    """
    trainer = BlockTrainer(segment, tape, objective, recipe, recipe.seed, engine, on_pass)
    loss = torch.zeros(())
    for number in range(recipe.steps):
        loss = trainer.step(number)
        tick(number + 1, loss)
    loss = loss.clone()
    near_floor = trainer.finish()
    decide_roundings(segment.block)
    return loss, near_floor
