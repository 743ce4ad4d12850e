"""Family of timm's Swin Transformer."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import cast

import torch
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.errors import ModelError
from fimaq_core.families.attention import ExplicitWindowAttention
from fimaq_core.families.parts import classifier, mlp_parts, norm_pair, swap_mlp, swap_patch_embed
from fimaq_core.layers import QuantLinear
from fimaq_core.recipe import Recipe


class ExplicitSwinBlock(nn.Module):
    """timm's ``SwinTransformerBlock`` with a pad value that reparameterisation can change.

    timm pads windows with zeros after the first norm. If LayerNorm reparameterisation shifts that
    norm's output per channel, ``pad`` (channels,) replaces zero. x is (B, H, W, C).
    """

    pad: Tensor
    mask: Tensor | None

    def __init__(self, block: SwinTransformerBlock, recipe: Recipe) -> None:
        super().__init__()
        if type(block) is not SwinTransformerBlock or block.dynamic_mask:
            raise ModelError(
                f"A Swin block of type {type(block).__name__} (or with a dynamic mask) is not "
                "supported."
            )
        attention = block.attn
        if type(attention) is not WindowAttention:
            raise ModelError(
                f"Attention of type {type(attention).__name__} is not supported for Swin models."
            )
        self.window_size, self.shift_size = block.window_size, block.shift_size
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        bias, table = attention._get_rel_pos_bias(), attention.relative_position_bias_table
        self.attn = ExplicitWindowAttention(attention, bias, table, recipe)
        swap_mlp(self.mlp, recipe)
        self.register_buffer("pad", torch.zeros(block.dim))
        assert block.attn_mask is None or isinstance(block.attn_mask, Tensor)
        self.register_buffer("mask", block.attn_mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._windows(self.norm1(x))
        tokens = x.flatten(1, 2)
        out: Tensor = (tokens + self.mlp(self.norm2(tokens))).view_as(x)
        return out

    def _windows(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        shifted = any(self.shift_size)
        if shifted:
            x = torch.roll(x, shifts=(-self.shift_size[0], -self.shift_size[1]), dims=(1, 2))
        down, right = -height % self.window_size[0], -width % self.window_size[1]
        if down or right:
            # Pads x with pad: it pads (x - pad) with zeros and adds pad again.
            x = F.pad(x - self.pad, (0, 0, 0, right, 0, down)) + self.pad
        windows = window_partition(x, self.window_size).flatten(1, 2)
        out = self.attn(windows, self.mask).view(-1, *self.window_size, channels)
        x = window_reverse(out, self.window_size, height + down, width + right)[:, :height, :width]
        return torch.roll(x, shifts=self.shift_size, dims=(1, 2)) if shifted else x


class SwinFamily:
    """timm ``SwinTransformer``."""

    name = "timm-swin"

    def matches(self, model: nn.Module) -> bool:
        """True for exactly that class."""
        return type(model) is SwinTransformer

    def build(self, model: nn.Module, recipe: Recipe) -> BlockChain:
        """Cut ``model`` into patch embedding, blocks, mergings and head. Takes over its parameters.

        Raises:
            ModelError: a part is of a kind that is not supported.
        """
        assert isinstance(model, SwinTransformer)
        swap_patch_embed(model.patch_embed, recipe)
        segments = [Segment("patch_embed", "patch_embed", model.patch_embed)]
        for stage_number, stage in enumerate(model.layers):
            label, merging = f"layers.{stage_number}", stage.downsample
            if type(merging) is PatchMerging:
                linear = merging.reduction
                merging.reduction = QuantLinear.from_float(linear, recipe.w_bits, recipe.a_bits)
                pairs = norm_pair(merging.norm, "reduction")
                segments.append(Segment(f"{label}.downsample", "merge", merging, pairs=pairs))
            elif not isinstance(merging, nn.Identity):
                raise ModelError(f"Downsampling of type {type(merging).__name__} is not supported.")
            for number, original in enumerate(cast("Iterable[SwinTransformerBlock]", stage.blocks)):
                block = ExplicitSwinBlock(original, recipe)
                pairs = norm_pair(block.norm1, "attn.qkv", "pad")
                pairs += norm_pair(block.norm2, "mlp.fc1")
                mlps, name = mlp_parts("mlp", block.mlp), f"{label}.blocks.{number}"
                segments.append(Segment(name, "block", block, pairs=pairs, mlps=mlps))
        fc = classifier(model.head.fc, recipe)
        head = nn.Sequential(OrderedDict(global_pool=model.head.global_pool, fc=fc))
        segments.append(Segment("head", "head", head, before=model.norm))
        return BlockChain(segments)
