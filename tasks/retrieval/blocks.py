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
    """open_clip's ``ResidualAttentionBlock`` on one sequence (B, N, C), and the end of a tower
    without a projection.

    ``mask`` (context, context) or None is added to the scores, its first N rows and columns for N
    tokens.
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
        return self.after(x + self.ls_2(self.mlp(self.ln_2(x))))


def block_segments(
    transformer: nn.Module, prefix: str, embedding: nn.Module, mask: Tensor | None, recipe: Recipe, after: nn.Module | None = None
) -> list[Segment]:
    """Every block of open_clip's ``Transformer``, called ``prefix`` in the model, as a segment.

    ``embedding`` precedes the first block and ``after`` follows the last, both in full precision;
    ``mask`` (context, context) is added to the scores.

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

    ``parameter`` is a matrix (width, d) that features are multiplied with from the left, or a
    linear layer; ``owner`` is for the message. Raises ModelError for anything else.
    """
    if isinstance(parameter, nn.Linear):
        return QuantLinear.from_float(parameter, recipe.w_bits, recipe.classifier_bits)
    if not isinstance(parameter, nn.Parameter):
        raise ModelError(f"A projection of type {type(parameter).__name__} in {type(owner).__name__} is not supported.")
    # The one weight that is copied: a transposed view would not be contiguous, which weight files and searches ask for.
    return linear_of(nn.Parameter(parameter.detach().t().contiguous()), None, recipe, recipe.classifier_bits)
