"""Batches from a tape in host memory (or on disk) to the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Feeder:
    """Brings each step's batch to buffers on the device that keep their addresses.

    Two pinned staging areas take turns, so the host gathers a batch while the device still works on the one before.

    Args:
        sources: (n, ...) tensors in host memory; None stays None.
        samples: (steps, B) images of each batch, in host memory.
        device: where the batches go.

    Attributes:
        batch: the present batch of every source, (B, ...).
    """

    def __init__(self, sources: Sequence[Tensor | None], samples: Tensor, device: torch.device) -> None:
        self._sources, self._samples, self._cuda = sources, samples, device.type == "cuda"
        size = samples.shape[1]

        def rows(source: Tensor | None, **where: object) -> Tensor | None:
            return None if source is None else torch.empty((size, *source.shape[1:]), dtype=source.dtype, **where)  # type: ignore[call-overload]

        self.batch = tuple(rows(source, device=device) for source in sources)
        self._staging = [[rows(source, pin_memory=self._cuda) for source in sources] for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def load(self, number: int) -> None:
        """Bring the batch of step ``number``; on CUDA the copies are queued behind the work that was queued before."""
        slot = number % 2
        event = self._copied[slot]
        if event is not None:
            event.synchronize()
        for source, staging, buffer in zip(self._sources, self._staging[slot], self.batch, strict=True):
            if source is not None:
                assert staging is not None
                assert buffer is not None
                torch.index_select(source, 0, self._samples[number], out=staging)
                buffer.copy_(staging, non_blocking=True)
        if self._cuda:
            self._copied[slot] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied[slot].record()  # type: ignore[union-attr]
