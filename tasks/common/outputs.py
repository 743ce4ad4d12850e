"""A model's outputs on images, batch by batch: what every evaluation starts with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fimaq_core.errors import DataError, ModelError
from tasks.common.images import Images, collate


@dataclass(frozen=True)
class Outputs:
    """Of one batch: ``values`` (B, ...) float32 on the model's device, ``targets`` and ``positions`` (B,) on the CPU; ``done``
    images are behind it, damaged ones included."""

    values: Tensor
    targets: Tensor
    positions: Tensor
    done: int


def image_outputs(
    model: Callable[[Tensor], Tensor], images: Images, device: torch.device, batch_size: int, workers: int
) -> Iterator[Outputs]:
    """Yield the outputs of ``model`` on ``images`` in their order; images that were skipped are missing.

    Raises:
        DataError: a damaged image (unless skipped).
        ModelError: the model does not take these images.
    """
    loader = DataLoader(images, batch_size=batch_size, num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda")
    done = 0
    for batch in loader:
        done = min(done + batch_size, len(images))
        if isinstance(batch, DataError):
            raise batch
        if batch is None:
            continue
        pixels, targets, positions = batch
        try:
            with torch.no_grad():
                values = model(pixels.to(device, non_blocking=True)).float()
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise ModelError(f"The model does not take images of shape {tuple(pixels.shape[1:])}: {error}") from error
        yield Outputs(values, targets, positions, done)
