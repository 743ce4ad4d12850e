"""Small open_clip models with random weights, and inputs for them."""

import copy
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from small_models import randomise
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.recipe import Recipe
from tasks.retrieval.towers import build_towers

#: Id of the end of a text: the highest of the vocabulary, as CLIP's tokenizers have it.
END = 63
VISION: dict[str, Any] = {
    "layers": 2,
    "width": 32,
    "head_width": 16,
    "patch_size": 8,
    "image_size": 32,
    "mlp_ratio": 2.0,
}
TEXT: dict[str, Any] = {
    "context_length": 12,
    "vocab_size": END + 1,
    "width": 32,
    "heads": 2,
    "layers": 2,
    "mlp_ratio": 2.0,
}
SIGLIP_TEXT: dict[str, Any] = {
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
    "norm_kwargs": {"eps": 1e-6},
}


def clip(
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    custom: bool = False,
    **options: Any,
) -> Any:
    """A ``CLIP`` (or ``CustomTextCLIP``) for 32 x 32 images and 12 tokens; 24-value embeddings."""
    model = (CustomTextCLIP if custom else CLIP)(
        24, VISION | (vision or {}), TEXT | (text or {}), **options
    )
    return _randomise(model)


def timm_clip(
    name: str, pool: str, proj: str | None, text: dict[str, Any] | None = None, **vision: Any
) -> Any:
    """A ``CustomTextCLIP`` whose vision tower is one of timm's models for tests."""
    settings = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, **vision}
    width = {"test_vit3": 96}.get(name, 64) if proj == "none" else 24
    model = CustomTextCLIP(width, settings, TEXT | (text or {}))
    model.visual.set_input_size(32)
    return _randomise(model)


@torch.no_grad()
def _randomise(model: nn.Module) -> nn.Module:
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            # A weight by another name; as a bias it would let attention see single tokens only.
            module.in_proj_weight.div_(0.3 * module.embed_dim**0.5)
    return model


def token_ids(count: int, seed: int = 0) -> Tensor:
    """Texts (count, 12) of 2 to 10 words, then the end, then zeros."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, END, (count, TEXT["context_length"]), generator=generator)
    for row in range(count):
        end = 2 + row % 9
        ids[row, end], ids[row, end + 1 :] = END, 0
    return ids


@torch.no_grad()
def embeddings(model: nn.Module, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Outputs of open_clip, before a chain takes over its parameters."""
    model = copy.deepcopy(model)
    return {"vision": model.encode_image(images), "text": model.encode_text(ids, normalize=False)}


def both(model: nn.Module, recipe: Recipe) -> dict[str, BlockChain]:
    """Both towers."""
    return build_towers(model, recipe, ("vision", "text"))
