"""Model families: kinds of models, and how to cut a model of each kind into segments."""

from typing import Protocol

from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.recipe import Recipe


class Family(Protocol):
    """Kind of model: how to recognise it (by type, never by name) and how to cut it."""

    name: str

    def matches(self, model: nn.Module) -> bool:
        """True if ``model`` is of this family."""
        ...

    def build(self, model: nn.Module, recipe: Recipe) -> BlockChain:
        """Turn ``model`` into a chain that reuses its parts, with quantizable layers.

        In full precision, the chain's output equals the model's up to rounding errors.

        Raises:
            ModelError: the model has a part that the family does not support.
        """
        ...


#: Families that other packages add. They are tried before the families of this package.
FAMILIES: list[Family] = []


def find_family(model: nn.Module) -> Family:
    """Find a model's family by type. Imports timm only for a model of timm.

    Raises:
        ModelError: no family knows the model.
    """
    known = list(FAMILIES)
    if type(model).__module__.partition(".")[0] == "timm":
        from fimaq_core.families.swin import SwinFamily
        from fimaq_core.families.vit import ViTFamily

        known += [ViTFamily(), SwinFamily()]
    for family in known:
        if family.matches(model):
            return family
    own = "".join(f", {family.name}" for family in FAMILIES)
    raise ModelError(
        f"{type(model).__name__} is a class that no model family knows. Known are timm's ViT, DeiT "
        f"and Swin{own}. For your own module, give blocks= and head= to quantize(); "
        "CONTRIBUTING.md shows how to add a family."
    )
