"""Attention with its two products as quantizable layers, taken over from timm's modules."""

from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantLinear, QuantMatMul
from fimaq_core.recipe import Recipe


def products(recipe: Recipe) -> tuple[QuantMatMul, QuantMatMul]:
    """The two products of an attention: queries with keys, and softmax outputs with values."""
    return QuantMatMul(recipe.a_bits), QuantMatMul(recipe.a_bits, recipe.softmax_bits, recipe.softmax_quantizer)


def attend(
    query_key: QuantMatMul,
    attention_value: QuantMatMul,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """``softmax(q kᵀ · scale + mask) v`` by the two products of :func:`products`, heads side by side: (B, N, heads * d).

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, M, d).
        scale: factor of the scores.
        mask: added to the scores, broadcastable to (B, heads, N, M); minus infinity hides a key.
    """
    scores = query_key(q, k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + mask
    out: Tensor = attention_value(scores.softmax(dim=-1), v).transpose(1, 2).flatten(2)
    return out


class ExplicitAttention(nn.Module):
    """timm's ``Attention`` (ViT, DeiT) written out: qkv, ``q kᵀ``, softmax, ``softmax v``, projection.

    Args of ``forward``: x (B, N, C). The keyword arguments that timm's blocks pass must be unused.
    """

    def __init__(self, attention: Attention, recipe: Recipe) -> None:
        super().__init__()
        if type(attention) is not Attention or attention.gate is not None:
            raise ModelError(f"Attention of type {type(attention).__name__} (or with a gate) is not supported for ViT models.")
        self.num_heads, self.head_dim, self.scale = attention.num_heads, attention.head_dim, attention.scale
        self.qkv = QuantLinear.from_float(attention.qkv, recipe.w_bits, recipe.a_bits)
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        self.query_key, self.attention_value = products(recipe)
        self.proj = QuantLinear.from_float(attention.proj, recipe.w_bits, recipe.a_bits)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ModelError("Attention masks are not supported for ViT models.")
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        out = attend(self.query_key, self.attention_value, q, k, v, self.scale)
        projected: Tensor = self.proj(self.norm(out))
        return projected


class ExplicitWindowAttention(nn.Module):
    """Swin's window attention written out, with relative position bias and shift mask.

    Args of ``forward``: x (B * windows, N, C), an image's windows in a row; mask (windows, N, N) or None.
    """

    def __init__(
        self, qkv: nn.Linear, proj: nn.Linear, num_heads: int, scale: float, bias: Tensor, table: Tensor, recipe: Recipe
    ) -> None:
        """
        Args:
            qkv, proj: the linear layers, which are taken over.
            num_heads: into how many heads the channels fall.
            scale: factor of the queries.
            bias: (1, heads, N, N) added to the scores, looked up once, for the model is frozen.
            table: what it is looked up from.
            recipe: bits and quantizers.
        """
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.qkv = QuantLinear.from_float(qkv, recipe.w_bits, recipe.a_bits)
        self.query_key, self.attention_value = products(recipe)
        self.proj = QuantLinear.from_float(proj, recipe.w_bits, recipe.a_bits)
        #: Buffers looked up from smaller tables, and how many values their tables have: those are the model's size.
        self.looked_up = {"bias": table.numel()}
        self.register_buffer("bias", bias.detach().clone())

    @classmethod
    def from_timm(cls, attention: WindowAttention, recipe: Recipe) -> "ExplicitWindowAttention":
        """timm's ``WindowAttention`` written out. Takes over its parameters."""
        if type(attention) is not WindowAttention:
            raise ModelError(f"Attention of type {type(attention).__name__} is not supported for Swin models.")
        bias, table = attention._get_rel_pos_bias(), attention.relative_position_bias_table
        return cls(attention.qkv, attention.proj, attention.num_heads, attention.scale, bias, table, recipe)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, channels = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.query_key(q * self.scale, k.transpose(-2, -1)) + self.bias
        if mask is not None:
            # By all sizes, none to infer: of inferred ones the compiler cannot tell that they hold for every size of image.
            windows = mask.shape[0]
            scores = scores.view(batch // windows, windows, self.num_heads, tokens, tokens) + mask[None, :, None]
            scores = scores.view(batch, self.num_heads, tokens, tokens)
        out = self.attention_value(scores.softmax(dim=-1), v).transpose(1, 2).reshape(batch, tokens, channels)
        projected: Tensor = self.proj(out)
        return projected
