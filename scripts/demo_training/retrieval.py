"""Training of the retrieval task's demo models on the digit scenes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from demo_training import common
from tasks.retrieval.demo import scenes
from tasks.retrieval.demo.models import DEMO
from tasks.retrieval.demo.tokens import demo_tokenizer

VERSIONS = {"open_clip": open_clip.__version__}

# Largest logit of features of norm 1; Radford et al., ICML 2021, arXiv:2103.00020, section 2.5.
_MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class SceneRecipe(common.Recipe):
    """Hyperparameters, with the weight of the loss of the facts beside the contrastive loss."""

    epochs: int = 50  # No more: a model that reads every scene would hide what quantization costs.
    batch_size: int = 64
    lr: float = 2e-3
    facts_weight: float = 1.0


RECIPES = dict.fromkeys(DEMO.names, SceneRecipe())


def fingerprint(part: str) -> str:
    """Fingerprint of a part of the data."""
    return scenes.DigitScenes(part).fingerprint


def to_input(pixels: Tensor) -> Tensor:
    """Normalise float32 images (b, 1, 48, 48) in [0, 1] exactly like `scenes.eval_transform`."""
    return ((pixels - scenes.PIXEL_MEAN) / scenes.PIXEL_STD).expand(-1, 3, -1, -1)


class FactHeads(nn.Module):
    """Reads what each cell shows, in training only.

    While a model still confuses most scenes, a cell it does know is rewarded at once; that saves
    many epochs. One head reads the features of both towers, another a cell's own patches: the class
    token alone hardly tells the early blocks how to read digits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.features = nn.Linear(model.visual.output_dim, scenes.NUM_FACTS * scenes.CELLS)
        self.patches = nn.Linear(model.visual.ln_post.normalized_shape[0], scenes.NUM_FACTS)
        self._grid = model.visual.grid_size
        self._tokens = torch.empty(0)
        self.listener = model.visual.transformer.register_forward_hook(self._keep)

    def forward(self, images: Tensor, texts: Tensor, facts: Tensor) -> Tensor:
        """Sum of the mean cross entropies, over scenes and cells, of images, texts and patches."""
        scale = images.shape[1] ** 0.5  # Features of norm 1 would hardly move the head.
        shape = (scenes.NUM_FACTS, -1)
        found = [self.features(x * scale).unflatten(1, shape) for x in (images, texts)]
        rows, columns = self._grid
        cells = (
            self._tokens[:, 1:].unflatten(1, (2, rows // 2, 2, columns // 2)).mean((2, 4))
        )  # (b, 2, 2, width)
        patches = F.cross_entropy(self.patches(cells).flatten(0, 2), facts.flatten())
        return F.cross_entropy(found[0], facts) + F.cross_entropy(found[1], facts) + patches

    def _keep(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        self._tokens = output


@torch.inference_mode()
def measure(model: nn.Module, part: str) -> dict[str, Any]:
    """Recall at 1 in percent, each query against the whole part, and the number of scenes."""
    model.eval()
    data = scenes.DigitScenes(part)
    pixels = torch.from_numpy(data.pixels)[:, None].float() / 255
    images = torch.cat(
        [model.encode_image(to_input(batch), normalize=True) for batch in pixels.split(250)]
    )
    texts = torch.cat(
        [
            model.encode_text(batch, normalize=True)
            for batch in demo_tokenizer()(data.captions).split(250)
        ]
    )
    products = images @ texts.T
    right = torch.arange(len(data))
    recalls = [100 * float((products.argmax(dim=1 - d) == right).double().mean()) for d in (0, 1)]
    return {
        f"{part}_i2t_r1": round(recalls[0], 4),
        f"{part}_t2i_r1": round(recalls[1], 4),
        f"{part}_count": len(data),
    }


def train(name: str, recipe: SceneRecipe, seed: int) -> nn.Module:
    """Train a demo model from scratch; it is returned in eval mode."""
    common.seed_everything(seed)
    model = DEMO.build(name)
    common.widen(model)
    # What is shown depends on where a digit or a word is, so positions must be seen from the first step.
    positions = model.visual.positional_embedding, model.positional_embedding
    for embedding in (*positions, model.token_embedding.weight):
        nn.init.normal_(embedding, std=0.3)
    heads = FactHeads(model)
    warp, tokenizer, contrast = scenes.scene_warp(), demo_tokenizer(), ClipLoss()
    count = len(scenes.DigitScenes("train"))

    def batches(epoch: int) -> Callable[[slice], Tensor]:
        # In random order but for the groups, which should share a batch.
        plan = scenes.draw_scenes("train", count, np.random.default_rng([seed, epoch]))
        pixels = torch.from_numpy(scenes.compose_scenes(plan))[:, None]
        facts = torch.from_numpy(plan.facts)
        tokens = tokenizer(list(plan.captions))

        def loss(batch: slice) -> Tensor:
            model.logit_scale.data.clamp_(max=math.log(_MAX_LOGIT_SCALE))
            images, texts, scale = model(to_input(warp(pixels[batch].float() / 255)), tokens[batch])
            read = heads(images, texts, facts[batch])
            return contrast(images, texts, scale) + recipe.facts_weight * read

        return loss

    exempt = ("token_embedding", "positional_embedding")
    both, steps = nn.ModuleList([model, heads]), count // recipe.batch_size
    common.fit(name, recipe, both, exempt, steps, batches, lambda: measure(model, "val"))
    model.logit_scale.data.clamp_(max=math.log(_MAX_LOGIT_SCALE))
    heads.listener.remove()
    return model.eval()
