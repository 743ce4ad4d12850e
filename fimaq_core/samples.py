"""Samples of equal or varying shapes: calibration inputs, block outputs, kept tensors."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fimaq_core.errors import RecipeError


class Samples:
    """Samples in order: one tensor (n, ...), or one tensor per sample if shapes vary.

    Samples of varying shapes are taken one by one. Each is a batch, usually (1, ...).

    Example::

        Samples(torch.randn(8, 3, 32, 32)).batches(4)  # two tensors (4, 3, 32, 32)
        Samples([torch.randn(1, 3, 20, 30), torch.randn(1, 3, 32, 24)]).batches(4)  # these two

    Attributes:
        tensors: the one tensor, or one per sample; all on one device.
        varying: True if each sample has its own tensor.
    """

    def __init__(self, data: Tensor | Sequence[Tensor]) -> None:
        self.varying = not isinstance(data, Tensor)
        self.tensors = [data] if isinstance(data, Tensor) else list(data)

    @classmethod
    def of(cls, data: "Tensor | Samples") -> "Samples":
        """Return samples as they are, or a tensor as samples of equal shape."""
        return data if isinstance(data, Samples) else cls(data)

    @property
    def whole(self) -> Tensor:
        """The one tensor (n, ...) of samples of equal shape."""
        (tensor,) = self.tensors
        return tensor

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors) if self.varying else len(self.whole)

    def __getitem__(self, key: int | slice) -> Tensor:
        """Return a sample or a batch (a slice from :meth:`slices`), with its leading dimension."""
        rows = slice(key, key + 1) if isinstance(key, int) else key
        if not self.varying:
            return self.whole[rows]
        (sample,) = self.tensors[rows]
        return sample

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches(1)

    def slices(self, size: int) -> Iterator[slice]:
        """Yield slices of ``size`` consecutive samples, or of one sample if shapes vary."""
        step = 1 if self.varying else size
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the samples of :meth:`slices`."""
        return (self[rows] for rows in self.slices(size))

    def first(self, count: int) -> "Samples":
        """Return the first ``count`` samples."""
        return Samples(self.tensors[:count] if self.varying else self.whole[:count])

    def to(self, device: torch.device | str) -> "Samples":
        tensors = [tensor.to(device) for tensor in self.tensors]
        return Samples(tensors if self.varying else tensors[0])

    def joined(self, batches: Sequence[Tensor]) -> "Samples":
        """Join batches, in order, to samples of the same kind as these."""
        return Samples(batches if self.varying else torch.cat(list(batches)))

    @torch.no_grad()
    def map(self, function: Callable[[Tensor], Tensor], size: int) -> "Samples":
        """Apply ``function`` to batches of ``size``, without gradients."""
        return self.joined([function(batch) for batch in self.batches(size)])

    def check_batch(self, size: int, field: str) -> None:
        """Raise RecipeError if batches of ``size`` cannot be drawn; ``field`` is the setting."""
        if self.varying and size != 1:
            raise RecipeError(
                "These images vary in size and are taken one at a time: "
                f"set {field} 1 (now {size})."
            )
        if len(self) < size:
            raise RecipeError(
                f"{len(self)} calibration images are fewer than a batch of {size}: "
                f"lower {field} or give more images."
            )
