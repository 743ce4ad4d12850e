"""Clocks, and a limit on the whole run's time."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds on a clock that runs evenly, once ``device`` is idle."""
    synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``work`` takes, its kernels included."""
    start = now(device)
    work()
    return now(device) - start


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The shortest of ``repeats`` timings (seconds): what disturbs a machine only ever adds."""
    return min(seconds(work, device) for _ in range(repeats))


class Laps:
    """Times of steps that follow one another: :meth:`mark` before the first and after each.

    On CUDA the marks are events in the stream, so that nothing waits while steps are queued.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """End of a step."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between the marks."""
        synchronize(self._device)
        if self._events:
            return [one.elapsed_time(two) / 1000 for one, two in itertools.pairwise(self._events)]
        return [two - one for one, two in itertools.pairwise(self._marks)]


def median(values: list[float]) -> float:
    """The median: machines freeze now and then, and a mean would count that."""
    return statistics.median(values)


@dataclass
class Budget:
    """Time left, in seconds.

    Attributes:
        end: when it is over, on ``time.monotonic``'s clock.
    """

    end: float

    @classmethod
    def of(cls, limit: float) -> "Budget":
        """A budget of ``limit`` seconds from now."""
        return cls(time.monotonic() + limit)

    def left(self) -> float:
        """Seconds left, negative once it is over."""
        return self.end - time.monotonic()

    def share(self, part: float) -> "Budget":
        """A budget of the fraction ``part`` of what is left."""
        return Budget.of(max(self.left(), 0.0) * part)
