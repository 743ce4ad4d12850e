"""Family of timm's Swin Transformer."""

from collections import OrderedDict

import torch
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.errors import ModelError
from fimaq_core.families import expect
from fimaq_core.families.attention import ExplicitWindowAttention
from fimaq_core.families.parts import classifier, mlp_parts, norm_pair, swap_mlp, swap_patch_embed
from fimaq_core.families.rotation import Stream, not_rotated
from fimaq_core.layers import QuantLinear
from fimaq_core.recipe import Recipe


class ExplicitSwinBlock(nn.Module):
    """timm's ``SwinTransformerBlock`` for x (B, H, W, C), with a pad value that can change.

    timm pads windows with zeros after the first norm. If LayerNorm reparameterisation shifts that
    norm's output per channel, ``pad`` (channels,) replaces the zeros.
    """

    pad: Tensor
    mask: Tensor | None

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        block = expect(module, "A Swin block", SwinTransformerBlock)
        attention = expect(block.attn, "Attention of a Swin model", WindowAttention)
        if block.dynamic_mask:
            raise ModelError("A Swin block with a dynamic mask is not supported.")
        self.window_size, self.shift_size = block.window_size, block.shift_size
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        bias, table = attention._get_rel_pos_bias(), attention.relative_position_bias_table
        self.attn = ExplicitWindowAttention(attention, bias, table, recipe)
        swap_mlp(self.mlp, recipe)
        self.register_buffer("pad", torch.zeros(block.dim))
        assert block.attn_mask is None or isinstance(block.attn_mask, Tensor)
        self.register_buffer("mask", block.attn_mask, persistent=False)
        self.after: nn.Module = nn.Identity()  # the end of a model without classifier

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._windows(self.norm1(x))
        tokens = x.flatten(1, 2)
        out: Tensor = self.after((tokens + self.mlp(self.norm2(tokens))).view_as(x))
        return out

    def _windows(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        shifted = any(self.shift_size)
        if shifted:
            x = torch.roll(x, shifts=(-self.shift_size[0], -self.shift_size[1]), dims=(1, 2))
        down, right = -height % self.window_size[0], -width % self.window_size[1]
        if down or right:
            # This pads x with `pad`: subtract it, pad with zeros, and add it again.
            x = F.pad(x - self.pad, (0, 0, 0, right, 0, down)) + self.pad
        windows = window_partition(x, self.window_size).flatten(1, 2)
        out = self.attn(windows, self.mask).view(-1, *self.window_size, channels)
        x = window_reverse(out, self.window_size, height + down, width + right)[:, :height, :width]
        return torch.roll(x, shifts=self.shift_size, dims=(1, 2)) if shifted else x


class SwinFamily:
    """timm ``SwinTransformer``."""

    name = "timm-swin"

    def matches(self, model: nn.Module) -> bool:
        """True for this class; False for its subclasses."""
        return type(model) is SwinTransformer

    def build(self, model: nn.Module, recipe: Recipe) -> BlockChain:
        """Cut ``model`` into patch embedding, blocks, mergings and head; reuse its parameters.

        Without a classifier, norm and pooling are part of the last block.

        Raises:
            ModelError: a part is of a kind that is not supported.
        """
        assert isinstance(model, SwinTransformer)
        embed = swap_patch_embed(model.patch_embed, recipe)
        segments = [Segment("patch_embed", "patch_embed", embed)]
        stream = Stream(model.embed_dim, recipe)
        if isinstance(embed.norm, nn.Identity):
            stream.write(embed.proj)
        start: nn.Module | None = stream.start(nn.Identity(), embed.norm)
        for stage_number, stage in enumerate(model.layers):
            label, stage = f"layers.{stage_number}", expect(stage, "A stage", SwinTransformerStage)
            merging = expect(stage.downsample, "Downsampling", nn.Identity, PatchMerging)
            if isinstance(merging, PatchMerging):
                linear = merging.reduction
                merging.reduction = QuantLinear.from_float(linear, recipe.w_bits, recipe.a_bits)
                stream.read(merging.norm, merging.reduction, copies=4)
                stream = Stream(merging.out_dim, recipe)
                stream.write(merging.reduction)
                pairs = norm_pair(merging.norm, "reduction")
                segments.append(Segment(f"{label}.downsample", "merge", merging, pairs=pairs))
            for number, original in enumerate(stage.blocks):
                block = ExplicitSwinBlock(original, recipe)
                stream.block(block, pad=block.pad)
                pairs = norm_pair(block.norm1, "attn.qkv", "pad")
                pairs += norm_pair(block.norm2, "mlp.fc1")
                mlps, name = mlp_parts(block.mlp), f"{label}.blocks.{number}"
                segments.append(Segment(name, "block", block, start, pairs=pairs, mlps=mlps))
                start = None
        if isinstance(model.head.fc, nn.Identity):
            if stream.on:
                raise not_rotated("a norm at its end that no layer follows")
            block.after = nn.Sequential(model.norm, model.head.global_pool)
            return BlockChain(segments)
        fc = classifier(model.head.fc, recipe)
        if stream.on and model.head.global_pool.pool_type not in ("", "avg"):
            raise not_rotated(f"pooling of kind {model.head.global_pool.pool_type}")
        stream.read(model.norm, fc)
        head = nn.Sequential(OrderedDict(global_pool=model.head.global_pool, fc=fc))
        segments.append(Segment("head", "head", head, before=model.norm))
        return BlockChain(segments)
