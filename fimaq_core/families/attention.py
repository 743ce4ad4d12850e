"""Attention as explicit operations, with its two products as quantizable layers."""

from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantLinear, QuantMatMul
from fimaq_core.recipe import Recipe

#: The two products of an attention: queries times keys, and softmax outputs times values. They are
#: :class:`.QuantMatMul`, or the forms of an export.
Products = tuple[nn.Module, nn.Module]


def products(recipe: Recipe) -> tuple[QuantMatMul, QuantMatMul]:
    """Make the two products of an attention."""
    softmax = recipe.softmax_bits, recipe.softmax_quantizer
    return QuantMatMul(recipe.a_bits), QuantMatMul(recipe.a_bits, *softmax)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split a projection (B, N, parts * heads * d) into ``parts`` tensors (B, heads, N, d)."""
    batch, tokens, channels = x.shape
    x = x.reshape(batch, tokens, parts, heads, channels // (parts * heads))
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def attend(
    pair: Products, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Compute ``softmax(q kᵀ · scale + mask) v`` (B, heads, N, d) by the two products ``pair``.

    q is (B, heads, N, d), k and v are (B, heads, M, d). The mask broadcasts to the scores (B,
    heads, N, M).
    """
    query_key, attention_value = pair
    scores = query_key(q, k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + mask
    out: Tensor = attention_value(scores.softmax(dim=-1), v)
    return out


def join_heads(heads: Tensor) -> Tensor:
    """Join heads (B, heads, N, d) to (B, N, heads * d)."""
    return heads.transpose(1, 2).flatten(2)


def additive_mask(visible: Tensor) -> Tensor:
    """Make the mask to add to scores: 0 where ``visible`` is True, minus infinity elsewhere."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, float("-inf"))


def linear_of(
    weight: nn.Parameter, bias: nn.Parameter | None, recipe: Recipe, input_bits: int
) -> QuantLinear:
    """Make a quantizable layer of a weight (out, in) and a bias without an ``nn.Linear``."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return QuantLinear.from_float(layer, recipe.w_bits, input_bits)


class ExplicitMultiheadAttention(nn.Module):
    """Self-attention of ``nn.MultiheadAttention`` as explicit operations.

    The arguments are the same. Inputs are (B, N, C) with ``batch_first``, else (N, B, C). The
    second output, the attention weights, is None.
    """

    #: ``nn.TransformerEncoderLayer`` calls its attention as a module only if this is None.
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention, recipe: Recipe) -> None:
        super().__init__()
        if type(attention) is not nn.MultiheadAttention or not attention._qkv_same_embed_dim:
            raise ModelError(
                f"Attention of type {type(attention).__name__} (or of several widths) is not "
                "supported: it has to be nn.MultiheadAttention without kdim and vdim."
            )
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ModelError(
                "nn.MultiheadAttention with keys of its own (add_bias_kv, add_zero_attn) is not "
                "supported."
            )
        self.num_heads, self.scale = attention.num_heads, attention.head_dim**-0.5
        self.batch_first = attention.batch_first
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.qkv = linear_of(weight, bias, recipe, recipe.a_bits)
        self.query_key, self.attention_value = products(recipe)
        self.proj = QuantLinear.from_float(attention.out_proj, recipe.w_bits, recipe.a_bits)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **_: bool,  # average_attn_weights and is_causal, which do not change the output
    ) -> tuple[Tensor, None]:
        if key is not query or value is not query:
            raise ModelError(
                "nn.MultiheadAttention with keys other than the queries (cross attention) is not "
                "supported."
            )
        if key_padding_mask is not None or (attn_mask is not None and attn_mask.ndim != 2):
            raise ModelError("nn.MultiheadAttention with a mask per sample is not supported.")
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = additive_mask(~attn_mask)
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        out: Tensor = self.proj(self.attend(q, k, v, attn_mask))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Compute the attention of q, k and v (B, heads, N, d); return (B, N, heads * d)."""
        pair = self.query_key, self.attention_value
        return join_heads(attend(pair, q, k, v, self.scale, mask))


class ExplicitWindowAttention(nn.Module):
    """Swin's window attention as explicit operations, with position bias and shift mask.

    x is (B * windows, N, C): all windows of an image, then those of the next image. The mask is
    (windows, N, N) or None. ``attention`` is the module of timm or mmdet. ``bias`` (1, heads, N, N)
    is added to the scores. Its values come from ``table``, and are fixed after the training.
    """

    def __init__(self, attention: Any, bias: Tensor, table: Tensor, recipe: Recipe) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv = QuantLinear.from_float(attention.qkv, recipe.w_bits, recipe.a_bits)
        self.query_key, self.attention_value = products(recipe)
        self.proj = QuantLinear.from_float(attention.proj, recipe.w_bits, recipe.a_bits)
        #: Number of values in the table behind the buffer; the model's size counts the table.
        self.looked_up = {"bias": table.numel()}
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, channels = x.shape
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        scores = self.query_key(q * self.scale, k.transpose(-2, -1)) + self.bias
        if mask is not None:
            # No -1 for a size: the compiler could not prove the inferred size for all images.
            windows, heads = mask.shape[0], self.num_heads
            scores = scores.view(batch // windows, windows, heads, tokens, tokens)
            scores = (scores + mask[None, :, None]).view(batch, heads, tokens, tokens)
        out = self.attention_value(scores.softmax(dim=-1), v)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))
        return projected
