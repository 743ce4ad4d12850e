"""Model families: kinds of models, and how each is cut into segments."""

from torch import nn

from fimaq_core.errors import ModelError
from fimaq_core.family import Family

#: Families from elsewhere. They are asked before those of this package.
FAMILIES: list[Family] = []


def find_family(model: nn.Module) -> Family:
    """Find the family of a model by its type. A library is imported only for a model of its own.

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
