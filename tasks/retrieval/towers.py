"""CLIP models of open_clip as chains, one a tower."""

from collections.abc import Sequence

from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError, suggest
from fimaq_core.recipe import Recipe
from tasks.retrieval.text import text_tower
from tasks.retrieval.vision import vision_tower

#: Names of the towers.
TOWERS = ("vision", "text")


def build_towers(model: nn.Module, recipe: Recipe, towers: Sequence[str]) -> dict[str, BlockChain]:
    """Turn towers of a CLIP model into chains. They take over its parameters, and the model may be changed.

    Args:
        model: open_clip's ``CLIP`` or ``CustomTextCLIP``.
        recipe: bits and quantizers; ``head_bits`` are those of the projections' inputs.
        towers: some of :data:`TOWERS`.

    Returns:
        By tower, in the order given: "vision" maps images (n, 3, H, W) and "text" token ids (n, L) int64 to embeddings (n, d)
        that are not normalised. In full precision they equal ``encode_image`` and ``encode_text`` to rounding.

    Raises:
        ModelError: the model, or a part of a tower that is asked for, is of a kind that is not supported.
    """
    for name in towers:
        check_tower(model, name)
    return {name: vision_tower(model.visual, recipe) if name == "vision" else text_tower(model, recipe) for name in towers}


def check_tower(model: nn.Module, name: str) -> None:
    """Check that a model has the tower ``name``. Raises ModelError."""
    if type(model) not in (CLIP, CustomTextCLIP):
        raise ModelError(f"A model of type {type(model).__name__} is not supported: open_clip's CLIP and CustomTextCLIP are.")
    if name not in TOWERS:
        raise ModelError(f"There is no tower '{name}'.{suggest(name, TOWERS)}")
