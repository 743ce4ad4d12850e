"""open_clip's transformer blocks with their attention written out, taken over from its modules."""

from open_clip.transformer import QuickGELU, ResidualAttentionBlock, Transformer
from torch import Tensor, nn

from fimaq_core.chain import MlpPart, Segment
from fimaq_core.errors import ModelError
from fimaq_core.families.attention import ExplicitMultiheadAttention, linear_of
from fimaq_core.families.parts import norm_pair, swap_linears
from fimaq_core.layers import QuantLinear
from fimaq_core.recipe import Recipe

#: The MLP of a block. OpenAI's models compute GELU as ``x sigmoid(1.702 x)``.
_MLP = MlpPart("mlp", fc1="c_fc", act="gelu", fc2="c_proj", gelu=(nn.GELU, QuickGELU))


class ExplicitBlock(nn.Module):
    """open_clip's ``ResidualAttentionBlock`` on one sequence, and behind it what a tower without a projection ends with.

    Args of ``forward``: x (B, N, C).

    Attributes:
        mask: (context, context) buffer that is added to the scores, its first N rows and columns for N tokens; or None.
    """

    mask: Tensor | None

    def __init__(self, block: ResidualAttentionBlock, mask: Tensor | None, recipe: Recipe, after: nn.Module | None) -> None:
        super().__init__()
        if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
            raise ModelError(
                f"A transformer block of type {type(block).__name__} (or with cross attention) is not supported for CLIP: "
                "only ResidualAttentionBlock is."
            )
        self.ln_1, self.ls_1, self.ln_2, self.mlp, self.ls_2 = block.ln_1, block.ls_1, block.ln_2, block.mlp, block.ls_2
        self.attn = ExplicitMultiheadAttention(block.attn, recipe)
        self.attn.batch_first = True
        # Made from the context's length, so no checkpoint needs it.
        self.register_buffer("mask", mask, persistent=False)
        if type(self.mlp) is not nn.Sequential or len(self.mlp) != 3:
            raise ModelError(f"An MLP of type {type(self.mlp).__name__} is not supported for CLIP.")
        swap_linears(self.mlp, _MLP, recipe)
        self.after = nn.Identity() if after is None else after

    def forward(self, x: Tensor) -> Tensor:
        normed, tokens = self.ln_1(x), x.shape[1]
        mask = None if self.mask is None else self.mask[:tokens, :tokens]
        x = x + self.ls_1(self.attn(normed, normed, normed, attn_mask=mask)[0])
        x = x + self.ls_2(self.mlp(self.ln_2(x)))
        out: Tensor = self.after(x)
        return out


def block_segments(
    transformer: nn.Module, prefix: str, embedding: nn.Module, mask: Tensor | None, recipe: Recipe, after: nn.Module | None = None
) -> list[Segment]:
    """Every block of a transformer as a segment.

    Args:
        transformer: open_clip's ``Transformer``.
        prefix: the transformer's name in the model.
        embedding: what precedes the first block, in full precision.
        mask: (context, context) added to the scores, or None.
        recipe: bits and quantizers.
        after: what follows the last block in full precision, where the tower ends with it.

    Raises:
        ModelError: a transformer, block, attention or MLP of a kind that is not supported.
    """
    if type(transformer) is not Transformer:
        raise ModelError(f"A transformer of type {type(transformer).__name__} is not supported for CLIP: only Transformer is.")
    segments, count = [], len(transformer.resblocks)
    for number, original in enumerate(transformer.resblocks):
        block = ExplicitBlock(original, mask, recipe, after if number == count - 1 else None)
        pairs = norm_pair(block.ln_1, "attn.qkv") + norm_pair(block.ln_2, "mlp.c_fc")
        before = embedding if number == 0 else None
        segments.append(Segment(f"{prefix}.resblocks.{number}", "block", block, before=before, pairs=pairs, mlps=(_MLP,)))
    return segments


def projection(owner: nn.Module, parameter: nn.Parameter | nn.Linear, recipe: Recipe) -> QuantLinear:
    """The quantizable form of a projection from pooled features to the embedding.

    Args:
        owner: whose it is, for the message.
        parameter: (width, d) matrix that features are multiplied with from the left, or a linear layer.
        recipe: its ``head_bits`` are those of the input.

    Raises:
        ModelError: something else.
    """
    if isinstance(parameter, nn.Linear):
        return QuantLinear.from_float(parameter, recipe.w_bits, recipe.classifier_bits)
    if not isinstance(parameter, nn.Parameter):
        raise ModelError(f"A projection of type {type(parameter).__name__} in {type(owner).__name__} is not supported.")
    # The one weight that is copied: a transposed view would not be contiguous, which weight files and searches ask for.
    return linear_of(nn.Parameter(parameter.detach().t().contiguous()), None, recipe, recipe.classifier_bits)
