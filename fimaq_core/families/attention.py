"""Attention written out, with its two products as quantizable layers."""

import torch
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantLinear, QuantMatMul
from fimaq_core.recipe import Recipe


def products(recipe: Recipe) -> tuple[QuantMatMul, QuantMatMul]:
    """The two products of an attention: queries with keys, and softmax outputs with values."""
    return QuantMatMul(recipe.a_bits), QuantMatMul(
        recipe.a_bits, recipe.softmax_bits, recipe.softmax_quantizer
    )


def attend(
    by: tuple[QuantMatMul, QuantMatMul],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """``softmax(q kᵀ · scale + mask) v`` (B, heads, N, d) by the two products of :func:`products`.

    q is (B, heads, N, d), k and v (B, heads, M, d). The mask is added to the scores (B, heads, N,
    M).
    """
    query_key, attention_value = by
    scores = query_key(q, k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + mask
    out: Tensor = attention_value(scores.softmax(dim=-1), v)
    return out


def side_by_side(heads: Tensor) -> Tensor:
    """Heads (B, heads, N, d) as (B, N, heads * d)."""
    return heads.transpose(1, 2).flatten(2)


def additive(seen: Tensor) -> Tensor:
    """A mask to add to scores from one that is True where a key is seen."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))


def linear_of(
    weight: nn.Parameter, bias: nn.Parameter | None, recipe: Recipe, input_bits: int
) -> QuantLinear:
    """A quantizable layer of a weight (out, in) and a bias that no ``nn.Linear`` owned."""
    rows, columns = weight.shape
    layer = QuantLinear(columns, rows, bias is not None, recipe.w_bits, input_bits)
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


class ExplicitMultiheadAttention(nn.Module):
    """Self-attention of ``nn.MultiheadAttention`` written out, with the original's arguments.

    It returns None for the attention weights. x is (B, N, C) with ``batch_first``, else (N, B, C).
    """

    #: PyTorch's ``TransformerEncoderLayer`` calls its attention as a module only where this is None.
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention, recipe: Recipe) -> None:
        super().__init__()
        if type(attention) is not nn.MultiheadAttention or not attention._qkv_same_embed_dim:
            raise ModelError(
                f"Attention of type {type(attention).__name__} (or of several widths) is not supported: "
                "nn.MultiheadAttention of one width is."
            )
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ModelError(
                "nn.MultiheadAttention with keys of its own (add_bias_kv, add_zero_attn) is not supported."
            )
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.scale, self.batch_first = attention.head_dim**-0.5, attention.batch_first
        self.qkv = linear_of(
            attention.in_proj_weight, attention.in_proj_bias, recipe, recipe.a_bits
        )
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
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if key is not query or value is not query:
            raise ModelError(
                "nn.MultiheadAttention with keys other than the queries (cross attention) is not supported."
            )
        if key_padding_mask is not None or (attn_mask is not None and attn_mask.ndim != 2):
            raise ModelError("nn.MultiheadAttention with masks of single samples is not supported.")
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = additive(~mask)
        x = query if self.batch_first else query.transpose(0, 1)
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(self.attend(q, k, v, mask))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of heads (B, heads, N, d), heads side by side: (B, N, heads * d)."""
        return side_by_side(
            attend((self.query_key, self.attention_value), q, k, v, self.scale, mask)
        )


class ExplicitWindowAttention(nn.Module):
    """Swin's window attention written out, with relative position bias and shift mask.

    x is (B * windows, N, C), an image's windows in a row; the mask (windows, N, N) or None.
    ``scale`` is the queries' factor. ``bias`` (1, heads, N, N), added to the scores, is looked up
    once from ``table``, for the model is frozen.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        num_heads: int,
        scale: float,
        bias: Tensor,
        table: Tensor,
        recipe: Recipe,
    ) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.qkv = QuantLinear.from_float(qkv, recipe.w_bits, recipe.a_bits)
        self.query_key, self.attention_value = products(recipe)
        self.proj = QuantLinear.from_float(proj, recipe.w_bits, recipe.a_bits)
        #: Buffers looked up from smaller tables, and how many values their tables have: those are the model's size.
        self.looked_up = {"bias": table.numel()}
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, channels = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(batch, tokens, 3, self.num_heads, -1)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        scores = self.query_key(q * self.scale, k.transpose(-2, -1)) + self.bias
        if mask is not None:
            # By all sizes, none to infer: of inferred ones the compiler cannot tell that they hold for every size of image.
            windows = mask.shape[0]
            scores = (
                scores.view(batch // windows, windows, self.num_heads, tokens, tokens)
                + mask[None, :, None]
            )
            scores = scores.view(batch, self.num_heads, tokens, tokens)
        out = (
            self.attention_value(scores.softmax(dim=-1), v)
            .transpose(1, 2)
            .reshape(batch, tokens, channels)
        )
        projected: Tensor = self.proj(out)
        return projected
