"""Text towers: open_clip's transformer over token ids, of a ``CLIP`` or a ``CustomTextCLIP``."""

from dataclasses import dataclass

import torch
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.errors import ModelError
from fimaq_core.recipe import Recipe
from tasks.retrieval.blocks import block_segments, projection

#: Poolings of a position that is the same in all texts, and of one that depends on the text.
_FIXED, _BY_TOKEN = {"first": 0, "last": -1}, ("argmax", "eos")


@dataclass(frozen=True)
class _Parts:
    """A tower's owner of embeddings, transformer, mask, norm and projection, with its prefix in the
    model.
    """

    owner: nn.Module
    prefix: str
    pool_type: str
    eos_id: int
    context_length: int


class _Embedding(nn.Module):
    """Before the first block: token ids (B, L) to (B, L, C); no product, so nothing to quantize."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.token_embedding, self.positional_embedding = owner.token_embedding, owner.positional_embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]


class PooledPosition(nn.Module):
    """Position (B,) of the pooled token, by token ids (B, L): the first of the highest id, or of
    ``eos_id``.

    Texts without ``eos_id`` are pooled at their first token, as open_clip does.
    """

    def __init__(self, pool_type: str, eos_id: int) -> None:
        super().__init__()
        self.pool_type, self.eos_id = pool_type, eos_id

    def forward(self, ids: Tensor) -> Tensor:
        return ids.argmax(dim=-1) if self.pool_type == "argmax" else (ids == self.eos_id).int().argmax(dim=-1)


class _Pooling(nn.Module):
    """Between last block and projection: one token, (B, L, C) to (B, C), and its norm.

    The norm acts on every token by itself, so only the pooled one goes through it. ``side`` has
    positions (B,), where they are not the same in all texts.
    """

    def __init__(self, ln_final: nn.Module, position: int | None) -> None:
        super().__init__()
        self.ln_final, self.position = ln_final, position

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        position = self.position if side is None else side
        return self.ln_final(x[torch.arange(len(x), device=x.device), position])


def text_tower(model: nn.Module, recipe: Recipe) -> BlockChain:
    """The chain of ``model.encode_text``, from token ids (n, L) int64 to embeddings (n, d), not
    normalised.

    Raises:
        ModelError: a tower of a kind that is not supported.
    """
    parts = _parts(model)
    owner, by_token = parts.owner, parts.pool_type in _BY_TOKEN
    if not by_token and parts.pool_type not in _FIXED:
        known = ", ".join(f"'{name}'" for name in (*_BY_TOKEN, *_FIXED))
        raise ModelError(f"A text tower with pool_type '{parts.pool_type}' is not supported: {known} are.")
    if len(owner.positional_embedding) != parts.context_length:
        raise ModelError("A text tower with a class token of its own (embed_cls) is not supported: pooling at a word is.")
    if owner.text_projection is None and by_token:
        # The token's position travels beside the blocks, to what lies before one.
        raise ModelError(f"A text tower without projection is not supported with pool_type '{parts.pool_type}'.")
    pooling = _Pooling(owner.ln_final, _FIXED.get(parts.pool_type))
    after = pooling if owner.text_projection is None else None
    name = f"{parts.prefix}transformer"
    segments = block_segments(owner.transformer, name, _Embedding(owner), owner.attn_mask, recipe, after)
    if owner.text_projection is not None:
        layer = projection(owner, owner.text_projection, recipe)
        label = f"{parts.prefix}text_projection"
        segments.append(Segment(label, "projection", layer, before=pooling, takes_side=by_token))
    return BlockChain(segments, side=PooledPosition(parts.pool_type, parts.eos_id) if by_token else None)


def _parts(model: nn.Module) -> _Parts:
    if isinstance(model, CLIP):
        return _Parts(model, "", model.text_pool_type, model.text_eos_id, model.context_length)
    tower = model.text
    if type(tower) is not TextTransformer:
        raise ModelError(f"A text tower of type {type(tower).__name__} is not supported: open_clip's TextTransformer is.")
    for option in ("use_pad_mask", "output_tokens"):
        if getattr(tower, option):
            raise ModelError(f"TextTransformer with {option} is not supported: load the model without it.")
    return _Parts(tower, "text.", tower.pool_type, tower.eos_id, tower.context_length)
