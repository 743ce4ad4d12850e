"""What the stages of a run take: seconds and memory."""

import time

import torch

from tasks.common.environment import peak_memory, reset_peak_memory


class StageClock:
    """Measures stages that follow each other, from its making on.

    Args:
        device: where they run; a GPU is waited for at the end of a stage.

    Attributes:
        seconds: wall-clock time by stage, in their order; of those that ran several times the sum.
        memory: peak bytes while the stage ran (:func:`~tasks.common.environment.peak_memory`), the largest of those that ran
            several times.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.restart()

    def restart(self) -> None:
        """Leave out what has happened since the last stage ended: what belongs to another cell, or waiting for one."""
        reset_peak_memory(self._device)
        self._start = time.monotonic()

    def lap(self, stage: str) -> None:
        """End ``stage``: it is what happened since the one before it ended."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - self._start
        self.memory[stage] = max(self.memory.get(stage, 0), peak_memory(self._device))
        self.restart()
