"""Arithmetic of matrix products: float32, TF32 or bfloat16."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

#: ``tf32`` and ``bfloat16`` keep values in float32 and round the operands of matrix products.
Arithmetic = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in CUDA's float32 products and convolutions; CPUs have no TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def autocast(dtype: Arithmetic, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which matrix products run in bfloat16, if ``dtype`` is bfloat16."""
    if dtype != "bfloat16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def arithmetic(dtype: Arithmetic, device: torch.device) -> Iterator[None]:
    """Run matrix products in ``dtype``."""
    with tf32_allowed(dtype == "tf32"), autocast(dtype, device):
        yield
