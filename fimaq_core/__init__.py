"""fimaq_core: block-wise post-training quantization of PyTorch vision transformers.

The package knows PyTorch, and timm where a model of it comes. A task adapter (see ``tasks``) turns
its model into a :class:`fimaq_core.chain.BlockChain` and hands it to :mod:`fimaq_core.pipeline`.
"""

__version__ = "0.1.0"

#: Raised whenever a change alters the numbers a recipe produces; part of every checkpoint's fingerprint.
NUMERICS_VERSION = 3
