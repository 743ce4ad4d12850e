"""Family of timm's ViT and DeiT (with and without distillation), also without classifier."""

from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.errors import ModelError
from fimaq_core.families.attention import attend, products, side_by_side, split_heads
from fimaq_core.families.parts import classifier, mlp_parts, norm_pair, swap_mlp, swap_patch_embed
from fimaq_core.families.pool import ExplicitAttentionPool
from fimaq_core.layers import QuantLinear
from fimaq_core.recipe import Recipe


class ExplicitAttention(nn.Module):
    """timm's ``Attention`` (ViT, DeiT) written out, for x (B, N, C), without masks."""

    def __init__(self, attention: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        if type(attention) is not Attention or attention.gate is not None:
            raise ModelError(
                f"Attention of type {type(attention).__name__} (or with a gate) is not supported "
                "for ViT models."
            )
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv = QuantLinear.from_float(attention.qkv, recipe.w_bits, recipe.a_bits)
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        self.query_key, self.attention_value = products(recipe)
        self.proj = QuantLinear.from_float(attention.proj, recipe.w_bits, recipe.a_bits)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ModelError("Attention masks are not supported for ViT models.")
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        by = self.query_key, self.attention_value
        heads = attend(by, self.q_norm(q), self.k_norm(k), v, self.scale)
        projected: Tensor = self.proj(self.norm(side_by_side(heads)))
        return projected


class _Embedding(nn.Module):
    """Between patch embedding and first block: prefix tokens, position embedding, norm."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self._model = [model]  # in a list: the chain must not own the model's blocks twice
        self.norm_pre = model.norm_pre
        for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
            value = getattr(model, name, None)
            if value is not None:
                self.register_parameter(name, value)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.norm_pre(self._model[0]._pos_embed(x))
        return embedded


class _Pooling(nn.Module):
    """Between last block and head: norm, pooling."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self._model = [model]
        self.norm, self.fc_norm = model.norm, model.fc_norm

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.fc_norm(self._model[0].pool(self.norm(x)))
        return pooled


class _TwoTokens(nn.Module):
    """Between last block and DeiT's heads: norm, then class and distillation token, (B, 2, C)."""

    def __init__(self, model: VisionTransformerDistilled) -> None:
        super().__init__()
        self.norm = model.norm

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.norm(x)[:, :2]
        return tokens


class _TwoHeads(nn.Module):
    """Mean of DeiT's two heads: (B, 2, C) to (B, classes)."""

    def __init__(self, head: nn.Module, head_dist: nn.Module) -> None:
        super().__init__()
        self.head, self.head_dist = head, head_dist

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return logits


class _LastBlock(nn.Module):
    """The last block, followed by the full-precision part that the model ends with."""

    def __init__(self, block: Block, after: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        out: Tensor = self.after(x)
        return out


def vit_body(
    model: VisionTransformer, recipe: Recipe, prefix: str = "", ends: bool = False
) -> tuple[list[Segment], nn.Module]:
    """Cut a ViT into patch embedding, blocks and attention pooling. Takes over its parameters.

    Args:
        model: of a class that :class:`ViTFamily` matches.
        prefix: of the segments' labels.
        ends: True if nothing quantized follows. The last block then goes on to the pooled output:
            a segment without quantizers would have nothing to calibrate or to learn.

    Returns:
        The segments, and the full-precision part from the output of the last segment to the head's
        input.

    Raises:
        ModelError: blocks, attention, MLP or pooling are of a kind that is not supported.
    """
    swap_patch_embed(model.patch_embed, recipe)
    segments = [Segment(f"{prefix}patch_embed", "patch_embed", model.patch_embed)]
    if model.attn_pool is not None:
        rest: nn.Module = model.fc_norm
    elif isinstance(model, VisionTransformerDistilled):
        rest = _TwoTokens(model)
    else:
        rest = _Pooling(model)
    for number, block in enumerate(model.blocks):
        if type(block) is not Block:
            kind = type(block).__name__
            raise ModelError(f"A transformer block of type {kind} is not supported.")
        block.attn = ExplicitAttention(block.attn, recipe)
        swap_mlp(block.mlp, recipe)
        last = ends and model.attn_pool is None and number == len(model.blocks) - 1
        segments.append(
            Segment(
                f"{prefix}blocks.{number}",
                "block",
                _LastBlock(block, rest) if last else block,
                before=_Embedding(model) if number == 0 else None,
                pairs=norm_pair(block.norm1, "attn.qkv") + norm_pair(block.norm2, "mlp.fc1"),
                mlps=mlp_parts("mlp", block.mlp),
            )
        )
    if model.attn_pool is not None:
        skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
        after = rest if ends else None
        pool = ExplicitAttentionPool(model.attn_pool, model.norm, skipped, recipe, after)
        mlps = mlp_parts("mlp", pool.mlp)
        segments.append(Segment(f"{prefix}attn_pool", "block", pool, pairs=pool.pairs, mlps=mlps))
    return segments, nn.Identity() if ends else rest


class ViTFamily:
    """timm ``VisionTransformer`` and ``VisionTransformerDistilled`` with plain blocks."""

    name = "timm-vit"

    def matches(self, model: nn.Module) -> bool:
        """True for exactly one of the two classes."""
        return type(model) in (VisionTransformer, VisionTransformerDistilled)

    def build(self, model: nn.Module, recipe: Recipe) -> BlockChain:
        """Cut ``model`` into :func:`vit_body` and head. Raises ModelError."""
        assert isinstance(model, VisionTransformer)
        segments, rest = vit_body(model, recipe)
        head: nn.Module = classifier(model.head, recipe)
        if isinstance(model, VisionTransformerDistilled):
            head = _TwoHeads(head, classifier(model.head_dist, recipe))
        return BlockChain([*segments, Segment("head", "head", head, before=rest)])
