"""Walk of calibration images through a chain, segment by segment."""

import torch
from torch import Tensor

from fimaq_core.calibration.capture import Capture
from fimaq_core.chain import BlockChain, Kept, Segment
from fimaq_core.samples import Samples


class Walk:
    """Position of a walk: the inputs of the current segment for all calibration images.

    Layers run as they are set up, in full precision or quantized. Several walks over one chain may
    go side by side.

    Args:
        x: (n, ...) inputs of the chain.
        batch_size: samples per forward pass.
    """

    def __init__(self, chain: BlockChain, x: Samples, batch_size: int) -> None:
        self.chain, self.x, self.batch_size = chain, x, batch_size
        self.index = 0
        self.device = next(chain.parameters()).device
        self.sides = [chain.side_of(part.to(self.device)) for part in x.batches(batch_size)]
        self.kept: list[Kept] = [()] * len(self.sides)

    @property
    def segment(self) -> Segment:
        """The current segment."""
        return self.chain.segment(self.index)

    @torch.no_grad()
    def run(self, captured: Capture | None = None) -> list[Tensor]:
        """Run the current segment; return the output of each batch, on the device of the inputs.

        Each batch ends a sample of ``captured`` if shapes vary.
        """
        outputs = []
        for number, part in enumerate(self.x.batches(self.batch_size)):
            own = tuple(one.to(self.device) for one in self.kept[number])
            output = self.segment(part.to(self.device), self.sides[number], own)
            if captured is not None and self.x.varying:
                captured.settle()
            outputs.append(output.to(part.device))
        return outputs

    @torch.no_grad()
    def advance(self, outputs: list[Tensor]) -> None:
        """Go to the next segment with the ``outputs`` of :meth:`run`."""
        for number, output in enumerate(outputs):
            more = self.segment.kept_with(output.to(self.device), self.kept[number])
            self.kept[number] = tuple(one.to(output.device) for one in more)
        self.x = self.x.joined(outputs) if outputs else self.x
        self.index += 1
        later = range(self.index, len(self.chain))
        if not any(self.chain.segment(number).takes_kept for number in later):
            self.kept = [()] * len(self.sides)
