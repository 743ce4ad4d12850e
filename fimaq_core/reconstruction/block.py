"""Optimising one block: rounding of weights and scales of activations (AdaRound, QDrop, BRECQ schedule)."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from fimaq_core.chain import Segment
from fimaq_core.errors import NumericsError
from fimaq_core.layers import QuantMatMul, quant_layers, set_quantized
from fimaq_core.layers.layers import decide_rounding
from fimaq_core.quantizers.affine import AffineQuantizer, bernoulli_mask
from fimaq_core.quantizers.rounding import RoundingProblem, rounding_penalty
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.tape import Tape


def block_generator(seed: int, label: str, device: torch.device) -> torch.Generator:
    """Random generator of one block: a function of seed and name only, so that resuming needs no saved state."""
    digest = hashlib.sha256(f"{seed}/{label}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def input_quantizers(segment: Segment) -> list[AffineQuantizer]:
    """The active activation quantizers of a segment's block."""
    found: list[AffineQuantizer] = []
    for _, layer in quant_layers(segment.block):
        if isinstance(layer, QuantMatMul):
            found += [layer.a_quantizer, layer.b_quantizer]
        else:
            found.append(layer.input_quantizer)
    return [quantizer for quantizer in found if not quantizer.off]


class BlockTrainer:
    """State of one block's optimisation; :meth:`step` is the whole step.

    Args:
        segment: whose block is optimised.
        tape: at that block, target computed.
        objective: makes the loss.
        recipe: schedule and rates.
        generator: source of batches, input mixing and dropping.
    """

    def __init__(
        self, segment: Segment, tape: Tape, objective: BlockObjective, recipe: Recipe, generator: torch.Generator
    ) -> None:
        self.segment, self.tape, self.objective, self.recipe, self.generator = segment, tape, objective, recipe, generator
        self.device = tape.storage.device
        set_quantized(segment.block, True)
        self.layers = [
            layer
            for _, layer in quant_layers(segment.block)
            if not isinstance(layer, QuantMatMul) and not layer.weight_quantizer.off
        ]
        self.rounding: RoundingProblem | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        if self.layers:
            self.rounding = RoundingProblem.build(
                [layer.weight for layer in self.layers],
                [layer.weight_quantizer.scale for layer in self.layers],
                [layer.weight_quantizer.zero_point for layer in self.layers],
                [layer.weight_quantizer.levels for layer in self.layers],
            )
            self.optimizers.append(torch.optim.Adam([self.rounding.alpha], lr=recipe.lr_alpha, fused=True))
        self.activations = input_quantizers(segment)
        scales: list[Tensor] = []
        for quantizer in self.activations:
            quantizer.training_scale = True
            quantizer.keep_probability = recipe.activation_prob
            quantizer.generator = generator
            if recipe.learn_scales:
                scales.append(quantizer.scale.requires_grad_(True))
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        if scales:
            adam = torch.optim.Adam(scales, lr=recipe.lr_scale, fused=True)
            self.optimizers.append(adam)
            self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=recipe.steps)

    def step(self, number: int) -> Tensor:
        """Do step ``number`` (from 0) and return its loss (a detached scalar on the device)."""
        recipe = self.recipe
        if self.rounding is not None:
            soft, h = self.rounding.soft()
            for layer, weight in zip(self.layers, soft, strict=True):
                layer.weight_override = weight
        self.before_step(number)
        samples = self._samples()
        output = self.segment.block(self._inputs(samples))
        assert self.tape.target is not None
        loss = self.objective(output, self._gather(self.tape.target, samples), samples)
        total = loss
        beta = self.beta(number)
        if self.rounding is not None and beta is not None:
            total = loss + recipe.round_weight * rounding_penalty(h, beta)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.detach()

    def before_step(self, number: int) -> None:
        """Take a Fisher pass where one is due; dropping stays active unless the recipe says otherwise."""
        for quantizer in self.activations:
            quantizer.keep_probability = self.recipe.activation_prob if self.recipe.fisher_drop else 1.0
        self.objective.before_step(number)
        for quantizer in self.activations:
            quantizer.keep_probability = self.recipe.activation_prob

    def beta(self, number: int) -> float | None:
        """Exponent of the rounding regulariser at step ``number`` (from 0), None while it is off."""
        count, steps = number + 1, self.recipe.steps
        warmup = self.recipe.round_warmup * steps
        if count < warmup or self.recipe.round_weight == 0:
            return None
        left = 1 - (count - warmup) / (steps - warmup)
        return self.recipe.beta_end + (self.recipe.beta_start - self.recipe.beta_end) * max(0.0, left)

    def _samples(self) -> Tensor:
        count = self.tape.full.shape[0]
        order = torch.randperm(count, generator=self.generator, device=self.device)
        return order[: min(self.recipe.batch_size, count)]

    def _gather(self, cache: Tensor, samples: Tensor) -> Tensor:
        return cache[samples.to(cache.device)].to(self.device, non_blocking=True)

    def _inputs(self, samples: Tensor) -> Tensor:
        probability, prefix = self.recipe.prefix_prob, self.tape.prefix
        if prefix is None or probability == 0 or prefix is self.tape.full:
            return self._gather(self.tape.full, samples)
        quantized = self._gather(prefix, samples)
        mask = bernoulli_mask(quantized, probability, self.generator)
        if mask is None:
            return quantized
        return torch.lerp(self._gather(self.tape.full, samples), quantized, mask)

    def finish(self) -> None:
        """Decide the rounding, fold it into the layers' codes and leave training."""
        if self.rounding is not None:
            for layer, codes in zip(self.layers, self.rounding.codes(), strict=True):
                layer.weight_override = None
                layer.weight_quantizer.set_codes(codes)
        for quantizer in self.activations:
            quantizer.training_scale = False
            quantizer.keep_probability = 1.0
            quantizer.generator = None
            quantizer.set_range(quantizer.scale, quantizer.zero_point)
            if not bool(torch.isfinite(quantizer.scale).all()) or bool((quantizer.scale <= 0).any()):
                raise NumericsError(
                    f"{self.segment.label}: a learned activation scale is not positive: lower lr_scale "
                    f"(now {self.recipe.lr_scale})."
                )


def optimise_block(
    segment: Segment,
    tape: Tape,
    objective: BlockObjective,
    recipe: Recipe,
    generator: torch.Generator,
    tick: Callable[[int, Tensor], None],
) -> Tensor:
    """Optimise the block of ``segment`` in place and return its last loss (a detached scalar).

    Args:
        tick: called after every step with its number (from 1) and its loss, still on the device.

    Raises:
        NumericsError: the loss became NaN or infinite.
    """
    trainer = BlockTrainer(segment, tape, objective, recipe, generator)
    loss = torch.zeros(())
    for number in range(recipe.steps):
        loss = trainer.step(number)
        tick(number + 1, loss)
    if not bool(torch.isfinite(loss)):
        raise NumericsError(f"{segment.label}: the reconstruction loss is {float(loss)}; lower the learning rates.")
    trainer.finish()
    for _, layer in quant_layers(segment.block):
        if not isinstance(layer, QuantMatMul):
            decide_rounding(layer)
    return loss
