"""Training of the demo models for retrieval, on scenes of digits."""

import math
from functools import partial
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from demo_training import common
from tasks.retrieval.demo import scenes
from tasks.retrieval.demo.models import DEMO, demo_tokenizer

VERSIONS = {"open_clip": open_clip.__version__}
#: After more epochs the models read every scene, and quantization would seem to cost nothing.
SETTINGS = dict.fromkeys(DEMO.names, common.settings(epochs=50, lr=2e-3, facts_weight=1.0))
#: Limit of the logit scale: Radford et al., ICML 2021, arXiv:2103.00020, section 2.5.
_MAX_LOGIT_SCALE = 100.0


def fingerprint(part: str) -> str:
    """Return the fingerprint of a part of the data."""
    return scenes.DigitScenes(part).fingerprint


def to_input(pixels: Tensor) -> Tensor:
    """Normalise float32 images (b, 1, 48, 48) in [0, 1] exactly like `scenes.eval_transform`."""
    return ((pixels - scenes.PIXEL_MEAN) / scenes.PIXEL_STD).expand(-1, 3, -1, -1)


class FactHeads(nn.Module):
    """Heads that read the content of each cell of a scene, during training only.

    A model that still confuses most scenes is already rewarded for cells that it recognises, which
    saves many epochs. One head reads the features of both towers. The other head reads the patches
    of a cell, since through the class token alone the early blocks hardly learn to read digits.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.features = nn.Linear(model.visual.output_dim, scenes.NUM_FACTS * scenes.CELLS)
        self.patches = nn.Linear(model.visual.ln_post.normalized_shape[0], scenes.NUM_FACTS)
        self._grid = model.visual.grid_size
        self._tokens = torch.empty(0)
        self.listener = model.visual.transformer.register_forward_hook(self._keep)

    def forward(self, images: Tensor, texts: Tensor, facts: Tensor) -> Tensor:
        """Return the sum of the mean cross entropies of images, texts and patches."""
        scale = images.shape[1] ** 0.5  # features of norm 1 would hardly move the head
        shape = (scenes.NUM_FACTS, -1)
        found = [self.features(x * scale).unflatten(1, shape) for x in (images, texts)]
        rows, columns = self._grid
        grid = self._tokens[:, 1:].unflatten(1, (2, rows // 2, 2, columns // 2))
        cells = grid.mean((2, 4))  # (b, 2, 2, width)
        patches = F.cross_entropy(self.patches(cells).flatten(0, 2), facts.flatten())
        return F.cross_entropy(found[0], facts) + F.cross_entropy(found[1], facts) + patches

    def _keep(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        self._tokens = output


@torch.inference_mode()
def measure(model: Any, part: str) -> dict[str, Any]:
    """Return R@1 in percent, each query against the whole part, and the number of scenes."""
    model.eval()
    data = scenes.DigitScenes(part)
    pixels = torch.from_numpy(data.pixels)[:, None].float() / 255
    tokens = demo_tokenizer()(data.captions)
    images = [model.encode_image(to_input(batch), normalize=True) for batch in pixels.split(250)]
    texts = [model.encode_text(batch, normalize=True) for batch in tokens.split(250)]
    products, right = torch.cat(images) @ torch.cat(texts).T, torch.arange(len(data))
    recalls = [100 * float((products.argmax(dim=1 - d) == right).double().mean()) for d in (0, 1)]
    found = {f"{part}_i2t_r1": round(recalls[0], 4), f"{part}_t2i_r1": round(recalls[1], 4)}
    return {**found, f"{part}_count": len(data)}


def train(name: str, settings: common.Settings) -> nn.Module:
    """Train a demo model from scratch and return it in eval mode."""
    model = common.start(DEMO, name, settings["seed"])
    common.widen(model)
    # The meaning of a digit or word depends on its place, so positions must matter from the start.
    positions = model.visual.positional_embedding, model.positional_embedding
    for embedding in (*positions, model.token_embedding.weight):
        nn.init.normal_(embedding, std=0.3)
    heads = FactHeads(model)
    warp, tokenizer, contrast = scenes.scene_warp(), demo_tokenizer(), ClipLoss()
    limit = partial(model.logit_scale.data.clamp_, max=math.log(_MAX_LOGIT_SCALE))
    count = len(scenes.DigitScenes("train"))

    def draw(rng: np.random.Generator) -> common.BatchLoss:
        # Groups of scenes are in random order; the scenes of a group are adjacent, in one batch.
        plan = scenes.draw_scenes("train", count, rng)
        pixels = torch.from_numpy(scenes.compose_scenes(plan))[:, None]
        facts, tokens = torch.from_numpy(plan.facts), tokenizer(list(plan.captions))

        def loss(batch: slice) -> Tensor:
            limit()
            images, texts, scale = model(to_input(warp(pixels[batch].float() / 255)), tokens[batch])
            read = heads(images, texts, facts[batch])
            return contrast(images, texts, scale) + settings["facts_weight"] * read

        return loss

    exempt, both = ("token_embedding", "positional_embedding"), nn.ModuleList([model, heads])
    validate = partial(measure, model, "val")
    common.fit(both, settings, draw, count=count, exempt=exempt, validate=validate)
    limit()
    heads.listener.remove()
    return model.eval()
