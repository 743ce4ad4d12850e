"""Training of the retrieval task's demo models on the digit scenes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import nn

from demo_training import common
from tasks.common.digits import PARTS
from tasks.retrieval.demo import scenes
from tasks.retrieval.demo.captions import NUM_FACTS
from tasks.retrieval.demo.models import DEMO
from tasks.retrieval.demo.tokens import demo_tokenizer

NAMES = DEMO.names
VERSIONS = {"open_clip": open_clip.__version__}

# Logits of features of norm 1 are at most this; Radford et al., ICML 2021, arXiv:2103.00020, section 2.5.
_MAX_LOGIT_SCALE = 100.0

spec_of = DEMO.spec
weights_path = DEMO.weights_path


@dataclass(frozen=True)
class SceneRecipe(common.Recipe):
    """Hyperparameters, chosen on the val part.

    Attributes:
        facts_weight: Weight of the loss of the facts beside the contrastive loss.
    """

    epochs: int = 50  # No more: a model that reads every scene would hide what quantization costs.
    batch_size: int = 64
    lr: float = 2e-3
    facts_weight: float = 1.0


RECIPES = dict.fromkeys(NAMES, SceneRecipe())


def to_input(pixels: torch.Tensor) -> torch.Tensor:
    """Normalises float32 images in [0, 1] of shape ``(b, 1, 48, 48)`` exactly like `scenes.eval_transform`."""
    return ((pixels - scenes.PIXEL_MEAN) / scenes.PIXEL_STD).expand(-1, 3, -1, -1)


def initialise(model: nn.Module) -> None:
    """Replaces the initial weights that suit wide models; these narrow ones would hardly start to learn."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    # What is shown depends on where a digit or a word is, so positions must be seen from the first step.
    nn.init.normal_(model.visual.positional_embedding, std=0.3)
    nn.init.normal_(model.positional_embedding, std=0.3)
    nn.init.normal_(model.token_embedding.weight, std=0.3)


class FactHeads(nn.Module):
    """Reads what each cell shows, in training only.

    While a model still confuses most scenes, a cell it does know is rewarded at once; that saves many epochs. One head
    reads the features of both towers, which so learn to say it in the same way. Another reads a cell's own patches: the
    class token alone hardly tells the early blocks how to read digits.
    """

    def __init__(self, model: nn.Module) -> None:
        """Builds the heads and listens to the vision tower's last block.

        Args:
            model: The CLIP model.
        """
        super().__init__()
        self.features = nn.Linear(model.visual.output_dim, NUM_FACTS * scenes.CELLS)
        self.patches = nn.Linear(model.visual.ln_post.normalized_shape[0], NUM_FACTS)
        self._grid = model.visual.grid_size
        self._tokens = torch.empty(0)
        self._listener = model.visual.transformer.register_forward_hook(self._keep)

    def forward(self, images: torch.Tensor, texts: torch.Tensor, facts: torch.Tensor) -> list[torch.Tensor]:
        """Computes the mean cross entropy over scenes and cells, of images' features, of texts' and of patches.

        Args:
            images: The images' features of norm 1, shape ``(b, d)``, of the model's last call.
            texts: The texts' features, likewise.
            facts: int64 of shape ``(b, 4)``.

        Returns:
            The three losses.
        """
        scale = images.shape[1] ** 0.5  # Features of norm 1 would hardly move the head.
        losses = [F.cross_entropy(self.features(x * scale).unflatten(1, (NUM_FACTS, -1)), facts) for x in (images, texts)]
        rows, columns = self._grid
        cells = self._tokens[:, 1:].unflatten(1, (2, rows // 2, 2, columns // 2)).mean((2, 4))  # (b, 2, 2, width)
        return [*losses, F.cross_entropy(self.patches(cells).flatten(0, 2), facts.flatten())]

    def remove(self) -> None:
        """Stops listening."""
        self._listener.remove()

    def _keep(self, _module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self._tokens = output


@torch.inference_mode()
def measure(model: nn.Module, part: str) -> dict[str, Any]:
    """Measures recall at 1 in both directions, each query against the whole part.

    Args:
        model: The model; left in eval mode.
        part: Part of the digit scenes.

    Returns:
        The recalls in percent, image to text and text to image, and the number of scenes.
    """
    model.eval()
    data = scenes.DigitScenes(part)
    pixels = torch.from_numpy(data.pixels)[:, None].float() / 255
    images = torch.cat([model.encode_image(to_input(batch), normalize=True) for batch in pixels.split(250)])
    texts = torch.cat([model.encode_text(batch, normalize=True) for batch in demo_tokenizer()(data.captions).split(250)])
    products = images @ texts.T
    right = torch.arange(len(data))
    recalls = [100 * float((products.argmax(dim=1 - d) == right).double().mean()) for d in (0, 1)]
    return {f"{part}_i2t_r1": round(recalls[0], 4), f"{part}_t2i_r1": round(recalls[1], 4), f"{part}_count": len(data)}


def describe(measured: dict[str, Any], part: str) -> str:
    """Formats what `measure` returns."""
    return f"{part} R@1 {measured[f'{part}_i2t_r1']:.2f} % i2t, {measured[f'{part}_t2i_r1']:.2f} % t2i"


def fingerprints() -> dict[str, str]:
    """Returns the fingerprint of each part."""
    return {part: scenes.DigitScenes(part).fingerprint for part in PARTS}


def train(name: str, recipe: SceneRecipe, seed: int) -> nn.Module:
    """Trains one model from scratch.

    Args:
        name: Name of the demo model.
        recipe: Hyperparameters.
        seed: Seed of the initial weights, the composed scenes and the augmentation.

    Returns:
        The trained model, in eval mode.
    """
    common.seed_everything(seed)
    model = DEMO.build(name)
    initialise(model)
    heads = FactHeads(model)
    warp, tokenizer, contrast = scenes.scene_warp(), demo_tokenizer(), ClipLoss()
    scenes_per_epoch = len(scenes.DigitScenes("train"))
    steps_per_epoch = scenes_per_epoch // recipe.batch_size
    exempt = {"0.token_embedding.weight", "0.positional_embedding", "0.visual.positional_embedding"}
    stepper = common.Stepper(nn.ModuleList([model, heads]), exempt, recipe, steps_per_epoch)
    for epoch in range(recipe.epochs):
        started = time.perf_counter()
        plan = scenes.draw_scenes("train", scenes_per_epoch, np.random.default_rng([seed, epoch]))
        pixels = torch.from_numpy(scenes.compose_scenes(plan))[:, None]
        facts = torch.from_numpy(plan.facts)
        tokens = tokenizer(list(plan.captions))
        model.train()
        totals = np.zeros(4)
        for step in range(steps_per_epoch):  # The plan's order is random but for the groups, which should share a batch.
            batch = slice(step * recipe.batch_size, (step + 1) * recipe.batch_size)
            images, texts, scale = model(to_input(warp(pixels[batch].float() / 255)), tokens[batch])
            losses = [contrast(images, texts, scale), *heads(images, texts, facts[batch])]
            stepper.step(losses[0] + recipe.facts_weight * sum(losses[1:]))
            with torch.no_grad():
                model.logit_scale.clamp_(max=float(np.log(_MAX_LOGIT_SCALE)))
            totals += [loss.item() for loss in losses]
        shown = " ".join(f"{total / steps_per_epoch:.3f}" for total in totals)
        line = f"{name} epoch {epoch + 1}/{recipe.epochs} losses {shown} scale {scale.item():.1f}"
        if (epoch + 1) % 5 == 0 or epoch + 1 == recipe.epochs:
            line += f" {describe(measure(model, 'val'), 'val')}"
        print(f"{line} ({time.perf_counter() - started:.1f} s)", flush=True)
    heads.remove()
    return model.eval()
