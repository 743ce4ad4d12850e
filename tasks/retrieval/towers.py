"""Towers of open_clip's CLIP models as chains; their attention is written out.

A vision tower is open_clip's own ViT, or a timm ViT inside open_clip's adapter. A text tower is
open_clip's transformer of token ids, inside the model (CLIP) or in a part of it (CustomTextCLIP).
"""

from collections.abc import Sequence

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, Transformer
from open_clip.transformer import VisionTransformer as ClipVisionTransformer
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, MlpPart, Segment
from fimaq_core.errors import ModelError, suggest
from fimaq_core.families.attention import ExplicitMultiheadAttention, linear_of
from fimaq_core.families.parts import norm_pair, swap_linears
from fimaq_core.families.vit import vit_body
from fimaq_core.layers import QuantConv2d, QuantLinear
from fimaq_core.recipe import Recipe

#: Names of the towers.
TOWERS = ("vision", "text")
#: The MLP of a block. OpenAI's models compute GELU as ``x sigmoid(1.702 x)``.
_MLP = MlpPart("mlp", fc1="c_fc", act="gelu", fc2="c_proj", gelu=(nn.GELU, QuickGELU))
#: Poolings of a fixed position, and of a position that depends on the text.
_FIXED, _BY_TOKEN = {"first": 0, "last": -1}, ("argmax", "eos")


def build_towers(model: nn.Module, recipe: Recipe, towers: Sequence[str]) -> dict[str, BlockChain]:
    """Turn towers of a CLIP model into chains, by name; the chains take over its parameters.

    "vision" maps images (n, 3, H, W), and "text" token ids (n, L) int64, to embeddings (n, d), not
    normalised. In full precision they equal ``encode_image`` and ``encode_text`` up to rounding.
    Raises ModelError: the model or a tower is not supported.
    """
    for name in towers:
        check_tower(model, name)
    made = {}
    for name in towers:
        vision = name == "vision"
        made[name] = _vision_tower(model.visual, recipe) if vision else _text_tower(model, recipe)
    return made


def check_tower(model: nn.Module, name: str) -> None:
    """Raise ModelError unless ``model`` is a CLIP model of open_clip and has the tower ``name``."""
    if type(model) not in (CLIP, CustomTextCLIP):
        raise _unsupported(_typed("A model", model), "open_clip's CLIP and CustomTextCLIP are")
    if name not in TOWERS:
        raise ModelError(f"There is no tower '{name}'.{suggest(name, TOWERS)}")


def _unsupported(what: str, advice: str) -> ModelError:
    return ModelError(f"{what} is not supported: {advice}.")


def _typed(what: str, one: object) -> str:
    return f"{what} of type {type(one).__name__}"


class ExplicitBlock(nn.Module):
    """open_clip's ``ResidualAttentionBlock`` on sequences (B, N, C), with an end of the tower.

    ``mask`` (context, context) or None is added to the scores. ``after`` follows the last block.
    """

    mask: Tensor | None

    def __init__(
        self,
        block: ResidualAttentionBlock,
        mask: Tensor | None,
        recipe: Recipe,
        after: nn.Module | None,
    ) -> None:
        super().__init__()
        if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
            what = _typed("A transformer block", block) + " (or with cross attention)"
            raise _unsupported(what, "only ResidualAttentionBlock is")
        self.ln_1, self.ls_1, self.ln_2 = block.ln_1, block.ls_1, block.ln_2
        self.mlp, self.ls_2 = block.mlp, block.ls_2
        self.attn = ExplicitMultiheadAttention(block.attn, recipe)
        self.attn.batch_first = True
        # Follows from the context's length, so no checkpoint needs it.
        self.register_buffer("mask", mask, persistent=False)
        if type(self.mlp) is not nn.Sequential or len(self.mlp) != 3:
            raise _unsupported(_typed("An MLP", self.mlp), "two linear layers and GELU are")
        swap_linears(self.mlp, _MLP, recipe)
        self.after = nn.Identity() if after is None else after

    def forward(self, x: Tensor) -> Tensor:
        normed, tokens = self.ln_1(x), x.shape[1]
        mask = None if self.mask is None else self.mask[:tokens, :tokens]
        x = x + self.ls_1(self.attn(normed, normed, normed, attn_mask=mask)[0])
        return self.after(x + self.ls_2(self.mlp(self.ln_2(x))))


def _block_segments(
    transformer: nn.Module,
    prefix: str,
    embedding: nn.Module,
    mask: Tensor | None,
    recipe: Recipe,
    after: nn.Module | None,
) -> list[Segment]:
    """Return one segment per block; ``embedding`` precedes the first, ``after`` ends the last."""
    if type(transformer) is not Transformer:
        raise _unsupported(_typed("A transformer", transformer), "only Transformer is")
    segments, last = [], len(transformer.resblocks) - 1
    for number, original in enumerate(transformer.resblocks):
        block = ExplicitBlock(original, mask, recipe, after if number == last else None)
        pairs = norm_pair(block.ln_1, "attn.qkv") + norm_pair(block.ln_2, "mlp.c_fc")
        before, label = embedding if number == 0 else None, f"{prefix}.resblocks.{number}"
        segments.append(Segment(label, "block", block, before=before, pairs=pairs, mlps=(_MLP,)))
    return segments


def _projection(owner: nn.Module, weight: nn.Module | nn.Parameter, recipe: Recipe) -> QuantLinear:
    """Return the projection to the embedding of a linear layer or a matrix (width, d)."""
    if isinstance(weight, nn.Linear):
        return QuantLinear.from_float(weight, recipe.w_bits, recipe.classifier_bits)
    if not isinstance(weight, nn.Parameter):
        what = f"{_typed('A projection', weight)} in {type(owner).__name__}"
        raise _unsupported(what, "a linear layer or a matrix is")
    # The only weight that is copied: weight files and searches need contiguous tensors.
    matrix = nn.Parameter(weight.detach().t().contiguous())
    return linear_of(matrix, None, recipe, recipe.classifier_bits)


class _Patches(nn.Module):
    """Between patch convolution and first block: (B, C, h, w) to (B, 1 + h * w, C)."""

    def __init__(self, tower: ClipVisionTransformer) -> None:
        super().__init__()
        self.class_embedding = tower.class_embedding
        self.positional_embedding = tower.positional_embedding
        self.ln_pre = tower.ln_pre

    def forward(self, x: Tensor) -> Tensor:
        patches = x.flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        return self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)


class _PooledPatches(nn.Module):
    """Between last block and projection: class token or mean of the others, and the norm."""

    def __init__(self, tower: ClipVisionTransformer) -> None:
        super().__init__()
        self.ln_post, self.pool_type = tower.ln_post, tower.pool_type
        self.norm_last = tower.final_ln_after_pool

    def forward(self, x: Tensor) -> Tensor:
        if not self.norm_last:
            x = self.ln_post(x)
        x = x[:, 0] if self.pool_type == "tok" else x[:, 1:].mean(dim=1)
        return self.ln_post(x) if self.norm_last else x


def _vision_tower(tower: nn.Module, recipe: Recipe) -> BlockChain:
    if type(tower) is TimmModel:
        return _timm_tower(tower, recipe)
    if type(tower) is not ClipVisionTransformer:
        known = "open_clip's VisionTransformer and a timm VisionTransformer in TimmModel are"
        raise _unsupported(_typed("A vision tower", tower), known)
    what, known = "VisionTransformer with", "pool_type 'tok' and 'avg' are"
    if tower.attn_pool is not None:
        raise _unsupported(f"{what} attentional_pool (CoCa)", known)
    if tower.pool_type not in ("tok", "avg"):
        raise _unsupported(f"{what} pool_type '{tower.pool_type}'", known)
    if tower.output_tokens:
        raise _unsupported(f"{what} output_tokens", "load the model without it")
    conv = QuantConv2d.from_float(tower.conv1, recipe.w_bits, recipe.patch_input_bits)
    segments, pooling = [Segment("visual.conv1", "patch_embed", conv)], _PooledPatches(tower)
    after = pooling if tower.proj is None else None
    segments += _block_segments(
        tower.transformer, "visual.transformer", _Patches(tower), None, recipe, after
    )
    if tower.proj is not None:
        layer = _projection(tower, tower.proj, recipe)
        segments.append(Segment("visual.proj", "projection", layer, before=pooling))
    return BlockChain(segments)


def _timm_tower(tower: TimmModel, recipe: Recipe) -> BlockChain:
    trunk = tower.trunk
    if type(trunk) is not VisionTransformer:
        raise _unsupported(_typed("TimmModel with a trunk", trunk), "VisionTransformer is")
    if trunk.attn_pool is None and not trunk.global_pool:
        raise _unsupported("TimmModel with a trunk that does not pool its tokens", "pooling is")
    heads = _timm_heads(tower, recipe)
    segments, rest = vit_body(trunk, recipe, "visual.trunk.", ends=not heads)
    for label, head in heads:
        segments.append(Segment(label, "projection", head, before=rest))
        rest = nn.Identity()
    return BlockChain(segments)


def _timm_heads(tower: TimmModel, recipe: Recipe) -> list[tuple[str, nn.Module]]:
    """Return the projections of the trunk's pooled features, by name."""
    heads: list[tuple[str, nn.Module]] = []
    if not isinstance(tower.trunk.head, nn.Identity):
        heads.append(("visual.trunk.head", _projection(tower.trunk, tower.trunk.head, recipe)))
    for name, part in tower.head.named_children():
        if isinstance(part, nn.Dropout):
            continue
        if type(part) is Mlp and isinstance(part.norm, nn.Identity):
            swap_linears(part, MlpPart(name), recipe, recipe.classifier_bits)
        elif isinstance(part, nn.Linear):
            part = _projection(tower, part, recipe)
        else:
            what = f"TimmModel with {type(part).__name__} in its head"
            raise _unsupported(what, "a linear layer or an MLP is")
        heads.append((f"visual.head.{name}", part))
    return heads


class _Tokens(nn.Module):
    """Before the first block: token ids (B, L) to (B, L, C), without a product to quantize."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.token_embedding = owner.token_embedding
        self.positional_embedding = owner.positional_embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]


class PooledPosition(nn.Module):
    """Position (B,) of the pooled token: the first one of the highest id, or of ``eos_id``.

    A text without ``eos_id`` is pooled at its first token, as in open_clip.
    """

    def __init__(self, pool_type: str, eos_id: int) -> None:
        super().__init__()
        self.pool_type, self.eos_id = pool_type, eos_id

    def forward(self, ids: Tensor) -> Tensor:
        wanted = ids if self.pool_type == "argmax" else (ids == self.eos_id).int()
        return wanted.argmax(dim=-1)


class _PooledToken(nn.Module):
    """Between last block and projection: one token, (B, L, C) to (B, C), and its norm.

    ``side`` holds positions (B,) that depend on the text.
    """

    def __init__(self, ln_final: nn.Module, position: int | None) -> None:
        super().__init__()
        self.ln_final, self.position = ln_final, position

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        position = self.position if side is None else side
        return self.ln_final(x[torch.arange(len(x), device=x.device), position])


def _text_tower(model: nn.Module, recipe: Recipe) -> BlockChain:
    if isinstance(model, CLIP):
        tower, prefix, pool_type, eos_id = model, "", model.text_pool_type, model.text_eos_id
    else:
        tower, prefix = model.text, "text."
        if type(tower) is not TextTransformer:
            raise _unsupported(_typed("A text tower", tower), "open_clip's TextTransformer is")
        for option in ("use_pad_mask", "output_tokens"):
            if getattr(tower, option):
                raise _unsupported(f"TextTransformer with {option}", "load the model without it")
        pool_type, eos_id = tower.pool_type, tower.eos_id
    by_token, matrix = pool_type in _BY_TOKEN, tower.text_projection
    if not by_token and pool_type not in _FIXED:
        known = ", ".join(f"'{name}'" for name in (*_BY_TOKEN, *_FIXED))
        raise _unsupported(f"A text tower with pool_type '{pool_type}'", f"{known} are")
    if len(tower.positional_embedding) != tower.context_length:
        what = "A text tower with a class token of its own (embed_cls)"
        raise _unsupported(what, "pooling at a word is")
    if matrix is None and by_token:
        # The position of the token travels beside the blocks, to a part before a block.
        what = f"A text tower without projection and with pool_type '{pool_type}'"
        raise _unsupported(what, "a projection is")
    pooling = _PooledToken(tower.ln_final, _FIXED.get(pool_type))
    after, label = pooling if matrix is None else None, f"{prefix}transformer"
    segments = _block_segments(
        tower.transformer, label, _Tokens(tower), tower.attn_mask, recipe, after
    )
    if matrix is not None:
        layer, label = _projection(tower, matrix, recipe), f"{prefix}text_projection"
        segments.append(Segment(label, "projection", layer, before=pooling, takes_side=by_token))
    return BlockChain(segments, side=PooledPosition(pool_type, eos_id) if by_token else None)
