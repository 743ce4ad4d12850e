"""Figures of a reconstructed block: its output's error, and how its loss weighed errors.

Sums are float64, batch by batch, of tensors that are there anyway.
"""

import torch
from torch import Tensor

from fimaq_core.samples import Samples


class OutputError:
    """Sums up ``||q - f||² / ||f||²`` over batches of outputs q and their targets f, on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._error, self._size = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))

    @torch.no_grad()
    def add(self, output: Tensor, target: Tensor) -> None:
        """Add a batch, both (B, ...)."""
        self._error += squared_sum(output - target)
        self._size += squared_sum(target)

    @property
    def relative(self) -> float:
        """The error so far; infinite or NaN where only f is zero, or a value is not finite."""
        error, size = float(self._error), float(self._size)
        return 0.0 if error == 0 else (error / size if size else float("inf"))


def squared_sum(values: Tensor) -> Tensor:
    """Σ values², a float64 scalar."""
    # In pieces: in float64 a batch of maps would take as much memory as the block that made it.
    parts = torch.split(values.flatten(), 2**22)
    return torch.stack([part.double().square_().sum() for part in parts]).sum()


def mean_of(samples: Samples, batch_size: int, squared: bool = False) -> float:
    """The mean of all values of ``samples`` (n, N), or of their squares."""
    total, count = 0.0, 0
    for part in samples.batches(batch_size):
        total += float(squared_sum(part) if squared else part.sum(1).double().sum())
        count += part.numel()
    return total / count
