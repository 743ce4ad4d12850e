"""Vision towers: open_clip's own ViT, and a timm ViT in open_clip's adapter."""

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, MlpPart, Segment
from fimaq_core.errors import ModelError
from fimaq_core.families.parts import swap_linears
from fimaq_core.families.vit import vit_body
from fimaq_core.layers import QuantConv2d, QuantLinear
from fimaq_core.recipe import Recipe
from tasks.retrieval.blocks import block_segments, projection


class _Embedding(nn.Module):
    """Between patch convolution and first block: (B, C, h, w) to (B, 1 + h * w, C)."""

    def __init__(self, tower: VisionTransformer) -> None:
        super().__init__()
        self.class_embedding, self.positional_embedding = tower.class_embedding, tower.positional_embedding
        self.ln_pre = tower.ln_pre

    def forward(self, x: Tensor) -> Tensor:
        patches = x.flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        return self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)


class _Pooling(nn.Module):
    """Between last block and projection: class token or mean of the others, and the norm."""

    def __init__(self, tower: VisionTransformer) -> None:
        super().__init__()
        self.ln_post, self.pool_type, self.norm_last = tower.ln_post, tower.pool_type, tower.final_ln_after_pool

    def forward(self, x: Tensor) -> Tensor:
        if not self.norm_last:
            x = self.ln_post(x)
        x = x[:, 0] if self.pool_type == "tok" else x[:, 1:].mean(dim=1)
        return self.ln_post(x) if self.norm_last else x


def vision_tower(visual: nn.Module, recipe: Recipe) -> BlockChain:
    """The chain of ``model.visual``, from images (n, 3, H, W) to embeddings (n, d), not normalised.

    Raises ModelError for a tower of a kind that is not supported.
    """
    if type(visual) is VisionTransformer:
        return _open_clip_tower(visual, recipe)
    if type(visual) is TimmModel:
        return _timm_tower(visual, recipe)
    raise ModelError(
        f"A vision tower of type {type(visual).__name__} is not supported: open_clip's VisionTransformer and a timm "
        "VisionTransformer in TimmModel are."
    )


def _open_clip_tower(tower: VisionTransformer, recipe: Recipe) -> BlockChain:
    if tower.attn_pool is not None:
        raise ModelError("VisionTransformer with attentional_pool (CoCa) is not supported: pool_type 'tok' and 'avg' are.")
    if tower.pool_type not in ("tok", "avg"):
        raise ModelError(f"VisionTransformer with pool_type '{tower.pool_type}' is not supported: 'tok' and 'avg' are.")
    if tower.output_tokens:
        raise ModelError("VisionTransformer with output_tokens is not supported: load the model without it.")
    conv = QuantConv2d.from_float(tower.conv1, recipe.w_bits, recipe.patch_input_bits)
    pooling = _Pooling(tower)
    after = pooling if tower.proj is None else None
    blocks = block_segments(tower.transformer, "visual.transformer", _Embedding(tower), None, recipe, after)
    segments = [Segment("visual.conv1", "patch_embed", conv), *blocks]
    if tower.proj is not None:
        segments.append(Segment("visual.proj", "projection", projection(tower, tower.proj, recipe), before=pooling))
    return BlockChain(segments)


def _timm_tower(tower: TimmModel, recipe: Recipe) -> BlockChain:
    trunk = tower.trunk
    if type(trunk) is not TimmVisionTransformer:
        raise ModelError(f"TimmModel with a trunk of type {type(trunk).__name__} is not supported: VisionTransformer is.")
    if trunk.attn_pool is None and not trunk.global_pool:
        raise ModelError("TimmModel with a trunk that does not pool its tokens is not supported.")
    heads = _timm_heads(tower, recipe)
    segments, rest = vit_body(trunk, recipe, "visual.trunk.", ends=not heads)
    for label, head in heads:
        segments.append(Segment(label, "projection", head, before=rest))
        rest = nn.Identity()
    return BlockChain(segments)


def _timm_heads(tower: TimmModel, recipe: Recipe) -> list[tuple[str, nn.Module]]:
    """Projections of the trunk's pooled features, by name: its own classifier, or layers behind it."""
    heads: list[tuple[str, nn.Module]] = []
    if not isinstance(tower.trunk.head, nn.Identity):
        heads.append(("visual.trunk.head", projection(tower.trunk, tower.trunk.head, recipe)))
    for name, part in tower.head.named_children():
        if isinstance(part, nn.Dropout):
            continue
        if type(part) is Mlp and isinstance(part.norm, nn.Identity):
            swap_linears(part, MlpPart(name), recipe, recipe.classifier_bits)
            heads.append((f"visual.head.{name}", part))
        elif isinstance(part, nn.Linear):
            heads.append((f"visual.head.{name}", QuantLinear.from_float(part, recipe.w_bits, recipe.classifier_bits)))
        else:
            raise ModelError(f"TimmModel with {type(part).__name__} in its head is not supported: a linear layer or an MLP is.")
    return heads
