"""The step by its definition: plain operations, autograd, PyTorch's optimizers.

This step is slow; the fast steps must agree with it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fimaq_core.numerics import autocast
from fimaq_core.quantizers.dropping import eager_mask
from fimaq_core.quantizers.rounding import rounding_penalty, split_as
from fimaq_core.reconstruction.loss import Batch, LossState, block_loss, prediction_loss
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.sample_objective import SampleObjective
from fimaq_core.reconstruction.schedule import regulariser_exponent
from fimaq_core.reconstruction.step import StepEngine


class TextbookStep(StepEngine):
    """The step with one tensor of variables per layer and one tensor of scales per quantizer."""

    form = "textbook"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        state, recipe, problem = self.state, self.recipe, self.state.rounding
        found = [] if problem is None else problem.split(problem.vectors[0])
        #: variables of the weights: α of the rounding, or the weights
        self.variables = [variable.clone().requires_grad_(True) for variable in found]
        self.straight_through = recipe.weight_learning == "straight-through"
        shapes = [quantizer.scale.shape for quantizer in state.quantizers]
        scales, self.floors = split_as(state.scales, shapes), split_as(state.floor, shapes)
        self.scales = [scale.clone().requires_grad_(state.learn_scales) for scale in scales]
        self.optimizers: list[torch.optim.Optimizer] = []
        falling = []  # optimizers whose rate falls by a cosine to 0
        if self.variables:
            lr = recipe.lr_weight if self.straight_through else recipe.lr_alpha
            self.optimizers.append(torch.optim.Adam(self.variables, lr=lr))
            falling += self.optimizers if self.straight_through else []
        if state.learn_scales:
            self.optimizers.append(torch.optim.Adam(self.scales, lr=recipe.lr_scale))
            falling.append(self.optimizers[-1])
        self.schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingLR(one, T_max=recipe.steps) for one in falling
        ]

    def run(self, number: int) -> Tensor:
        objective, recipe, weights = self.objective, self.recipe, self.objective.part_weights()
        roundings: list[Tensor] = []
        if not self.straight_through:
            alphas = self.variables
            roundings = [(1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1) for alpha in alphas]
        keys = self.schedule.keys[number]
        batch, state = self._batch(self.schedule.samples[number])
        tensors, x = self._tensors(roundings, keys), self._input(batch, keys)
        with autocast(recipe.step_dtype, self.state.soft.device):
            output = functional_call(self.segment.block, tensors, (x,))
        output, rest, kind = output.float(), objective.rest, objective.kind
        if rest is None:
            loss, starts = block_loss(kind, weights, output, batch, state)
        else:
            behind = state.starts, rest, objective.divergence
            loss, starts = prediction_loss(kind, weights, output, batch, *behind)
        state.starts.copy_(starts)
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
        for scheduler in self.schedulers:
            scheduler.step()
        with torch.no_grad():
            for scale, floor in zip(self.scales, self.floors, strict=True):
                scale.clamp_(min=floor)
        return loss.detach()

    def _tensors(self, roundings: list[Tensor], keys: Tensor) -> dict[str, Tensor]:
        layout = self.state.layout
        found = {name: keys[number + 1] for number, name in enumerate(layout.keys)}
        found |= {name: scale for (name, _), scale in zip(layout.scales, self.scales, strict=True)}
        learned = self.variables if self.straight_through else roundings
        weights = zip(layout.weights, self.state.layers, learned, strict=True)
        for (name, shape), layer, variable in weights:
            scale, zero = layer.weight_quantizer.scale, layer.weight_quantizer.zero_point
            if self.straight_through:
                ratio = variable.flatten(1) / scale
                codes = ratio + (torch.round(ratio) - ratio).detach()
            else:
                codes = torch.floor(layer.weight.flatten(1) / scale) + variable.flatten(1)
            codes = (codes + zero).clamp(0, layer.weight_quantizer.levels - 1)
            found[name] = (scale * (codes - zero)).view(shape)
        return found

    def _batch(self, samples: Tensor) -> tuple[Batch, LossState]:
        """Return the batch of ``samples`` (B,), and the state of the loss."""
        objective = self.objective
        if isinstance(objective, SampleObjective):
            return objective.sample(int(samples[0]), self.reads_prefix)
        assert isinstance(objective, BlockObjective)
        data = objective.batch(self.reads_prefix)
        chosen, device = samples.to(data.full.device), self.state.soft.device
        return data.map(lambda part: part[chosen.to(part.device)].to(device)), objective.state

    def _input(self, batch: Batch, keys: Tensor) -> Tensor:
        """Return the block's input (B, ...), or (2B, ...) with the unmixed inputs behind it."""
        unmixed = batch.full if batch.prefix is None else batch.prefix
        x = unmixed
        if batch.prefix is not None and self.mix < 256:
            mask = eager_mask(batch.full, keys[0], self.mix, torch.bool)
            x = torch.where(mask, batch.prefix, batch.full)
        return torch.cat([x, unmixed]) if self.objective.kind == "prediction_pdquant" else x

    def finish(self) -> None:
        state, problem = self.state, self.state.rounding
        if problem is not None:
            values = [variable.detach().flatten() for variable in self.variables]
            problem.vectors[0].copy_(torch.cat(values))
            state.soft = problem.soft()
        if self.scales:
            state.scales = torch.cat([scale.detach().flatten() for scale in self.scales])
