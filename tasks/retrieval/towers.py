"""Towers of open_clip's CLIP models as chains of blocks with explicit attention.

A vision tower is open_clip's own ViT, or a timm ViT inside open_clip's ``TimmModel``. A text tower
is open_clip's transformer of token ids: ``CLIP`` holds its layers, ``CustomTextCLIP`` has them in
the part ``text``.
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
from fimaq_core.families.rotation import Stream, not_rotated
from fimaq_core.families.vit import read_pooled, vit_body
from fimaq_core.layers import QuantConv2d, QuantLinear
from fimaq_core.recipe import Recipe

#: Names of the towers.
TOWERS = ("vision", "text")
#: The MLP of a block. OpenAI's models compute GELU as ``x sigmoid(1.702 x)``.
_MLP = MlpPart("mlp", fc1="c_fc", act="gelu", fc2="c_proj", gelu=(nn.GELU, QuickGELU))
#: Kinds of text pooling: at a fixed position, and at a position that depends on the token ids.
_FIXED, _BY_TOKEN = {"first": 0, "last": -1}, ("argmax", "eos")


def build_towers(model: nn.Module, recipe: Recipe, towers: Sequence[str]) -> dict[str, BlockChain]:
    """Turn towers of a CLIP model into chains, by name; the chains take over its parameters.

    The chain "vision" maps images (n, 3, H, W) to embeddings (n, d); "text" maps token ids (n, L)
    int64. Embeddings are not normalised. In full precision, the chains equal ``encode_image`` and
    ``encode_text`` up to rounding.
    Raises ModelError: the model or a tower is not supported.
    """
    for name in towers:
        check_tower(model, name)
    build = {"vision": _vision_tower, "text": _text_tower}
    return {name: build[name](model, recipe) for name in towers}


def check_tower(model: nn.Module, name: str) -> None:
    """Raise ModelError unless ``model`` is a CLIP model of open_clip and has the tower ``name``."""
    if type(model) not in (CLIP, CustomTextCLIP):
        raise _unsupported("A model", "open_clip's CLIP and CustomTextCLIP", model)
    if name not in TOWERS:
        raise ModelError(f"There is no tower '{name}'.{suggest(name, TOWERS)}")


def _unsupported(what: str, supported: str, found: object = None) -> ModelError:
    """Return the error for ``what``; the message gives the type of ``found``."""
    kind = "" if found is None else f" of type {type(found).__name__}"
    return ModelError(f"{what}{kind} is not supported. Supported: {supported}.")


class ExplicitBlock(nn.Module):
    """open_clip's ``ResidualAttentionBlock`` on sequences (B, N, C), with explicit attention.

    ``mask`` (context, context) or None is added to the attention scores. ``after`` is applied to
    the output: the last block of a tower without projection has its pooling there.
    """

    mask: Tensor | None

    def __init__(self, block: ResidualAttentionBlock, mask: Tensor | None, recipe: Recipe) -> None:
        super().__init__()
        if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
            supported = "ResidualAttentionBlock without cross attention"
            raise _unsupported("A transformer block", supported, block)
        self.ln_1, self.ls_1, self.ln_2 = block.ln_1, block.ls_1, block.ln_2
        self.mlp, self.ls_2 = block.mlp, block.ls_2
        self.attn = ExplicitMultiheadAttention(block.attn, recipe)
        self.attn.batch_first = True
        # The mask follows from the context length, so checkpoints do not store it.
        self.register_buffer("mask", mask, persistent=False)
        if type(self.mlp) is not nn.Sequential or len(self.mlp) != 3:
            raise _unsupported("An MLP", "two linear layers with GELU between them", self.mlp)
        swap_linears(self.mlp, _MLP, recipe)
        self.after: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        normed, tokens = self.ln_1(x), x.shape[1]
        mask = None if self.mask is None else self.mask[:tokens, :tokens]
        x = x + self.ls_1(self.attn(normed, normed, normed, attn_mask=mask)[0])
        return self.after(x + self.ls_2(self.mlp(self.ln_2(x))))


def _block_segments(
    transformer: nn.Module,
    prefix: str,
    *,
    embedding: nn.Module,
    mask: Tensor | None,
    stream: Stream,
    recipe: Recipe,
) -> list[Segment]:
    """Return one segment per block, with ``embedding`` before the first block."""
    if type(transformer) is not Transformer:
        raise _unsupported("A transformer", "open_clip's Transformer", transformer)
    segments: list[Segment] = []
    for number, original in enumerate(transformer.resblocks):
        block = ExplicitBlock(original, mask, recipe)
        stream.block(
            block, norms=("ln_1", "ln_2"), mlp=(_MLP.fc1, _MLP.fc2), scales=("ls_1", "ls_2")
        )
        pairs = norm_pair(block.ln_1, "attn.qkv") + norm_pair(block.ln_2, "mlp.c_fc")
        before, label = None if segments else embedding, f"{prefix}.resblocks.{number}"
        segments.append(Segment(label, "block", block, before=before, pairs=pairs, mlps=(_MLP,)))
    return segments


def _projection(weight: nn.Module | nn.Parameter, recipe: Recipe) -> QuantLinear:
    """Return the projection to embeddings; ``weight`` is a linear layer or a matrix (width, d)."""
    if isinstance(weight, nn.Linear):
        return QuantLinear.from_float(weight, recipe.w_bits, recipe.classifier_bits)
    if not isinstance(weight, nn.Parameter):
        raise _unsupported("A projection", "a linear layer or a matrix", weight)
    # Files of weights and searches need contiguous tensors, so this weight is a copy.
    matrix = nn.Parameter(weight.detach().t().contiguous())
    return linear_of(matrix, None, recipe, recipe.classifier_bits)


class _Patches(nn.Module):
    """Patch features (B, C, h, w) to tokens (B, 1 + h * w, C): class token, positions and norm."""

    def __init__(self, tower: ClipVisionTransformer) -> None:
        super().__init__()
        self.class_embedding = tower.class_embedding
        self.positional_embedding = tower.positional_embedding
        self.ln_pre = tower.ln_pre

    def forward(self, x: Tensor) -> Tensor:
        patches = x.flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        return self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)


class _PooledPatches(nn.Module):
    """Tokens (B, 1 + N, C) to features (B, C): class token or mean of the patches, and the norm."""

    def __init__(self, tower: ClipVisionTransformer) -> None:
        super().__init__()
        self.ln_post, self.pool_type = tower.ln_post, tower.pool_type
        self.norm_last = tower.final_ln_after_pool

    def forward(self, x: Tensor) -> Tensor:
        if not self.norm_last:
            x = self.ln_post(x)
        x = x[:, 0] if self.pool_type == "tok" else x[:, 1:].mean(dim=1)
        return self.ln_post(x) if self.norm_last else x


def _vision_tower(model: nn.Module, recipe: Recipe) -> BlockChain:
    tower = model.visual
    if type(tower) is TimmModel:
        return _timm_tower(tower, recipe)
    if type(tower) is not ClipVisionTransformer:
        supported = "open_clip's VisionTransformer, and timm's VisionTransformer in TimmModel"
        raise _unsupported("A vision tower", supported, tower)
    supported = "pool_type 'tok' or 'avg', without attentional_pool and output_tokens"
    if tower.attn_pool is not None:
        raise _unsupported("VisionTransformer with attentional_pool (CoCa)", supported)
    if tower.pool_type not in ("tok", "avg"):
        raise _unsupported(f"VisionTransformer with pool_type '{tower.pool_type}'", supported)
    if tower.output_tokens:
        raise _unsupported("VisionTransformer with output_tokens", supported)
    conv = QuantConv2d.from_float(tower.conv1, recipe.w_bits, recipe.patch_input_bits)
    segments, pooling = [Segment("visual.conv1", "patch_embed", conv)], _PooledPatches(tower)
    patches = _Patches(tower)
    stream = Stream(tower.conv1.out_channels, recipe)
    if isinstance(tower.ln_pre, nn.Identity):
        stream.write(conv)
        stream.write_tokens(*patches.parameters())
    segments += _block_segments(
        tower.transformer,
        "visual.transformer",
        embedding=stream.start(patches, tower.ln_pre),
        mask=None,
        stream=stream,
        recipe=recipe,
    )
    if tower.proj is None:
        if stream.on:
            raise not_rotated("no projection of the images")
        segments[-1].block.after = pooling
    else:
        layer = _projection(tower.proj, recipe)
        stream.read(tower.ln_post, layer)
        segments.append(Segment("visual.proj", "projection", layer, before=pooling))
    return BlockChain(segments)


def _timm_tower(tower: TimmModel, recipe: Recipe) -> BlockChain:
    trunk = tower.trunk
    if type(trunk) is not VisionTransformer:
        raise _unsupported("TimmModel with a trunk", "timm's VisionTransformer", trunk)
    if trunk.attn_pool is None and not trunk.global_pool:
        raise _unsupported("TimmModel with a trunk that does not pool", "trunks that pool tokens")
    heads = _timm_heads(tower, recipe)
    segments, rest = vit_body(trunk, recipe, "visual.trunk.", ends=not heads)
    if heads:
        first = heads[0][1]
        read_pooled(trunk, recipe, getattr(first, "fc1", first))
    for label, head in heads:
        segments.append(Segment(label, "projection", head, before=rest))
        rest = nn.Identity()
    return BlockChain(segments)


def _timm_heads(tower: TimmModel, recipe: Recipe) -> list[tuple[str, nn.Module]]:
    """Return the projections of the trunk's pooled features, by name."""
    heads: list[tuple[str, nn.Module]] = []
    if not isinstance(tower.trunk.head, nn.Identity):
        heads.append(("visual.trunk.head", _projection(tower.trunk.head, recipe)))
    for name, part in tower.head.named_children():
        if isinstance(part, nn.Dropout):
            continue
        if type(part) is Mlp and isinstance(part.norm, nn.Identity):
            swap_linears(part, MlpPart(name), recipe, recipe.classifier_bits)
        elif isinstance(part, nn.Linear):
            part = _projection(part, recipe)
        else:
            what = f"TimmModel with {type(part).__name__} in its head"
            raise _unsupported(what, "a linear layer or an MLP")
        heads.append((f"visual.head.{name}", part))
    return heads


class _Tokens(nn.Module):
    """Token ids (B, L) to embedded tokens (B, L, C). It has no product to quantize."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.token_embedding = owner.token_embedding
        self.positional_embedding = owner.positional_embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]


class PooledPosition(nn.Module):
    """Position (B,) of the pooled token of each text (B, L).

    For ``pool_type`` "argmax" it is the first token with the highest id. For "eos" it is the first
    token ``eos_id``, or position 0 in a text without this token, as in open_clip.
    """

    def __init__(self, pool_type: str, eos_id: int) -> None:
        super().__init__()
        self.pool_type, self.eos_id = pool_type, eos_id

    def forward(self, ids: Tensor) -> Tensor:
        wanted = ids if self.pool_type == "argmax" else (ids == self.eos_id).int()
        return wanted.argmax(dim=-1)


class _PooledToken(nn.Module):
    """Tokens (B, L, C) to one token per text (B, C), followed by the norm.

    The token is at the fixed ``position``, or at the positions (B,) in ``side``.
    """

    def __init__(self, ln_final: nn.Module, position: int | None) -> None:
        super().__init__()
        self.ln_final, self.position = ln_final, position

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        position = self.position if side is None else side
        return self.ln_final(x[torch.arange(x.shape[0], device=x.device), position])


def _text_tower(model: nn.Module, recipe: Recipe) -> BlockChain:
    if isinstance(model, CLIP):
        tower, prefix, pool_type, eos_id = model, "", model.text_pool_type, model.text_eos_id
    else:
        tower, prefix = model.text, "text."
        if type(tower) is not TextTransformer:
            raise _unsupported("A text tower", "open_clip's TextTransformer", tower)
        for option in ("use_pad_mask", "output_tokens"):
            if getattr(tower, option):
                raise _unsupported(f"TextTransformer with {option}", f"models without {option}")
        pool_type, eos_id = tower.pool_type, tower.eos_id
    by_token, matrix = pool_type in _BY_TOKEN, tower.text_projection
    if not by_token and pool_type not in _FIXED:
        known = ", ".join(f"'{name}'" for name in (*_BY_TOKEN, *_FIXED))
        raise _unsupported(f"A text tower with pool_type '{pool_type}'", f"pool_type {known}")
    if len(tower.positional_embedding) != tower.context_length:
        what = "A text tower with its own class token (embed_cls)"
        raise _unsupported(what, "pooling at a token of the text")
    if matrix is None and by_token:
        # A chain gives the pooled position to a part before a block, here the projection.
        what = f"A text tower without projection and with pool_type '{pool_type}'"
        raise _unsupported(what, "a projection, or pooling at a fixed position")
    pooling = _PooledToken(tower.ln_final, _FIXED.get(pool_type))
    embedding = _Tokens(tower)
    stream = Stream(tower.positional_embedding.shape[-1], recipe)
    stream.write_tokens(*embedding.parameters())
    segments = _block_segments(
        tower.transformer,
        f"{prefix}transformer",
        embedding=embedding,
        mask=tower.attn_mask,
        stream=stream,
        recipe=recipe,
    )
    if matrix is None:
        if stream.on:
            raise not_rotated("no projection of the texts")
        segments[-1].block.after = pooling
    else:
        layer, label = _projection(matrix, recipe), f"{prefix}text_projection"
        stream.read(tower.ln_final, layer)
        segments.append(Segment(label, "projection", layer, before=pooling, takes_side=by_token))
    return BlockChain(segments, side=PooledPosition(pool_type, eos_id) if by_token else None)
