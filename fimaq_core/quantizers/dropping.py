"""Random masks from a counter-based generator: a pure function of a key and an element's number.

A mask is the same on every device, in a compiled step and in a CUDA graph. It costs a few integer
operations, which fuse with the arithmetic around them. Four neighbouring elements share one 32-bit
word, one byte each, so probabilities are multiples of 1/256.

A word is a hash of its number and a 64-bit key by multiplications and xor-shifts. Each half of the
key enters before one of the first two multiplications. The multipliers are the golden ratio and
those of the MurmurHash3 finalizer (A. Appleby). The hash is not for cryptography.
"""

import torch
from torch import Tensor

# Multipliers as signed 32-bit integers: 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35.
_GOLDEN, _FIRST, _SECOND = -1640531527, -2048144789, -1028477387


def threshold_of(probability: float) -> int:
    """Round ``probability`` to a number of the 256 values of a byte."""
    return round(probability * 256)


def draw_keys(count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` random keys (count, 2) int32 on the CPU from a CPU generator."""
    return torch.randint(-(2**31), 2**31, (count, 2), generator=generator).to(torch.int32)


def _words(numbers: Tensor, key: Tensor) -> Tensor:
    """Compute random words (int32) for word numbers (int32, any shape) and a key (2,)."""
    # A right shift of a negative number copies the sign bit; the bit masks remove the copies.
    h = numbers * _GOLDEN + key[0]
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * _FIRST + key[1]
    h = h ^ ((h >> 13) & 0x7FFFF)
    h = h * _SECOND
    return h ^ ((h >> 16) & 0xFFFF)


def traced_mask(like: Tensor, key: Tensor, threshold: int) -> Tensor:
    """Draw a boolean mask of the shape of ``like``, True with probability ``threshold / 256``.

    This form is for compiled code: it computes the word of each element.
    """
    number = torch.arange(like.numel(), device=like.device, dtype=torch.int32)
    word = _words(number >> 2, key)
    byte = (word >> ((number & 3) * 8)) & 255
    return (byte < threshold).view(like.shape)


def eager_mask(
    like: Tensor, key: Tensor, threshold: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw the same mask as ``dtype`` (float is fastest on CPUs); it computes each word once."""
    if threshold > 255:  # does not fit into a byte
        return torch.ones(like.shape, dtype=dtype, device=like.device)
    count = like.numel()
    number = torch.arange((count + 3) // 4, device=like.device, dtype=torch.int32)
    draws = _words(number, key).view(torch.uint8)[:count].view(like.shape)
    return torch.lt(draws, threshold, out=torch.empty(like.shape, dtype=dtype, device=like.device))
