"""Bits of single layers, which replace the recipe's bits there."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from fimaq_core.documents import read_yaml, shown
from fimaq_core.errors import RecipeError

#: Names of operands: weight and input of a layer; left and right operand of a product.
OPERANDS = ("w", "a", "b")
_Entry = tuple[str, tuple[tuple[str, int], ...]]


class BitsMap(tuple[_Entry, ...]):
    """Bits by layer and operand; immutable, so that recipes stay hashable.

    Layers are named as in the module map. A layer with a weight has the operands ``w`` (weight) and
    ``a`` (input), a product has ``a`` and ``b``. Operands that are left out keep the recipe's bits.

    Example:
        >>> bits = BitsMap.of({"blocks.3.attn.qkv": {"w": 3, "a": 4}})
        >>> bits.widths()
        {'blocks.3.attn.qkv': {'a': 4, 'w': 3}}
    """

    __slots__ = ()

    @classmethod
    def of(cls, content: object) -> "BitsMap":
        """Return the map of a mapping from names to ``{operand: bits}``. Raises ValueError."""
        if isinstance(content, cls):
            return content
        if not isinstance(content, Mapping):
            raise ValueError("give a mapping such as {blocks.3.attn.qkv: {w: 3, a: 4}}")
        return cls((name, _checked(name, content[name])) for name in sorted(content, key=str))

    def widths(self) -> dict[str, dict[str, int]]:
        """Return the bits by layer and operand."""
        return {name: dict(bits) for name, bits in self}

    def __str__(self) -> str:
        text = json.dumps(self.widths(), sort_keys=True)
        return f"mixed {hashlib.sha256(text.encode()).hexdigest()[:8]}"

    __repr__ = __str__  # messages quote recipes, and a map may have hundreds of entries

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(cls.widths)
        return core_schema.no_info_plain_validator_function(cls.of, serialization=written)


def _checked(name: object, bits: object) -> tuple[tuple[str, int], ...]:
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError(f"{shown(name)} is no name of a layer")
    if not isinstance(bits, Mapping) or not bits or not set(bits) <= {*OPERANDS}:
        raise ValueError(f"{name} needs bits by operand, such as {{w: 3, a: 4}} or {{a: 4, b: 4}}")
    for operand, value in bits.items():
        if type(value) is not int or not 2 <= value <= 8:
            raise ValueError(f"{name}.{operand} has {shown(value)} bits, outside 2 to 8")
    return tuple(sorted(bits.items()))


def read_bits_map(path: Path) -> dict[str, Any]:
    """Read the YAML file of a bits map: ``layer: {w: 3, a: 4}`` lines.

    Raises:
        RecipeError: the file is missing, is not YAML, or has an entry that is no layer's bits.
    """
    content = read_yaml(path, "bits map", RecipeError)
    try:
        return BitsMap.of(content).widths()
    except ValueError as error:
        raise RecipeError(f"The bits map {path} does not make sense: {error}.") from error
