"""Model families: kinds of models, and how to cut a model of each kind into segments."""

from typing import Protocol, TypeVar

from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.recipe import Recipe

_Part = TypeVar("_Part")


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


def expect(part: object, what: str, *kinds: type[_Part]) -> _Part:
    """Return ``part`` if it is of one of these types; refuse others, even subclasses.

    A subclass may compute differently. ``what`` names the part in the message.

    Raises:
        ModelError: the part has another type.
    """
    for kind in kinds:
        if type(part) is kind:
            return part
    names = " or ".join(kind.__name__ for kind in kinds)
    raise ModelError(
        f"{what} of type {type(part).__name__} is not supported: it has to be {names}."
    )


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
