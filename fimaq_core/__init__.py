"""fimaq_core: block-wise post-training quantization of PyTorch vision transformers.

The package needs PyTorch, and timm only for timm's models. A task adapter (see ``tasks``) turns a
model into a :class:`fimaq_core.chain.BlockChain` for :mod:`fimaq_core.pipeline`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fimaq_core.api import QuantizedModel, load, quantize

__all__ = ["NUMERICS_VERSION", "QuantizedModel", "__version__", "load", "quantize"]

__version__ = "0.1.0"

#: Version of the arithmetic, raised with every change of a recipe's numbers; checkpoints hold it.
NUMERICS_VERSION = 3


def __getattr__(name: str) -> Any:
    """Import the functions for notebooks on first use, since these import PyTorch."""
    if name in ("QuantizedModel", "load", "quantize"):
        from fimaq_core import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
