"""mmdet's Swin Transformer written out on maps (B, H, W, C), quantizable, for images of any size.

All sizes follow from the input's by arithmetic, and no branch asks for one: a block compiled with
dynamic height and width runs every image without compiling again. So padding always goes through
the same operations, even where there is nothing to pad.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import MlpPart
from fimaq_core.errors import ModelError
from fimaq_core.families.attention import ExplicitWindowAttention
from fimaq_core.families.parts import swap_linears
from fimaq_core.layers import QuantConv2d, QuantLinear
from fimaq_core.recipe import Recipe
from tasks.detection.mm import FFN, PatchEmbed, PatchMerging, ShiftWindowMSA, SwinBlock, WindowMSA

#: What hides a key of another region from a query, as mmdet and timm have it.
_HIDDEN = -100.0


class ExplicitPatchEmbed(nn.Module):
    """mmdet's ``PatchEmbed``, quantizable: (B, 3, H, W) to (B, ⌈H / p⌉, ⌈W / p⌉, C).

    Raises ModelError for patches that overlap or are padded otherwise than below and to the right.
    """

    def __init__(self, embed: PatchEmbed, recipe: Recipe) -> None:
        super().__init__()
        if type(embed) is not PatchEmbed or type(embed.projection) is not nn.Conv2d:
            raise ModelError(f"A patch embedding of type {type(embed).__name__} (or its projection) is not supported.")
        conv = embed.projection
        _check_patches("A patch embedding", embed.adap_padding, conv)
        self.patch = conv.kernel_size
        self.projection = QuantConv2d.from_float(conv, recipe.w_bits, recipe.patch_input_bits)
        self.norm = checked_norm(embed.norm)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.patch[1], 0, -height % self.patch[0]))
        return self.norm(self.projection(x).permute(0, 2, 3, 1).contiguous())


class ExplicitPatchMerging(nn.Module):
    """mmdet's ``PatchMerging``, quantizable: (B, H, W, C) to (B, ⌈H / 2⌉, ⌈W / 2⌉, C').

    ``nn.Unfold`` keeps the four values of a channel side by side, where timm keeps the channels of
    a value. Raises ModelError for other patches than 2 x 2, side by side.
    """

    def __init__(self, merging: PatchMerging, recipe: Recipe) -> None:
        super().__init__()
        if type(merging) is not PatchMerging:
            raise ModelError(f"Downsampling of type {type(merging).__name__} is not supported.")
        _check_patches("A patch merging", merging.adap_padding, merging.sampler)
        if tuple(merging.sampler.kernel_size) != (2, 2):
            raise ModelError(f"A patch merging of {merging.sampler.kernel_size} cells is not supported: it has to be 2 x 2.")
        self.norm = checked_norm(merging.norm)
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
        if type(ffn) is not FFN or ffn.num_fcs != 2 or not ffn.add_identity or not isinstance(ffn.gamma2, nn.Identity):
            raise ModelError(f"An MLP of type {type(ffn).__name__} other than two layers and a residual is not supported.")
        self.fc1, self.act, self.fc2 = ffn.layers[0][0], ffn.layers[0][1], ffn.layers[1]
        swap_linears(self, MlpPart("mlp"), recipe)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ExplicitSwinBlock(nn.Module):
    """mmdet's ``SwinBlock`` on maps, with a pad value that LayerNorm reparameterisation can move.

    Windows are padded with zeros after the first norm, and shifted after that (timm shifts first).
    Once the norm's output has been shifted per channel, ``pad`` (channels,) holds the value that
    stands for zero.

    The MLP gets the map, not tokens: their number varies, so its scales stay per tensor. Positions
    in a window do not vary, so the attention may have a scale for each.
    """

    pad: Tensor

    def __init__(self, block: SwinBlock, recipe: Recipe) -> None:
        super().__init__()
        if type(block) is not SwinBlock or type(block.attn) is not ShiftWindowMSA:
            raise ModelError(f"A Swin block of type {type(block).__name__} (or its attention) is not supported.")
        self.window, self.shift = block.attn.window_size, block.attn.shift_size
        self.norm1, self.norm2 = checked_norm(block.norm1), checked_norm(block.norm2)
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
        x = self.attn(x.reshape(batch * rows * columns, size * size, channels), self._mask(rows, columns, x.device))
        x = x.view(batch, rows, columns, size, size, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * size, columns * size, channels)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        # A crop that may be all there is would be contiguous for some sizes, and compiled for both; this one never is.
        return F.pad(x, (0, 0, 0, 1))[:, :height, :width]

    def _mask(self, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """(windows, N, N): hides tokens that were not side by side before the shift; None without."""
        if not self.shift:
            return None
        down, across = (_regions(count, self.window, self.shift, device) for count in (rows, columns))
        region = 3 * down[:, None, :, None] + across[None, :, None, :]
        region = region.reshape(rows * columns, self.window * self.window)
        return torch.where(region[:, :, None] == region[:, None, :], 0.0, _HIDDEN)


def _regions(count: int, size: int, shift: int, device: torch.device) -> Tensor:
    """Strip of each line of ``count`` windows, (count, size): all but the last window, and that in
    two.
    """
    line = torch.arange(count * size, device=device)
    strip = (line >= (count - 1) * size).long() + (line >= count * size - shift).long()
    return strip.view(count, size)


def _window_attention(attention: WindowMSA, recipe: Recipe) -> ExplicitWindowAttention:
    if type(attention) is not WindowMSA:
        raise ModelError(f"Attention of type {type(attention).__name__} is not supported for Swin models.")
    table, index = attention.relative_position_bias_table, attention.relative_position_index
    bias = table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)[None]
    return ExplicitWindowAttention(attention.qkv, attention.proj, attention.num_heads, attention.scale, bias, table, recipe)


def checked_norm(norm: nn.Module | None) -> nn.Module:
    """``norm`` if it is a LayerNorm, the identity for None. Raises ModelError for any other."""
    if norm is not None and type(norm) is not nn.LayerNorm:
        raise ModelError(f"A norm of type {type(norm).__name__} is not supported for Swin models: it has to be LayerNorm.")
    return nn.Identity() if norm is None else norm


def _check_patches(what: str, padding: nn.Module | None, cut: nn.Conv2d | nn.Unfold) -> None:
    """Refuse patches that overlap, have holes, or are padded otherwise than below and to the right."""
    kernel, stride, pads, dilation = (tuple(getattr(cut, name)) for name in ("kernel_size", "stride", "padding", "dilation"))
    if stride != kernel or pads != (0, 0) or dilation != (1, 1) or getattr(padding, "padding", None) != "corner":
        raise ModelError(f"{what} with overlapping, dilated or otherwise padded patches is not supported.")
