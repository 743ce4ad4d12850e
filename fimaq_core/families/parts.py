"""Parts that the families share: an MLP's layers, the patch embedding, the classifier."""

from timm.layers.activations import GELUTanh
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from fimaq_core.chain import MlpPart, NormPair
from fimaq_core.errors import ModelError
from fimaq_core.families import expect
from fimaq_core.layers import QuantConv2d, QuantLinear
from fimaq_core.recipe import Recipe


def swap_mlp(mlp: nn.Module, recipe: Recipe) -> None:
    """Replace ``fc1`` and ``fc2`` of timm's ``Mlp`` by quantizable layers, in place."""
    swap_linears(expect(mlp, "An MLP", Mlp), MlpPart("mlp"), recipe)


def swap_linears(
    mlp: nn.Module, part: MlpPart, recipe: Recipe, input_bits: int | None = None
) -> None:
    """Replace the two linear layers of an MLP by quantizable ones, in place.

    ``input_bits`` are for the first layer's input; the default is the recipe's ``a_bits``.

    Raises:
        ModelError: a layer is not linear, or a GELU quantizer follows another activation.
    """
    fc1, act, fc2 = (getattr(mlp, name, None) for name in (part.fc1, part.act, part.fc2))
    if not isinstance(fc1, nn.Linear) or not isinstance(fc2, nn.Linear):
        raise ModelError(
            f"An MLP of type {type(mlp).__name__} without two linear layers is not supported."
        )
    kind = recipe.gelu_quantizer
    if kind != "uniform" and type(act) is not nn.GELU:
        raise ModelError(
            f"The GELU quantizer '{kind}' is made for GELU, and this MLP has "
            f"{type(act).__name__}: use uniform."
        )
    bits = recipe.a_bits if input_bits is None else input_bits
    setattr(mlp, part.fc1, QuantLinear.from_float(fc1, recipe.w_bits, bits))
    setattr(mlp, part.fc2, QuantLinear.from_float(fc2, recipe.w_bits, recipe.a_bits, kind))


def mlp_parts(mlp: nn.Module) -> tuple[MlpPart, ...]:
    """Describe a block's ``mlp`` for MLP reconstruction; empty if it has a norm before ``fc2``."""
    # For the tanh form of GELU, timm has a class and PyTorch has an option of nn.GELU.
    return (MlpPart("mlp", gelu=(nn.GELU, GELUTanh)),) if isinstance(mlp.norm, nn.Identity) else ()


def swap_patch_embed(module: nn.Module, recipe: Recipe) -> PatchEmbed:
    """Replace the projection of timm's ``PatchEmbed`` by a quantizable convolution; return it."""
    embed = expect(module, "A patch embedding", PatchEmbed)
    embed.proj = QuantConv2d.from_float(embed.proj, recipe.w_bits, recipe.patch_input_bits)
    return embed


def classifier(linear: nn.Module, recipe: Recipe) -> QuantLinear:
    """Make the quantizable form of a classifier, a linear layer. Raises ModelError for others."""
    if not isinstance(linear, nn.Linear):
        raise ModelError(
            "The model has no linear classifier: load it with its classes (num_classes > 0)."
        )
    return QuantLinear.from_float(linear, recipe.w_bits, recipe.classifier_bits)


def norm_pair(norm: nn.Module, linear: str, pad: str | None = None) -> tuple[NormPair, ...]:
    """Pair a norm with the layer ``linear``; empty unless it is a LayerNorm with parameters."""
    if isinstance(norm, nn.LayerNorm) and norm.weight is not None:
        return (NormPair(norm, linear, pad),)
    return ()
