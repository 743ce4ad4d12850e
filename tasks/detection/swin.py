"""mmdet's Swin Transformer written out on maps (B, H, W, C), quantizable, for images of any size.

All sizes follow from the input's by arithmetic, and no branch asks for one: a block compiled with
dynamic height and width runs every image. So padding always goes through the same operations.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import MlpPart
from fimaq_core.families.attention import ExplicitWindowAttention
from fimaq_core.families.parts import swap_linears
from fimaq_core.layers import QuantConv2d, QuantLinear
from fimaq_core.recipe import Recipe
from tasks.detection.mm import FFN, PatchEmbed, PatchMerging, SwinBlock, WindowMSA, expect

#: What hides a key of another region from a query, as mmdet and timm have it.
_HIDDEN = -100.0


class ExplicitPatchEmbed(nn.Module):
    """mmdet's ``PatchEmbed``, quantizable: (B, 3, H, W) to (B, ⌈H / p⌉, ⌈W / p⌉, C)."""

    def __init__(self, embed: PatchEmbed, recipe: Recipe) -> None:
        super().__init__()
        expect(embed, "A patch embedding", PatchEmbed)
        self.patch = embed.projection.kernel_size
        self.projection = QuantConv2d.from_float(
            embed.projection, recipe.w_bits, recipe.patch_input_bits
        )
        self.norm = embed.norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.patch[1], 0, -height % self.patch[0]))
        return self.norm(self.projection(x).permute(0, 2, 3, 1).contiguous())


class ExplicitPatchMerging(nn.Module):
    """mmdet's ``PatchMerging``, quantizable: (B, H, W, C) to (B, ⌈H / 2⌉, ⌈W / 2⌉, C')."""

    def __init__(self, merging: PatchMerging, recipe: Recipe) -> None:
        super().__init__()
        expect(merging, "Downsampling", PatchMerging)
        self.norm = merging.norm or nn.Identity()
        self.reduction = QuantLinear.from_float(merging.reduction, recipe.w_bits, recipe.a_bits)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rows, columns = (height + 1) // 2, (width + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        x = x.view(batch, rows, 2, columns, 2, channels).permute(0, 1, 3, 5, 2, 4)
        return self.reduction(self.norm(x.reshape(batch, rows, columns, 4 * channels)))


class ExplicitMlp(nn.Module):
    """mmcv's ``FFN`` of two layers without its residual connection and dropout."""

    def __init__(self, ffn: FFN, recipe: Recipe) -> None:
        super().__init__()
        expect(ffn, "An MLP", FFN)
        self.fc1, self.act, self.fc2 = ffn.layers[0][0], ffn.layers[0][1], ffn.layers[1]
        swap_linears(self, MlpPart("mlp"), recipe)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ExplicitSwinBlock(nn.Module):
    """mmdet's ``SwinBlock`` on maps, with a pad value that LayerNorm reparameterisation can move.

    Windows are padded with zeros after the first norm and then shifted (timm shifts first). Once
    the norm's output is shifted per channel, ``pad`` (channels,) stands for zero. The MLP gets the
    map, not tokens: their number varies, so its scales stay per tensor.
    """

    pad: Tensor

    def __init__(self, block: SwinBlock, recipe: Recipe) -> None:
        super().__init__()
        expect(block, "A Swin block", SwinBlock)
        self.window, self.shift = block.attn.window_size, block.attn.shift_size
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn = _window_attention(block.attn.w_msa, recipe)
        self.mlp = ExplicitMlp(block.ffn, recipe)
        self.register_buffer("pad", torch.zeros(block.ffn.embed_dims))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._windows(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _windows(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        size = self.window
        rows, columns = (height + size - 1) // size, (width + size - 1) // size
        x = F.pad(x, (0, 0, 0, columns * size - width, 0, rows * size - height))
        below = torch.arange(rows * size, device=x.device) >= height
        beside = torch.arange(columns * size, device=x.device) >= width
        outside = below[:, None] | beside
        x = torch.addcmul(x, outside[..., None].to(x.dtype), self.pad)
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = x.view(batch, rows, size, columns, size, channels).permute(0, 1, 3, 2, 4, 5)
        x = self.attn(
            x.reshape(batch * rows * columns, size * size, channels),
            self._mask(rows, columns, x.device),
        )
        x = x.view(batch, rows, columns, size, size, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * size, columns * size, channels)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        # A crop that may be all there is would be contiguous for some sizes, and compiled for both; this one never is.
        return F.pad(x, (0, 0, 0, 1))[:, :height, :width]

    def _mask(self, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """(windows, N, N): hides tokens that were not side by side before the shift."""
        if not self.shift:
            return None
        down, across = (
            _regions(count, self.window, self.shift, device) for count in (rows, columns)
        )
        region = 3 * down[:, None, :, None] + across[None, :, None, :]
        region = region.reshape(rows * columns, self.window * self.window)
        return torch.where(region[:, :, None] == region[:, None, :], 0.0, _HIDDEN)


def _regions(count: int, size: int, shift: int, device: torch.device) -> Tensor:
    """Strip of each line of ``count`` windows: all but the last window, and that in two."""
    line = torch.arange(count * size, device=device)
    strip = (line >= (count - 1) * size).long() + (line >= count * size - shift).long()
    return strip.view(count, size)


def _window_attention(attention: WindowMSA, recipe: Recipe) -> ExplicitWindowAttention:
    expect(attention, "Attention", WindowMSA)
    table, index = attention.relative_position_bias_table, attention.relative_position_index
    bias = table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)[None]
    return ExplicitWindowAttention(
        attention.qkv, attention.proj, attention.num_heads, attention.scale, bias, table, recipe
    )
