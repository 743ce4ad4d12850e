"""Attention written out, with its two products as quantizable layers."""

from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantLinear, QuantMatMul
from fimaq_core.recipe import Recipe

#: Queries times keys, and softmax outputs times values.
Products = tuple[QuantMatMul, QuantMatMul]


def products(recipe: Recipe) -> Products:
    """Make the two products of an attention."""
    softmax = recipe.softmax_bits, recipe.softmax_quantizer
    return QuantMatMul(recipe.a_bits), QuantMatMul(recipe.a_bits, *softmax)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split a projection (B, N, parts * heads * d) into ``parts`` tensors (B, heads, N, d)."""
    batch, tokens, channels = x.shape
    x = x.reshape(batch, tokens, parts, heads, channels // (parts * heads))
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def attend(
    by: Products, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """``softmax(q kᵀ · scale + mask) v`` (B, heads, N, d).

    q is (B, heads, N, d), k and v are (B, heads, M, d). The mask is added to the scores (B, heads,
    N, M).
    """
    query_key, attention_value = by
    scores = query_key(q, k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + mask
    out: Tensor = attention_value(scores.softmax(dim=-1), v)
    return out


def side_by_side(heads: Tensor) -> Tensor:
    """Join heads (B, heads, N, d) to (B, N, heads * d)."""
    return heads.transpose(1, 2).flatten(2)


def additive(seen: Tensor) -> Tensor:
    """Mask to add to scores: 0 where ``seen`` is True, minus infinity elsewhere."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))


def linear_of(
    weight: nn.Parameter, bias: nn.Parameter | None, recipe: Recipe, input_bits: int
) -> QuantLinear:
    """A quantizable layer with a weight (out, in) and bias that belong to no ``nn.Linear``."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return QuantLinear.from_float(layer, recipe.w_bits, input_bits)


class ExplicitMultiheadAttention(nn.Module):
    """Self-attention of ``nn.MultiheadAttention`` written out, with the same arguments.

    x is (B, N, C) with ``batch_first``, else (N, B, C). The attention weights in the output are
    None.
    """

    #: ``nn.TransformerEncoderLayer`` calls its attention as a module only if this is None.
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention, recipe: Recipe) -> None:
        super().__init__()
        if type(attention) is not nn.MultiheadAttention or not attention._qkv_same_embed_dim:
            raise ModelError(
                f"Attention of type {type(attention).__name__} (or of several widths) is not "
                "supported: nn.MultiheadAttention of one width is."
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
            raise ModelError("nn.MultiheadAttention with masks of single samples is not supported.")
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = additive(~attn_mask)
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        out: Tensor = self.proj(self.attend(q, k, v, attn_mask))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention (B, N, heads * d) of heads (B, heads, N, d)."""
        by = self.query_key, self.attention_value
        return side_by_side(attend(by, q, k, v, self.scale, mask))


class ExplicitWindowAttention(nn.Module):
    """Swin's window attention written out, with relative position bias and shift mask.

    x is (B * windows, N, C), with the windows of an image in a row; the mask is (windows, N, N) or
    None. ``attention`` is a library's own module. ``bias`` (1, heads, N, N) is added to the scores;
    it is looked up from ``table`` once, since the model does not change.
    """

    def __init__(self, attention: Any, bias: Tensor, table: Tensor, recipe: Recipe) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv = QuantLinear.from_float(attention.qkv, recipe.w_bits, recipe.a_bits)
        self.query_key, self.attention_value = products(recipe)
        self.proj = QuantLinear.from_float(attention.proj, recipe.w_bits, recipe.a_bits)
        #: By buffer: number of values in the table it is looked up from, for the model's size.
        self.looked_up = {"bias": table.numel()}
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, channels = x.shape
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        scores = self.query_key(q * self.scale, k.transpose(-2, -1)) + self.bias
        if mask is not None:
            # With all sizes given: the compiler cannot prove an inferred size for all images.
            windows, heads = mask.shape[0], self.num_heads
            scores = scores.view(batch // windows, windows, heads, tokens, tokens)
            scores = (scores + mask[None, :, None]).view(batch, heads, tokens, tokens)
        out = self.attention_value(scores.softmax(dim=-1), v)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))
        return projected
