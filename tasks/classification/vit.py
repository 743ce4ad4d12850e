"""Family of timm's ViT and DeiT (with and without the distillation token)."""

from timm.layers import PatchDropout
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.errors import ModelError
from fimaq_core.recipe import Recipe
from tasks.classification.attention import ExplicitAttention
from tasks.classification.parts import classifier, mlp_parts, norm_pair, swap_mlp, swap_patch_embed


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
    """Between last block and DeiT's two heads: norm, then class and distillation token, (B, 2, C)."""

    def __init__(self, model: VisionTransformerDistilled) -> None:
        super().__init__()
        self.norm = model.norm

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.norm(x)[:, :2]
        return tokens


class _TwoHeads(nn.Module):
    """DeiT's two heads, averaged: (B, 2, C) to (B, classes)."""

    def __init__(self, head: nn.Module, head_dist: nn.Module) -> None:
        super().__init__()
        self.head, self.head_dist = head, head_dist

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return logits


class ViTFamily:
    """timm ``VisionTransformer`` and ``VisionTransformerDistilled`` with plain blocks."""

    name = "timm-vit"

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` is exactly one of the two classes."""
        return type(model) in (VisionTransformer, VisionTransformerDistilled)

    def build(self, model: nn.Module, recipe: Recipe) -> BlockChain:
        """Cut ``model`` into patch embedding, blocks and head. Takes over its parameters.

        Raises:
            ModelError: blocks, attention, MLP or head of a kind that is not supported.
        """
        assert isinstance(model, VisionTransformer)
        if isinstance(model.patch_drop, PatchDropout):
            raise ModelError("Models with patch dropout are not supported.")
        if getattr(model, "attn_pool", None) is not None:
            raise ModelError("Models with attention pooling are not supported.")
        swap_patch_embed(model.patch_embed, recipe)
        segments = [Segment("patch_embed", "patch_embed", model.patch_embed)]
        for number, block in enumerate(model.blocks):
            if type(block) is not Block:
                raise ModelError(f"A transformer block of type {type(block).__name__} is not supported.")
            block.attn = ExplicitAttention(block.attn, recipe)
            swap_mlp(block.mlp, recipe)
            segments.append(
                Segment(
                    f"blocks.{number}",
                    "block",
                    block,
                    before=_Embedding(model) if number == 0 else None,
                    pairs=norm_pair(block.norm1, "attn.qkv") + norm_pair(block.norm2, "mlp.fc1"),
                    mlps=mlp_parts("mlp", block.mlp),
                )
            )
        if isinstance(model, VisionTransformerDistilled):
            heads = _TwoHeads(classifier(model.head, recipe), classifier(model.head_dist, recipe))
            segments.append(Segment("head", "head", heads, before=_TwoTokens(model)))
        else:
            segments.append(Segment("head", "head", classifier(model.head, recipe), before=_Pooling(model)))
        return BlockChain(segments)
