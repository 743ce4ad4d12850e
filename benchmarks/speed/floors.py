"""What a step cannot be faster than: its arithmetic at the machine's matmul rate, its bytes at the machine's copy rate."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed.timing import best_seconds
from fimaq_core.numerics import Arithmetic, arithmetic

#: Bytes of a float32.
FLOAT = 4
#: Passes of a step over all rounded weights: soft weights read forward and backward and written; their gradient written
#: and read; α and two moments read and written; offset and gain read.
WEIGHT_PASSES = 13
#: Passes over a quantized activation: read and written forward, its gradient read and written backward.
ACTIVATION_PASSES = 4


@dataclass(frozen=True)
class Rates:
    """What the machine does at best, as measured.

    Attributes:
        flops: floating-point operations a second in large matrix products, in the steps' arithmetic.
        bytes: bytes a second in large copies, read and written ones counted.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """What a step does.

    Attributes:
        flops: floating-point operations of its matrix products and convolutions, forward and backward.
        bytes: see :func:`step_bytes`.
    """

    flops: int
    bytes: int


def measure_rates(device: torch.device, dtype: Arithmetic = "float32", size: int | None = None) -> Rates:
    """Measure both rates.

    Args:
        device: where.
        dtype: arithmetic of the matrix products.
        size: rows and columns of the matrices; None takes what fills the device. Copies move 16 times their bytes.
    """
    size = size or (8192 if device.type == "cuda" else 1536)
    left = torch.randn(size, size, device=device)
    right, out = torch.randn_like(left), torch.empty_like(left)
    source = torch.zeros(16 * size * size, device=device)
    target = torch.empty_like(source)

    def product() -> Tensor:
        return left @ right if dtype == "bfloat16" else torch.mm(left, right, out=out)

    with arithmetic(dtype, device):
        product()
        product_s = best_seconds(product, device, 8)
    target.copy_(source)
    copy_s = best_seconds(lambda: target.copy_(source), device, 5)
    return Rates(2 * size**3 / product_s, 2 * FLOAT * source.numel() / copy_s)


def step_bytes(batch: int, quantized: int, weights: int) -> int:
    """Bytes that a step must move at least: each tensor once for every pass that no fusion can save.

    Activations between quantizers (norms, GELU, softmax, the products' outputs) could all be fused away and are not counted.

    Args:
        batch: floats of the batch: inputs (twice if two kinds are mixed) and target.
        quantized: floats of all quantized activations.
        weights: floats of all rounded weights.
    """
    return FLOAT * (batch + ACTIVATION_PASSES * quantized + WEIGHT_PASSES * weights)


def floors_ms(work: Work, rates: Rates) -> dict[str, float]:
    """Milliseconds of a step by ``arithmetic`` and by ``bytes``; the floor is the larger."""
    return {"arithmetic": 1000 * work.flops / rates.flops, "bytes": 1000 * work.bytes / rates.bytes}
