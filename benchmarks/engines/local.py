"""Cells on this machine, each slot with a host of its own."""

import os
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from benchmarks.engines.base import Engine, Failed, Job, Message, Slot
from benchmarks.engines.owner import Owner


def default_jobs(threads: int | None, device: str) -> int:
    """Return how many cells run at a time: what the cores allow on CPU; one on a GPU."""
    if device != "cpu" or threads is None:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


class _LocalSlot:
    """A host of this machine."""

    def __init__(self, number: int, threads: int | None, logs: Path, imports: Sequence[str]) -> None:
        self.where = f"worker {number}"
        self.owner = Owner(threads, logs / f"worker-{number}.log", imports)

        self.failed: Failed | None = None

    def assign(self, job: Job) -> None:
        try:
            self.owner.assign(job)
        except OSError as error:  # no memory, files or processes left: that may pass
            self.failed = Failed("error", f"no process can be started: {error}")


class LocalEngine(Engine):
    """A fixed number of slots on this machine."""

    def __init__(self, jobs: int, threads: int | None, logs: Path, imports: Sequence[str] = ()) -> None:
        """Start ``jobs`` hosts.

        Args:
            jobs: cells at a time.
            threads: CPU threads of each; None leaves the libraries' choice.
            logs: folder for what cells print.
            imports: modules that the first cells will need.
        """
        self._slots: list[_LocalSlot] = []
        for number in range(1, jobs + 1):
            self._slots.append(_LocalSlot(number, threads, logs, imports))

    def slots(self) -> Sequence[Slot]:
        return self._slots

    def wait(self, timeout: float) -> list[tuple[Slot, Message]]:
        heard: list[tuple[Slot, Message]] = []
        for slot in self._slots:
            if slot.failed is not None:
                heard.append((slot, slot.failed))
                slot.failed = None
        if heard:
            return heard
        slots = {slot.owner.connection: slot for slot in self._slots if slot.owner.connection is not None}
        if not slots:
            time.sleep(timeout)
        for connection in wait(list(slots), timeout) if slots else []:
            slot = slots[connection]  # type: ignore[index]
            message = slot.owner.receive()
            if message is not None:
                heard.append((slot, message))
        return heard

    def close(self) -> None:
        for slot in self._slots:
            slot.owner.hang_up()
        for slot in self._slots:
            slot.owner.stop()
