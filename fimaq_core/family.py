"""The protocol by which a task shows its models to the core."""

from typing import Protocol

from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.recipe import Recipe


class Family(Protocol):
    """A kind of model: how to recognise it and how to cut it into segments.

    A family matches by type, never by name. ``build`` swaps the layers of ``model`` for quantizable ones
    (it may reuse and change the model) and returns the chain; in full precision the chain's output equals
    the model's to rounding.
    """

    name: str

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family."""
        ...

    def build(self, model: nn.Module, recipe: Recipe) -> BlockChain:
        """Turn ``model`` into a chain.

        Raises:
            ModelError: the model has a part that the family does not support.
        """
        ...
