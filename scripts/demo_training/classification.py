"""Training of the classification task's demo models on the digit pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_training import common
from tasks.classification.demo import digit_pairs
from tasks.classification.demo.models import DEMO
from tasks.common.data.augment import RandomDigitWarp

VERSIONS = {"timm": timm.__version__}


@dataclass(frozen=True)
class PairRecipe(common.Recipe):
    """Hyperparameters, with the label smoothing of the cross entropy."""

    epochs: int = 30
    batch_size: int = 64
    lr: float = 3e-3
    label_smoothing: float = 0.05


RECIPES = dict.fromkeys(DEMO.names, PairRecipe())


def fingerprint(part: str) -> str:
    """Fingerprint of a part of the data."""
    return digit_pairs.DigitPairs(part).fingerprint


def to_input(pixels: Tensor) -> Tensor:
    """Normalise float32 images in [0, 1] exactly like `digit_pairs.eval_transform`."""
    return (pixels - digit_pairs.PIXEL_MEAN) / digit_pairs.PIXEL_STD


def loss_of(output: Tensor | tuple[Tensor, ...], labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross entropy of the pair, of its left digit and of its right digit, and over heads.

    The digits' logits are marginals of the pair's (b, 100): while a model still confuses most
    pairs, a digit it does know is rewarded at once, which saves many epochs.
    """
    losses: list[Tensor] = []
    for logits in output if isinstance(output, tuple) else (output,):
        table = logits.unflatten(1, (10, 10))  # (b, left, right)
        marginals = ((table.logsumexp(2), labels // 10), (table.logsumexp(1), labels % 10))
        for found, wanted in ((logits, labels), *marginals):
            losses.append(F.cross_entropy(found, wanted, label_smoothing=smoothing))
    return torch.stack(losses).mean()


@torch.inference_mode()
def measure(model: nn.Module, part: str) -> dict[str, Any]:
    """Top-1 accuracy of a part in percent, and its number of pairs."""
    model.eval()
    data = digit_pairs.DigitPairs(part)
    images = torch.from_numpy(data.pixels)[:, None].float() / 255
    predictions = torch.cat([model(to_input(batch)).argmax(dim=1) for batch in images.split(250)])
    hits = int((predictions == torch.tensor(data.targets)).sum())
    return {f"{part}_accuracy": round(100 * hits / len(data), 4), f"{part}_count": len(data)}


def train(name: str, recipe: PairRecipe, seed: int) -> nn.Module:
    """Train a demo model from scratch; it is returned in eval mode."""
    common.seed_everything(seed)
    model = DEMO.build(name)
    common.widen(model)
    if getattr(model, "pos_embed", None) is not None:
        # The label depends on which side a digit is on, so positions must be seen from the first step.
        nn.init.normal_(model.pos_embed, std=0.3)
    distilled = getattr(model, "set_distilled_training", lambda enabled: None)
    distilled(True)
    augment = RandomDigitWarp()
    count = len(digit_pairs.DigitPairs("train"))

    def batches(epoch: int) -> Callable[[slice], Tensor]:
        # The plan is in random order.
        plan = digit_pairs.draw_pairs("train", count, np.random.default_rng([seed, epoch]))
        images = torch.from_numpy(digit_pairs.compose_pairs(plan))[:, None]
        labels = torch.from_numpy(plan.targets)

        def loss(batch: slice) -> Tensor:
            output = model(to_input(augment(images[batch].float() / 255)))
            return loss_of(output, labels[batch], recipe.label_smoothing)

        return loss

    # Embeddings: what the model itself exempts, and Swin's tables of position biases.
    exempt = (*getattr(model, "no_weight_decay", tuple)(), "relative_position_bias")
    steps = count // recipe.batch_size
    common.fit(name, recipe, model, exempt, steps, batches, lambda: measure(model, "val"))
    distilled(False)
    return model.eval()
