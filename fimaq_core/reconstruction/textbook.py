"""The step by its definition: plain operations, autograd, PyTorch's optimizers. Slow, and what the fast ones must equal."""

import torch
from torch import Tensor
from torch.func import functional_call

from fimaq_core.chain import Segment
from fimaq_core.numerics import autocast
from fimaq_core.quantizers.dropping import eager_mask, threshold_of
from fimaq_core.quantizers.rounding import rounding_penalty
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.loss import Batch, LossState, batch_of, block_loss, prediction_loss, unpacked
from fimaq_core.reconstruction.objective import BlockObjective, Objective
from fimaq_core.reconstruction.sample_objective import SampleObjective
from fimaq_core.reconstruction.schedule import Schedule, regulariser_exponent
from fimaq_core.reconstruction.state import BlockState
from fimaq_core.reconstruction.tape import Tape


class TextbookStep:
    """One tensor of rounding variables a layer and one of scales a quantizer, each operation on its own.

    Args:
        segment: whose block is optimised.
        state: its variables, attached.
        tape: at that block, target computed.
        objective: of the block.
        recipe: rates and probabilities.
        schedule: tables of the steps (batches and masks are taken from it).
    """

    def __init__(
        self, segment: Segment, state: BlockState, tape: Tape, objective: Objective, recipe: Recipe, schedule: Schedule
    ) -> None:
        self.segment, self.state, self.tape, self.objective = segment, state, tape, objective
        self.recipe, self.schedule = recipe, schedule
        self.alphas: list[Tensor] = []
        if state.rounding is not None:
            self.alphas = [alpha.clone().requires_grad_(True) for alpha in state.rounding.split(state.rounding.alpha)]
        shapes = [quantizer.scale.shape for quantizer in state.quantizers]

        def pieces(flat: Tensor) -> list[Tensor]:
            parts = torch.split(flat, [shape.numel() for shape in shapes]) if shapes else ()
            return [piece.view(shape).clone() for piece, shape in zip(parts, shapes, strict=True)]

        self.scales = [scale.requires_grad_(state.learn_scales) for scale in pieces(state.scales)]
        self.floors = pieces(state.floor)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        if self.alphas:
            self.optimizers.append(torch.optim.Adam(self.alphas, lr=recipe.lr_alpha))
        if state.learn_scales:
            self.optimizers.append(torch.optim.Adam(self.scales, lr=recipe.lr_scale))
            self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizers[-1], T_max=recipe.steps)

    def run(self, number: int) -> Tensor:
        """See :class:`fimaq_core.reconstruction.engines.StepEngine`."""
        objective, recipe = self.objective, self.recipe
        roundings = [(1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1) for alpha in self.alphas]
        keys, samples = self.schedule.keys[number], self.schedule.samples[number]
        batch, state = self._present(samples)
        with autocast(recipe.step_dtype, self.state.soft.device):
            output = functional_call(self.segment.block, self._tensors(roundings, keys), (self._input(batch, keys),))
        rest = objective.rest
        if rest is None:
            loss, starts = block_loss(objective.kind, objective.part_weights(), output.float(), batch, state)
        else:
            loss, starts = prediction_loss(
                objective.part_weights(), output.float(), batch, objective.state.starts, rest, objective.divergence
            )
        objective.state.starts.copy_(starts)
        total, beta = loss, regulariser_exponent(recipe, number)
        if beta is not None:
            for h in roundings:
                total = total + recipe.round_weight * rounding_penalty(h, beta)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.optimizers:
            total.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        with torch.no_grad():
            for scale, floor in zip(self.scales, self.floors, strict=True):
                scale.clamp_(min=floor)
        return loss.detach()

    def _tensors(self, roundings: list[Tensor], keys: Tensor) -> dict[str, Tensor]:
        layout = self.state.layout
        found = {name: keys[number + 1] for number, name in enumerate(layout.keys)}
        found |= {name: scale for (name, _), scale in zip(layout.scales, self.scales, strict=True)}
        for (name, shape), layer, h in zip(layout.weights, self.state.layers, roundings, strict=True):
            quantizer = layer.weight_quantizer
            codes = torch.floor(layer.weight.flatten(1) / quantizer.scale) + h.flatten(1) + quantizer.zero_point
            codes = codes.clamp(0, quantizer.levels - 1)
            found[name] = (quantizer.scale * (codes - quantizer.zero_point)).view(shape)
        return found

    def _present(self, samples: Tensor) -> tuple[Batch, LossState]:
        """The batch, and what its loss rests on."""
        prefix = self.tape.prefix
        mixed = prefix is not None and prefix is not self.tape.full and threshold_of(self.recipe.prefix_prob) > 0
        if isinstance(self.objective, SampleObjective):
            return self.objective.sample(int(samples[0]), mixed)
        assert isinstance(self.objective, BlockObjective)
        data = self.objective.batch(mixed)
        batch, device = batch_of(data, samples.to(data.full.device)), self.state.soft.device
        moved = [None if part is None else part.to(device) for part in (*batch[:6], *batch.kept)]
        return unpacked(moved), self.objective.state

    def _input(self, batch: Batch, keys: Tensor) -> Tensor:
        threshold = threshold_of(self.recipe.prefix_prob)
        if batch.prefix is None or threshold >= 256:
            return batch.full if batch.prefix is None else batch.prefix
        return torch.where(eager_mask(batch.full, keys[0], threshold, torch.bool), batch.prefix, batch.full)

    def finish(self) -> None:
        """See :class:`fimaq_core.reconstruction.engines.StepEngine`."""
        state, rounding = self.state, self.state.rounding
        if rounding is not None:
            rounding.alpha.copy_(torch.cat([alpha.detach().flatten() for alpha in self.alphas]))
            state.soft = rounding.soft()
        if self.scales:
            state.scales = torch.cat([scale.detach().flatten() for scale in self.scales])
