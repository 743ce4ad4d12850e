"""CLIP models of open_clip as chains, one per tower; their attention is written out.

A vision tower is open_clip's own ViT, or a timm ViT in open_clip's adapter. A text tower is
open_clip's transformer over token ids, inside the model (CLIP) or a part of it (CustomTextCLIP).
"""

from collections.abc import Sequence

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    VisionTransformer,
)
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
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
#: Poolings of a position that is the same in all texts, and of one that depends on the text.
_FIXED, _BY_TOKEN = {"first": 0, "last": -1}, ("argmax", "eos")


def build_towers(model: nn.Module, recipe: Recipe, towers: Sequence[str]) -> dict[str, BlockChain]:
    """Turn towers of a CLIP model into chains, by name; they take over its parameters.

    "vision" maps images (n, 3, H, W) and "text" token ids (n, L) int64 to embeddings (n, d), not
    normalised. In full precision they equal ``encode_image`` and ``encode_text`` to rounding.
    Raises ModelError for models and towers that are not supported.
    """
    for name in towers:
        check_tower(model, name)
    return {
        name: _vision_tower(model.visual, recipe)
        if name == "vision"
        else _text_tower(model, recipe)
        for name in towers
    }


def check_tower(model: nn.Module, name: str) -> None:
    """Check that a model has the tower ``name``. Raises ModelError."""
    if type(model) not in (CLIP, CustomTextCLIP):
        raise ModelError(
            f"A model of type {type(model).__name__} is not supported: open_clip's CLIP and CustomTextCLIP are."
        )
    if name not in TOWERS:
        raise ModelError(f"There is no tower '{name}'.{suggest(name, TOWERS)}")


class ExplicitBlock(nn.Module):
    """open_clip's ``ResidualAttentionBlock`` on one sequence (B, N, C), and an end of the tower.

    ``mask`` (context, context) or None is added to the scores.
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
            raise ModelError(
                f"A transformer block of type {type(block).__name__} (or with cross attention) is not supported for CLIP: "
                "only ResidualAttentionBlock is."
            )
        self.ln_1, self.ls_1, self.ln_2, self.mlp, self.ls_2 = (
            block.ln_1,
            block.ls_1,
            block.ln_2,
            block.mlp,
            block.ls_2,
        )
        self.attn = ExplicitMultiheadAttention(block.attn, recipe)
        self.attn.batch_first = True
        # Made from the context's length, so no checkpoint needs it.
        self.register_buffer("mask", mask, persistent=False)
        if type(self.mlp) is not nn.Sequential or len(self.mlp) != 3:
            raise ModelError(f"An MLP of type {type(self.mlp).__name__} is not supported for CLIP.")
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
    """Every block as a segment; ``embedding`` precedes the first, ``after`` follows the last."""
    if type(transformer) is not Transformer:
        raise ModelError(
            f"A transformer of type {type(transformer).__name__} is not supported for CLIP: only Transformer is."
        )
    segments, count = [], len(transformer.resblocks)
    for number, original in enumerate(transformer.resblocks):
        block = ExplicitBlock(original, mask, recipe, after if number == count - 1 else None)
        pairs = norm_pair(block.ln_1, "attn.qkv") + norm_pair(block.ln_2, "mlp.c_fc")
        before = embedding if number == 0 else None
        segments.append(
            Segment(
                f"{prefix}.resblocks.{number}",
                "block",
                block,
                before=before,
                pairs=pairs,
                mlps=(_MLP,),
            )
        )
    return segments


def _projection(
    owner: nn.Module, parameter: nn.Parameter | nn.Linear, recipe: Recipe
) -> QuantLinear:
    """A projection to the embedding: a matrix (width, d) to multiply from the left, or a layer."""
    if isinstance(parameter, nn.Linear):
        return QuantLinear.from_float(parameter, recipe.w_bits, recipe.classifier_bits)
    if not isinstance(parameter, nn.Parameter):
        raise ModelError(
            f"A projection of type {type(parameter).__name__} in {type(owner).__name__} is not supported."
        )
    # The one weight that is copied: a transposed view would not be contiguous, which weight files and searches ask for.
    return linear_of(
        nn.Parameter(parameter.detach().t().contiguous()), None, recipe, recipe.classifier_bits
    )


class _Patches(nn.Module):
    """Between patch convolution and first block: (B, C, h, w) to (B, 1 + h * w, C)."""

    def __init__(self, tower: VisionTransformer) -> None:
        super().__init__()
        self.class_embedding, self.positional_embedding = (
            tower.class_embedding,
            tower.positional_embedding,
        )
        self.ln_pre = tower.ln_pre

    def forward(self, x: Tensor) -> Tensor:
        patches = x.flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        return self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)


class _PooledPatches(nn.Module):
    """Between last block and projection: class token or mean of the others, and the norm."""

    def __init__(self, tower: VisionTransformer) -> None:
        super().__init__()
        self.ln_post, self.pool_type, self.norm_last = (
            tower.ln_post,
            tower.pool_type,
            tower.final_ln_after_pool,
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.norm_last:
            x = self.ln_post(x)
        x = x[:, 0] if self.pool_type == "tok" else x[:, 1:].mean(dim=1)
        return self.ln_post(x) if self.norm_last else x


def _vision_tower(tower: nn.Module, recipe: Recipe) -> BlockChain:
    if type(tower) is TimmModel:
        return _timm_tower(tower, recipe)
    if type(tower) is not VisionTransformer:
        raise ModelError(
            f"A vision tower of type {type(tower).__name__} is not supported: open_clip's VisionTransformer and a timm "
            "VisionTransformer in TimmModel are."
        )
    if tower.attn_pool is not None:
        raise ModelError(
            "VisionTransformer with attentional_pool (CoCa) is not supported: pool_type 'tok' and 'avg' are."
        )
    if tower.pool_type not in ("tok", "avg"):
        raise ModelError(
            f"VisionTransformer with pool_type '{tower.pool_type}' is not supported: 'tok' and 'avg' are."
        )
    if tower.output_tokens:
        raise ModelError(
            "VisionTransformer with output_tokens is not supported: load the model without it."
        )
    conv = QuantConv2d.from_float(tower.conv1, recipe.w_bits, recipe.patch_input_bits)
    pooling = _PooledPatches(tower)
    after = pooling if tower.proj is None else None
    blocks = _block_segments(
        tower.transformer, "visual.transformer", _Patches(tower), None, recipe, after
    )
    segments = [Segment("visual.conv1", "patch_embed", conv), *blocks]
    if tower.proj is not None:
        segments.append(
            Segment(
                "visual.proj", "projection", _projection(tower, tower.proj, recipe), before=pooling
            )
        )
    return BlockChain(segments)


def _timm_tower(tower: TimmModel, recipe: Recipe) -> BlockChain:
    trunk = tower.trunk
    if type(trunk) is not TimmVisionTransformer:
        raise ModelError(
            f"TimmModel with a trunk of type {type(trunk).__name__} is not supported: VisionTransformer is."
        )
    if trunk.attn_pool is None and not trunk.global_pool:
        raise ModelError("TimmModel with a trunk that does not pool its tokens is not supported.")
    heads = _timm_heads(tower, recipe)
    segments, rest = vit_body(trunk, recipe, "visual.trunk.", ends=not heads)
    for label, head in heads:
        segments.append(Segment(label, "projection", head, before=rest))
        rest = nn.Identity()
    return BlockChain(segments)


def _timm_heads(tower: TimmModel, recipe: Recipe) -> list[tuple[str, nn.Module]]:
    """Projections of the trunk's pooled features, by name."""
    heads: list[tuple[str, nn.Module]] = []
    if not isinstance(tower.trunk.head, nn.Identity):
        heads.append(("visual.trunk.head", _projection(tower.trunk, tower.trunk.head, recipe)))
    for name, part in tower.head.named_children():
        if isinstance(part, nn.Dropout):
            continue
        if type(part) is Mlp and isinstance(part.norm, nn.Identity):
            swap_linears(part, MlpPart(name), recipe, recipe.classifier_bits)
            heads.append((f"visual.head.{name}", part))
        elif isinstance(part, nn.Linear):
            heads.append(
                (
                    f"visual.head.{name}",
                    QuantLinear.from_float(part, recipe.w_bits, recipe.classifier_bits),
                )
            )
        else:
            raise ModelError(
                f"TimmModel with {type(part).__name__} in its head is not supported: a linear layer or an MLP is."
            )
    return heads


class _Tokens(nn.Module):
    """Before the first block: token ids (B, L) to (B, L, C); no product, so nothing to quantize."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.token_embedding, self.positional_embedding = (
            owner.token_embedding,
            owner.positional_embedding,
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]


class PooledPosition(nn.Module):
    """Position (B,) of the pooled token: the first of the highest id, or of ``eos_id``.

    Texts without ``eos_id`` are pooled at their first token, as open_clip does.
    """

    def __init__(self, pool_type: str, eos_id: int) -> None:
        super().__init__()
        self.pool_type, self.eos_id = pool_type, eos_id

    def forward(self, ids: Tensor) -> Tensor:
        return (
            ids.argmax(dim=-1)
            if self.pool_type == "argmax"
            else (ids == self.eos_id).int().argmax(dim=-1)
        )


class _PooledToken(nn.Module):
    """Between last block and projection: one token, (B, L, C) to (B, C), and its norm.

    ``side`` has positions (B,), where they are not the same in all texts.
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
            raise ModelError(
                f"A text tower of type {type(tower).__name__} is not supported: open_clip's TextTransformer is."
            )
        for option in ("use_pad_mask", "output_tokens"):
            if getattr(tower, option):
                raise ModelError(
                    f"TextTransformer with {option} is not supported: load the model without it."
                )
        pool_type, eos_id = tower.pool_type, tower.eos_id
    by_token = pool_type in _BY_TOKEN
    if not by_token and pool_type not in _FIXED:
        known = ", ".join(f"'{name}'" for name in (*_BY_TOKEN, *_FIXED))
        raise ModelError(
            f"A text tower with pool_type '{pool_type}' is not supported: {known} are."
        )
    if len(tower.positional_embedding) != tower.context_length:
        raise ModelError(
            "A text tower with a class token of its own (embed_cls) is not supported: pooling at a word is."
        )
    matrix = tower.text_projection
    if matrix is None and by_token:
        # The token's position travels beside the blocks, to what lies before one.
        raise ModelError(
            f"A text tower without projection is not supported with pool_type '{pool_type}'."
        )
    pooling = _PooledToken(tower.ln_final, _FIXED.get(pool_type))
    after, mask = pooling if matrix is None else None, tower.attn_mask
    segments = _block_segments(
        tower.transformer, f"{prefix}transformer", _Tokens(tower), mask, recipe, after
    )
    if matrix is not None:
        layer = _projection(tower, matrix, recipe)
        segments.append(
            Segment(
                f"{prefix}text_projection", "projection", layer, before=pooling, takes_side=by_token
            )
        )
    return BlockChain(segments, side=PooledPosition(pool_type, eos_id) if by_token else None)
