"""Quantization of one tower of a CLIP model in a few lines, on top of :mod:`fimaq_core.api`."""

import copy
from typing import Any

from torch import Tensor, nn

from fimaq_core.api import QuantizedModel, quantize
from fimaq_core.chain import BlockChain
from fimaq_core.errors import DataError
from fimaq_core.families import FAMILIES
from fimaq_core.recipe import Recipe, make_recipe
from fimaq_core.samples import Samples
from tasks.retrieval.divergence import contrastive
from tasks.retrieval.towers import build_towers, check_tower


class _Tower(nn.Module):
    """One tower of an open_clip model as a separate model. Raises ModelError: not such a model."""

    tower, encode = "", ""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_tower(model, self.tower)
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        embeddings: Tensor = getattr(self.model, self.encode)(inputs)
        return embeddings


class VisionTower(_Tower):
    """Vision tower: images (n, 3, H, W) to embeddings (n, d), not normalised."""

    tower, encode = "vision", "encode_image"


class TextTower(_Tower):
    """Text tower: token ids (n, L) int64 to embeddings (n, d), not normalised."""

    tower, encode = "text", "encode_text"


class TowerFamily:
    """Model family of towers, for :data:`fimaq_core.families.FAMILIES`."""

    name = "open_clip's towers"

    def matches(self, model: nn.Module) -> bool:
        """Return True for a tower."""
        return isinstance(model, _Tower)

    def build(self, model: nn.Module, recipe: Recipe) -> BlockChain:
        """Turn a tower into a chain."""
        assert isinstance(model, _Tower)
        return build_towers(model.model, recipe, [model.tower])[model.tower]


FAMILIES.append(TowerFamily())


def quantize_tower(
    model: nn.Module,
    images: Tensor,
    token_ids: Tensor,
    *,
    tower: str = "vision",
    method: str = "fimaq",
    **settings: Any,
) -> QuantizedModel:
    """Quantize a copy of one tower and keep its similarities to the other tower.

    Example::

        q = quantize_tower(clip, images, token_ids, tower="vision", w_bits=4, a_bits=4)
        embeddings = q(images)
        q.save("q.safetensors")
        q = load("q.safetensors", VisionTower(clip))

    Args:
        model: open_clip's ``CLIP`` or ``CustomTextCLIP``, which does not change.
        images: (n, 3, H, W) calibration images, transformed for the model.
        token_ids: (n, L) int64, one caption per image.
        tower: "vision" or "text".
        method: a name from :data:`fimaq_core.recipe.METHODS`.
        settings: further arguments of :func:`fimaq_core.quantize`.

    Returns:
        The quantized tower: images or token ids to embeddings (n, d), not normalised.

    Raises:
        DataError: the numbers of images and captions differ, or there are fewer than two.
        FimaqError: see :func:`fimaq_core.quantize`.
    """
    check_tower(model, tower)
    fields = {name: value for name, value in settings.items() if name in Recipe.model_fields}
    recipe = make_recipe(method, fields)
    if len(images) != len(token_ids) or len(images) < 2:
        given = f"{len(images)} images and {len(token_ids)} captions"
        raise DataError(f"{given}: give at least two images, and one caption per image.")
    count = min(len(images), recipe.calibration_images)
    sides = (VisionTower(model), images[:count]), (TextTower(model), token_ids[:count])
    (one, inputs), (other, others) = sides if tower == "vision" else sides[::-1]
    other = copy.deepcopy(other).eval()
    batch = min(recipe.divergence_batch, count)
    divergence = contrastive(other.model, other, Samples(others), batch=batch)
    return quantize(one, inputs, method=method, divergence=divergence, **settings)
