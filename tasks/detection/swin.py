"""mmdet's Swin Transformer as quantizable modules on maps (B, H, W, C), for images of any size.

All sizes follow from the input's size by arithmetic, without branches, and padding always uses the
same operations. So a block that is compiled with dynamic height and width runs every image.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import MlpPart
from fimaq_core.families import expect
from fimaq_core.families.attention import ExplicitWindowAttention
from fimaq_core.families.parts import swap_linears
from fimaq_core.layers import QuantConv2d, QuantLinear
from fimaq_core.recipe import Recipe
from tasks.detection.mm import FFN, PatchEmbed, PatchMerging, SwinBlock, WindowMSA

#: Value added to the scores of keys from another region, as in mmdet and timm.
_HIDDEN = -100.0


class ExplicitPatchEmbed(nn.Module):
    """mmdet's ``PatchEmbed``, quantizable: (B, 3, H, W) to (B, ⌈H / p⌉, ⌈W / p⌉, C)."""

    def __init__(self, embed: PatchEmbed, recipe: Recipe) -> None:
        super().__init__()
        expect(embed, "A patch embedding", PatchEmbed)
        projection, bits = embed.projection, recipe.patch_input_bits
        self.patch = projection.kernel_size
        self.projection = QuantConv2d.from_float(projection, recipe.w_bits, bits)
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


class AnySizeSwinBlock(nn.Module):
    """mmdet's ``SwinBlock`` on maps, with a pad value that LayerNorm reparameterisation can change.

    mmdet pads the map with zeros after the first norm, then shifts it (timm shifts first). If
    reparameterisation shifts that norm's output per channel, ``pad`` (channels,) replaces the
    zeros. The MLP takes the map, not tokens, so that its scales are per tensor: the number of
    tokens varies.
    """

    pad: Tensor

    def __init__(self, block: SwinBlock, recipe: Recipe) -> None:
        super().__init__()
        expect(block, "A Swin block", SwinBlock)
        self.window, self.shift = block.attn.window_size, block.attn.shift_size
        self.norm1, self.norm2 = block.norm1, block.norm2
        attention = block.attn.w_msa
        expect(attention, "Attention", WindowMSA)
        table, index = attention.relative_position_bias_table, attention.relative_position_index
        bias = table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)[None]
        self.attn = ExplicitWindowAttention(attention, bias, table, recipe)
        expect(block.ffn, "An MLP", FFN)
        (fc1, act, *_), fc2, *_ = block.ffn.layers
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=act, fc2=fc2))
        swap_linears(self.mlp, MlpPart("mlp"), recipe)
        self.register_buffer("pad", torch.zeros(block.ffn.embed_dims))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._windows(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _windows(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        size, shift = self.window, self.shift
        rows, columns = (height + size - 1) // size, (width + size - 1) // size
        x = F.pad(x, (0, 0, 0, columns * size - width, 0, rows * size - height))
        below = torch.arange(rows * size, device=x.device) >= height
        beside = torch.arange(columns * size, device=x.device) >= width
        outside = below[:, None] | beside
        x = torch.addcmul(x, outside[..., None].to(x.dtype), self.pad)
        if shift:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        x = x.view(batch, rows, size, columns, size, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch * rows * columns, size * size, channels)
        x = self.attn(x, self._mask(rows, columns, x.device))
        x = x.view(batch, rows, columns, size, size, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * size, columns * size, channels)
        if shift:
            x = torch.roll(x, shifts=(shift, shift), dims=(1, 2))
        # One more row makes the crop never contiguous. Otherwise it would be contiguous for some
        # sizes only, and the compiler would make two versions.
        return F.pad(x, (0, 0, 0, 1))[:, :height, :width]

    def _mask(self, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """Make the mask (windows, N, N) that hides tokens not adjacent before the shift."""
        if not self.shift:
            return None
        down = _regions(rows, self.window, self.shift, device)
        across = _regions(columns, self.window, self.shift, device)
        region = 3 * down[:, None, :, None] + across[None, :, None, :]
        region = region.reshape(rows * columns, self.window * self.window)
        return torch.where(region[:, :, None] == region[:, None, :], 0.0, _HIDDEN)


def _regions(count: int, size: int, shift: int, device: torch.device) -> Tensor:
    """Number the regions of the lines of ``count`` windows: 0, and 1 and 2 in the last window."""
    line = torch.arange(count * size, device=device)
    strip = (line >= (count - 1) * size).long() + (line >= count * size - shift).long()
    return strip.view(count, size)
