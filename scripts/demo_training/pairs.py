"""Training of the classification task's demo models on the digit pairs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

from demo_training import common
from tasks.classification.demo import digits
from tasks.classification.demo.models import DEMO
from tasks.common.augment import RandomDigitWarp
from tasks.common.digits import PARTS

NAMES = DEMO.names
VERSIONS = {"timm": timm.__version__}

spec_of = DEMO.spec
weights_path = DEMO.weights_path


@dataclass(frozen=True)
class PairRecipe(common.Recipe):
    """Hyperparameters, chosen on the val part.

    Attributes:
        label_smoothing: Smoothing of the cross entropy.
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 3e-3
    label_smoothing: float = 0.05


RECIPES = dict.fromkeys(NAMES, PairRecipe())


def to_input(pixels: torch.Tensor) -> torch.Tensor:
    """Normalises float32 images in [0, 1] exactly like `digits.eval_transform`."""
    return (pixels - digits.PIXEL_MEAN) / digits.PIXEL_STD


def initialise(model: nn.Module) -> None:
    """Replaces the initial weights that suit wide models: with timm's 0.02 these narrow ones hardly start to learn."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    position = getattr(model, "pos_embed", None)
    if position is not None:
        # The label depends on which side a digit is on, so positions must be seen from the first step.
        nn.init.normal_(position, std=0.3)


def loss_of(output: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Computes the loss: the mean cross entropy of the pair, of its left digit and of its right digit.

    The digits' logits are marginals of the pair's, so the model has no further outputs; but while a model still
    confuses most pairs, a digit it does know is rewarded at once, which saves many epochs.

    Args:
        output: Logits of shape ``(b, 100)``, or one such tensor per head (the distilled model in training).
        labels: int64 of shape ``(b,)``.
        smoothing: Label smoothing.

    Returns:
        The loss, averaged over the heads.
    """
    losses: list[torch.Tensor] = []
    for logits in output if isinstance(output, tuple) else (output,):
        table = logits.unflatten(1, (10, 10))  # (b, left, right)
        losses.append(F.cross_entropy(logits, labels, label_smoothing=smoothing))
        losses.append(F.cross_entropy(table.logsumexp(2), labels // 10, label_smoothing=smoothing))
        losses.append(F.cross_entropy(table.logsumexp(1), labels % 10, label_smoothing=smoothing))
    return torch.stack(losses).mean()


@torch.inference_mode()
def measure(model: nn.Module, part: str) -> dict[str, Any]:
    """Measures top-1 accuracy.

    Args:
        model: The model; left in eval mode.
        part: Part of the digit pairs.

    Returns:
        The accuracy in percent and the number of pairs.
    """
    model.eval()
    data = digits.DigitPairs(part)
    images = torch.from_numpy(data.pixels)[:, None].float() / 255
    predictions = torch.cat([model(to_input(batch)).argmax(dim=1) for batch in images.split(250)])
    hits = int((predictions == torch.tensor(data.targets)).sum())
    return {f"{part}_accuracy": round(100 * hits / len(data), 4), f"{part}_count": len(data)}


def describe(measured: dict[str, Any], part: str) -> str:
    """Formats what `measure` returns."""
    return f"{part} {measured[f'{part}_accuracy']:.2f} %"


def fingerprints() -> dict[str, str]:
    """Returns the fingerprint of each part."""
    return {part: digits.DigitPairs(part).fingerprint for part in PARTS}


def train(name: str, recipe: PairRecipe, seed: int) -> nn.Module:
    """Trains one model from scratch.

    Args:
        name: Name of the demo model.
        recipe: Hyperparameters.
        seed: Seed of the initial weights, the composed pairs and the augmentation.

    Returns:
        The trained model, in eval mode.
    """
    common.seed_everything(seed)
    model = DEMO.build(name)
    initialise(model)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    augment = RandomDigitWarp()
    pairs_per_epoch = len(digits.DigitPairs("train"))
    steps_per_epoch = pairs_per_epoch // recipe.batch_size
    # Embeddings: what the model itself exempts, and Swin's tables of position biases.
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    exempt |= {name for name, _ in model.named_parameters() if "relative_position_bias" in name}
    stepper = common.Stepper(model, exempt, recipe, steps_per_epoch)
    for epoch in range(recipe.epochs):
        started = time.perf_counter()
        plan = digits.draw_pairs("train", pairs_per_epoch, np.random.default_rng([seed, epoch]))
        images = torch.from_numpy(digits.compose_pairs(plan))[:, None]
        labels = torch.from_numpy(plan.targets)
        model.train()
        total_loss = 0.0
        for step in range(steps_per_epoch):  # The plan's order is random already.
            batch = slice(step * recipe.batch_size, (step + 1) * recipe.batch_size)
            inputs = to_input(augment(images[batch].float() / 255))
            loss = loss_of(model(inputs), labels[batch], recipe.label_smoothing)
            stepper.step(loss)
            total_loss += loss.item()
        line = f"{name} epoch {epoch + 1}/{recipe.epochs} loss {total_loss / steps_per_epoch:.3f}"
        if (epoch + 1) % 5 == 0 or epoch + 1 == recipe.epochs:
            line += f" {describe(measure(model, 'val'), 'val')}"
        print(f"{line} ({time.perf_counter() - started:.1f} s)", flush=True)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(False)
    return model.eval()
