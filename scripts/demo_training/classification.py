"""Training of the demo models for classification, on pairs of digits."""

from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_training import common
from tasks.classification.demo import digit_pairs
from tasks.classification.demo.digit_pairs import DigitPairs
from tasks.classification.demo.models import DEMO
from tasks.common.data.augment import RandomDigitWarp

VERSIONS = {"timm": timm.__version__}
SETTINGS = dict.fromkeys(DEMO.names, common.settings(epochs=30, lr=3e-3, label_smoothing=0.05))


def fingerprint(part: str) -> str:
    """Return the fingerprint of a part of the data."""
    return DigitPairs(part).fingerprint


def to_input(pixels: Tensor) -> Tensor:
    """Normalise float32 images in [0, 1] exactly like `digit_pairs.eval_transform`."""
    return (pixels - digit_pairs.PIXEL_MEAN) / digit_pairs.PIXEL_STD


def loss_of(output: Tensor | tuple[Tensor, ...], labels: Tensor, smoothing: float) -> Tensor:
    """Return the cross entropy, averaged over heads and over pair, left digit and right digit.

    The digits' logits are marginals of the pair's logits (b, 100). So a model that still confuses
    most pairs is already rewarded for digits that it recognises, which saves many epochs.
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
    """Return the top-1 accuracy on a part in percent, and the number of pairs."""
    model.eval()
    data = DigitPairs(part)
    images = torch.from_numpy(data.pixels)[:, None].float() / 255
    found = torch.cat([model(to_input(batch)).argmax(dim=1) for batch in images.split(250)])
    hits = int((found == torch.tensor(data.targets)).sum())
    return {f"{part}_accuracy": round(100 * hits / len(data), 4), f"{part}_count": len(data)}


def train(name: str, settings: common.Settings) -> nn.Module:
    """Train a demo model from scratch and return it in eval mode."""
    model = common.start(DEMO, name, settings["seed"])
    common.widen(model)
    if getattr(model, "pos_embed", None) is not None:
        # The label depends on the digits' sides, so positions must matter from the first step.
        nn.init.normal_(model.pos_embed, std=0.3)
    distilled = getattr(model, "set_distilled_training", lambda enabled: None)
    distilled(True)
    augment, count = RandomDigitWarp(), len(DigitPairs("train"))

    def draw(rng: np.random.Generator) -> common.BatchLoss:
        plan = digit_pairs.draw_pairs("train", count, rng)  # in random order
        images = torch.from_numpy(digit_pairs.compose_pairs(plan))[:, None]
        labels = torch.from_numpy(plan.targets)

        def loss(batch: slice) -> Tensor:
            output = model(to_input(augment(images[batch].float() / 255)))
            return loss_of(output, labels[batch], settings["label_smoothing"])

        return loss

    # No weight decay for the model's own exemptions and Swin's tables of position biases.
    exempt = (*getattr(model, "no_weight_decay", tuple)(), "relative_position_bias")
    validate = partial(measure, model, "val")
    common.fit(model, settings, draw, count=count, exempt=exempt, validate=validate)
    distilled(False)
    return model.eval()
