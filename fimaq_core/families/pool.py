"""timm's attention pooling with its two products as quantizable layers."""

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

from fimaq_core.chain import NormPair
from fimaq_core.errors import ModelError
from fimaq_core.families.attention import attend, products, side_by_side, split_heads
from fimaq_core.families.parts import norm_pair, swap_mlp
from fimaq_core.layers import QuantLinear
from fimaq_core.recipe import Recipe


class ExplicitAttentionPool(nn.Module):
    """timm's ``AttentionPoolLatent`` (SigLIP) written out, with the norm before it.

    Learned queries attend to all tokens but the first ``skipped``: x (B, N, C) of the last block
    gives (B, C). The norm is here, not in the full-precision part before the block, because
    reparameterisation changes it together with ``kv``. ``after`` follows in full precision.
    """

    query: Tensor  # (1, heads, latents, d) buffer: the queries after their projection and norm
    pos_embed: nn.Parameter | None

    def __init__(
        self,
        pool: AttentionPoolLatent,
        norm: nn.Module,
        skipped: int,
        recipe: Recipe,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if type(pool) is not AttentionPoolLatent or pool.pool not in ("token", "avg"):
            raise ModelError(
                f"Attention pooling of type {type(pool).__name__} (or to several tokens) is not "
                "supported."
            )
        if not isinstance(pool.proj, nn.Linear):
            raise ModelError("Attention pooling without a projection is not supported.")
        self.num_heads, self.scale, self.pool = pool.num_heads, pool.scale, pool.pool
        self.skipped = skipped
        self.norm_in = norm
        self.register_parameter("pos_embed", pool.pos_embed)
        self.kv = QuantLinear.from_float(pool.kv, recipe.w_bits, recipe.a_bits)
        self.k_norm = pool.k_norm
        self.query_key, self.attention_value = products(recipe)
        self.proj = QuantLinear.from_float(pool.proj, recipe.w_bits, recipe.a_bits)
        self.norm, self.mlp = pool.norm, pool.mlp
        swap_mlp(self.mlp, recipe)
        self.after = nn.Identity() if after is None else after
        # The queries depend on no image. Inference projects the learned latents once and keeps the
        # result, so their projection is not quantized; the queries are, as operands of a product.
        with torch.no_grad():
            latents = pool.q(pool.latent).reshape(1, pool.latent_len, -1)
            (query,) = split_heads(latents, 1, self.num_heads)
            self.register_buffer("query", pool.q_norm(query).detach().contiguous())

    @property
    def pairs(self) -> tuple[NormPair, ...]:
        """The norms that can be reparameterised."""
        # Positions that are added after the norm separate it from kv.
        first = norm_pair(self.norm_in, "kv") if self.pos_embed is None else ()
        return first + norm_pair(self.norm, "mlp.fc1")

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_in(x)[:, self.skipped :]
        if self.pos_embed is not None:
            x = x + self.pos_embed
        k, v = split_heads(self.kv(x), 2, self.num_heads)
        by, query = (self.query_key, self.attention_value), self.query.expand(len(x), -1, -1, -1)
        heads = attend(by, query, self.k_norm(k), v, self.scale)
        x = self.proj(side_by_side(heads))
        x = x + self.mlp(self.norm(x))
        pooled: Tensor = self.after(x[:, 0] if self.pool == "token" else x.mean(dim=1))
        return pooled
