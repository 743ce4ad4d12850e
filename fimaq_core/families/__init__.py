"""Model families: kinds of models, and how each is cut into segments."""

from typing import Protocol

from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.recipe import Recipe


class Family(Protocol):
    """A kind of model: how to recognise it, by type and never by name, and how to cut it."""

    name: str

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family."""
        ...

    def build(self, model: nn.Module, recipe: Recipe) -> BlockChain:
        """Turn ``model`` into a chain, reusing its parts, with layers swapped for quantizable ones.

        In full precision the chain's output equals the model's to rounding.

        Raises:
            ModelError: the model has a part that the family does not support.
        """
        ...


#: Families from elsewhere. They are asked before those of this package.
FAMILIES: list[Family] = []


def find_family(model: nn.Module) -> Family:
    """Find a model's family by type. A library is imported only for a model of its own.

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
        f"{type(model).__name__} is a class that no model family knows: there are timm's ViT, DeiT "
        f"and Swin{own}. Give blocks= and head= to quantize() for a module of one's own; "
        "CONTRIBUTING.md shows how to add a family."
    )
