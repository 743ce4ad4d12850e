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
    """Turn towers of a CLIP model into chains, by name; they take over its parameters.

    "vision" maps images (n, 3, H, W) and "text" token ids (n, L) int64 to embeddings (n, d), not
    normalised. In full precision they equal ``encode_image`` and ``encode_text`` to rounding. The
    ``head_bits`` of ``recipe`` are those of the projections' inputs.

    Raises:
        ModelError: a model or tower of a kind that is not supported.
    """
    if type(model) not in (CLIP, CustomTextCLIP):
        raise ModelError(f"A model of type {type(model).__name__} is not supported: open_clip's CLIP and CustomTextCLIP are.")
    chains = {}
    for name in towers:
        if name not in TOWERS:
            raise ModelError(f"There is no tower '{name}'.{suggest(name, TOWERS)}")
        chains[name] = vision_tower(model.visual, recipe) if name == "vision" else text_tower(model, recipe)
    return chains
