"""Family of timm's ViT and DeiT (with and without distillation), also without classifier.

A model pools a token, the mean of all tokens, or by attention (SigLIP).
"""

import torch
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, NormPair, Segment
from fimaq_core.errors import ModelError
from fimaq_core.families import expect
from fimaq_core.families.attention import attend, join_heads, products, split_heads
from fimaq_core.families.parts import classifier, mlp_parts, norm_pair, swap_mlp, swap_patch_embed
from fimaq_core.families.rotation import Stream, not_rotated
from fimaq_core.layers import QuantLinear
from fimaq_core.recipe import Recipe


class ExplicitAttention(nn.Module):
    """timm's ``Attention`` (ViT, DeiT) as explicit operations on x (B, N, C), without masks."""

    split = "qkv", 3  # layer and number of parts for :func:`.split_heads`

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        attention = expect(module, "Attention of a ViT", Attention)
        if attention.gate is not None:
            raise ModelError("Attention with a gate is not supported for ViT models.")
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
        pair = self.query_key, self.attention_value
        heads = attend(pair, self.q_norm(q), self.k_norm(k), v, self.scale)
        projected: Tensor = self.proj(self.norm(join_heads(heads)))
        return projected


class ExplicitAttentionPool(nn.Module):
    """timm's ``AttentionPoolLatent`` (SigLIP) as explicit operations, with the norm before it.

    Learned queries attend to all tokens but the first ``skipped``. The last block's output (B, N,
    C) gives (B, C). The norm is here, not in the full-precision part before the block, because
    reparameterisation changes it together with ``kv``. ``after`` follows in full precision.
    """

    split = "kv", 2
    query: Tensor  # (1, heads, latents, d) buffer: the queries after their projection and norm
    pos_embed: nn.Parameter | None

    def __init__(
        self,
        module: nn.Module,
        norm: nn.Module,
        skipped: int,
        recipe: Recipe,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        pool = expect(module, "Attention pooling", AttentionPoolLatent)
        if pool.pool not in ("token", "avg"):
            raise ModelError("Attention pooling to several tokens is not supported.")
        if not isinstance(pool.proj, nn.Linear):
            raise ModelError("Attention pooling without a projection is not supported.")
        self.num_heads, self.scale, self.pool = pool.num_heads, pool.scale, pool.pool
        self.skipped, self.norm_in = skipped, norm
        self.register_parameter("pos_embed", pool.pos_embed)
        self.kv = QuantLinear.from_float(pool.kv, recipe.w_bits, recipe.a_bits)
        self.k_norm = pool.k_norm
        self.query_key, self.attention_value = products(recipe)
        self.proj = QuantLinear.from_float(pool.proj, recipe.w_bits, recipe.a_bits)
        self.norm, self.mlp = pool.norm, pool.mlp
        swap_mlp(self.mlp, recipe)
        self.after = nn.Identity() if after is None else after
        # The queries are the same for all images, so they are projected once, in full precision.
        # As operands of a product they are quantized.
        with torch.no_grad():
            latents = pool.q(pool.latent).reshape(1, pool.latent_len, -1)
            (query,) = split_heads(latents, 1, self.num_heads)
            self.register_buffer("query", pool.q_norm(query).detach().contiguous())

    @property
    def pairs(self) -> tuple[NormPair, ...]:
        """Norms that can be reparameterised, with the layers behind them."""
        # Added positions stand between the norm and kv, which prevents reparameterisation.
        first = norm_pair(self.norm_in, "kv") if self.pos_embed is None else ()
        return first + norm_pair(self.norm, "mlp.fc1")

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_in(x)[:, self.skipped :]
        if self.pos_embed is not None:
            x = x + self.pos_embed
        k, v = split_heads(self.kv(x), 2, self.num_heads)
        pair, query = (
            (self.query_key, self.attention_value),
            self.query.expand(x.shape[0], -1, -1, -1),
        )
        heads = attend(pair, query, self.k_norm(k), v, self.scale)
        x = self.proj(join_heads(heads))
        x = x + self.mlp(self.norm(x))
        pooled: Tensor = self.after(x[:, 0] if self.pool == "token" else x.mean(dim=1))
        return pooled


class _Embedding(nn.Module):
    """Part between patch embedding and first block: prefix tokens, position embedding, norm."""

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
    """Part between last block and head: norm and pooling to (B, C).

    For DeiT's two heads it keeps the class token and the distillation token, (B, 2, C).
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self._model = [model]
        self.norm, self.fc_norm = model.norm, model.fc_norm

    def forward(self, x: Tensor) -> Tensor:
        model, x = self._model[0], self.norm(x)
        two = isinstance(model, VisionTransformerDistilled)
        pooled: Tensor = x[:, :2] if two else self.fc_norm(model.pool(x))
        return pooled


class _TwoHeads(nn.Module):
    """Mean of DeiT's two heads: (B, 2, C) to (B, classes)."""

    def __init__(self, head: nn.Module, head_dist: nn.Module) -> None:
        super().__init__()
        self.head, self.head_dist = head, head_dist

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return logits


class _LastBlock(nn.Module):
    """Last block, followed by the full-precision part at the end of the model."""

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
    """Cut a ViT into patch embedding, blocks and attention pooling; reuse its parameters.

    Args:
        model: model of a class that :class:`ViTFamily` matches.
        prefix: first characters of the segments' labels.
        ends: True if no quantized layer follows. The last block then includes the pooling, because
            a segment without quantizers would have nothing to calibrate or to learn.

    Returns:
        The segments, and the full-precision part between the last segment and the head.

    Raises:
        ModelError: blocks, attention, MLP or pooling are of a kind that is not supported.
    """
    swap_patch_embed(model.patch_embed, recipe)
    stream = Stream(model.embed_dim, recipe)
    embedding = _start(model, stream)
    segments = [Segment(f"{prefix}patch_embed", "patch_embed", model.patch_embed)]
    rest: nn.Module = _Pooling(model) if model.attn_pool is None else model.fc_norm
    for number, block in enumerate(model.blocks):
        block = expect(block, "A transformer block", Block)
        block.attn = ExplicitAttention(block.attn, recipe)
        swap_mlp(block.mlp, recipe)
        stream.block(block)
        last = ends and model.attn_pool is None and number == len(model.blocks) - 1
        segments.append(
            Segment(
                f"{prefix}blocks.{number}",
                "block",
                _LastBlock(block, rest) if last else block,
                before=embedding if number == 0 else None,
                pairs=norm_pair(block.norm1, "attn.qkv") + norm_pair(block.norm2, "mlp.fc1"),
                mlps=mlp_parts(block.mlp),
            )
        )
    if model.attn_pool is not None:
        skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
        after = rest if ends else None
        pool = ExplicitAttentionPool(model.attn_pool, model.norm, skipped, recipe, after)
        if stream.on and pool.pos_embed is not None:
            raise not_rotated("attention pooling with position embeddings")
        stream.read(model.norm, pool.kv)
        mlps = mlp_parts(pool.mlp)
        segments.append(Segment(f"{prefix}attn_pool", "block", pool, pairs=pool.pairs, mlps=mlps))
    elif stream.on and ends:
        raise not_rotated("a norm at its end that no layer follows")
    return segments, nn.Identity() if ends else rest


def _start(model: VisionTransformer, stream: Stream) -> nn.Module:
    """Return the part between patch embedding and first block, where the stream starts."""
    embedding, norm = _Embedding(model), model.norm_pre
    if isinstance(norm, nn.Identity):
        norm = model.patch_embed.norm
    if isinstance(norm, nn.Identity):
        stream.write(model.patch_embed.proj)
        stream.write_tokens(*embedding.parameters())
    return stream.start(embedding, norm)


def read_pooled(model: VisionTransformer, recipe: Recipe, *layers: nn.Module) -> None:
    """Fold the rotation of a ViT's stream into the linear layers behind norm and pooling.

    Attention pooling has its own layers for that. Raises ModelError for pooling by the maximum, and
    for a norm before and after the pooling.
    """
    stream = Stream(model.embed_dim, recipe)
    if not stream.on or model.attn_pool is not None:
        return
    if model.global_pool not in ("", "token", "avg"):
        raise not_rotated(f"pooling of kind {model.global_pool}")
    two = isinstance(model, VisionTransformerDistilled)
    norms = [model.norm] if two else [model.norm, model.fc_norm]
    kept = [norm for norm in norms if not isinstance(norm, nn.Identity)]
    if len(kept) > 1:
        raise not_rotated("two norms at its end")
    stream.read(kept[0] if kept else nn.Identity(), *layers)


class ViTFamily:
    """timm ``VisionTransformer`` and ``VisionTransformerDistilled`` with plain blocks."""

    name = "timm-vit"

    def matches(self, model: nn.Module) -> bool:
        """True for these two classes; False for their subclasses."""
        return type(model) in (VisionTransformer, VisionTransformerDistilled)

    def build(self, model: nn.Module, recipe: Recipe) -> BlockChain:
        """Cut ``model`` into :func:`vit_body` and head, if it has one. Raises ModelError."""
        assert isinstance(model, VisionTransformer)
        if type(model) is VisionTransformer and isinstance(model.head, nn.Identity):
            return BlockChain(vit_body(model, recipe, ends=True)[0])
        segments, rest = vit_body(model, recipe)
        heads = [classifier(model.head, recipe)]
        if isinstance(model, VisionTransformerDistilled):
            heads.append(classifier(model.head_dist, recipe))
        read_pooled(model, recipe, *heads)
        head = _TwoHeads(*heads) if len(heads) == 2 else heads[0]
        return BlockChain([*segments, Segment("head", "head", head, before=rest)])
