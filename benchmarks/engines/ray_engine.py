"""Cells on the machines of a Ray cluster: as many slots as it has room for, while it has it."""

import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.base import Engine, Failed, Job, Message, Slot
from benchmarks.engines.ray_cluster import Node, load_ray, nodes
from benchmarks.engines.ray_seat import seat_class
from fimaq_core.errors import EngineError
from fimaq_core.files import replaced_whole
from fimaq_core.progress import Progress

#: Seconds between two looks at what machines there are.
_LOOK = 3.0

#: How often actors may fail to start on a machine, in looks at it, before the machine is left out.
_STARTS = 3

#: Seconds after which an actor that has not started counts no more: others may be tried. And those without any before it is said.
_QUEUED, _SILENT = 15.0, 30.0

#: Seconds that idle actors have to end their hosts.
_LEAVE = 10.0


class _RaySlot:
    """An actor on one machine.

    Attributes:
        node: the machine.
        number: tells the slots of a machine apart.
        since: when its actor was asked for.
        where: name for people, as the actor gives it.
        opening: the answer that it owes; None when it has come.
        messages: of the cell it is at; None when it is idle.
    """

    def __init__(self, node: Node, number: int, actor: Any, opening: Any) -> None:
        self.node, self.number, self._actor = node, number, actor
        self.where = node.host
        self.opening: Any | None = opening
        self.since = time.monotonic()
        self.messages: Any | None = None

    def assign(self, job: Job) -> None:
        self.messages = self._actor.measure.options(num_returns="streaming").remote(job)

    def leave(self) -> Any:
        """Let an idle actor end its host, which removes its files; return what the answer comes as."""
        return self._actor.close.remote()

    def end(self) -> None:
        """End the actor, and with it its host and the process of its cell."""
        load_ray().kill(self._actor)


class RayEngine(Engine):
    """Slots on the cluster that :func:`benchmarks.engines.ray_cluster.connect` connected to."""

    def __init__(
        self, device: str, threads: int | None, runs: Path, logs: Path, imports: Sequence[str], gpus_per_cell: float, most: int
    ) -> None:
        """Start actors on all machines there are.

        Args:
            device: ``cpu`` or ``cuda``.
            threads: CPU threads of a cell; None: one on CPU, and with a GPU its share of the machine's.
            runs: folder of records, which every machine must see at the same path.
            logs: folder for what cells print, below it.
            imports: modules that the first cells will need.
            gpus_per_cell: share of a GPU for each cell, where the device is one.
            most: cells at a time.

        Raises:
            EngineError: no machine of the cluster can take a cell.
            CheckpointError: the results folder cannot be written.
        """
        self._ray = load_ray()
        self._gpus = gpus_per_cell if device == "cuda" else 0.0
        self._threads, self._logs, self._imports, self._most = threads, logs, list(imports), most
        self._class = self._ray.remote(seat_class())
        self._slots: list[_RaySlot] = []
        self._left_out: dict[str, str] = {}
        self._misses: dict[str, tuple[int, float]] = {}
        self._served = time.monotonic()
        self._looked = 0.0
        if not self._roomy():
            need = f"{self._gpus:g} GPU" if self._gpus else f"{threads or 1} CPU cores"
            hint = " Use --device cpu, or start Ray on machines with GPUs." if self._gpus else " Give a cell fewer --threads."
            raise EngineError(f"No machine of the Ray cluster has the {need} that a cell asks for.{hint}")
        self._token = runs / f".ray-{secrets.token_hex(8)}"
        with replaced_whole(self._token) as temporary:
            temporary.write_text("Written by a run, which its machines look for.\n", encoding="utf-8")
        self._look()

    def _roomy(self) -> list[Node]:
        """The machines that can take a cell."""
        return [node for node in nodes() if node.slots(self._gpus, self._threads)]

    def _look(self) -> None:
        """Start actors where there is room; forget those of machines that are gone."""
        self._looked = time.monotonic()
        alive = {node.id: node for node in nodes()}
        for slot in list(self._slots):
            if slot.node.id not in alive and slot.messages is None:  # what is at a cell says so itself
                self._drop(slot)
        for node in alive.values():
            if node.id not in self._left_out:
                taken = {slot.number for slot in self._slots if slot.node.id == node.id}
                for number in range(1, node.slots(self._gpus, self._threads) + 1):
                    if number not in taken and self._counted() < self._most:
                        self._slots.append(self._start(node, number))

    def _counted(self) -> int:
        """Slots that are there or to be expected. What others use of a machine shows as actors that do not start."""
        now = time.monotonic()
        return sum(slot.opening is None or now - slot.since < _QUEUED for slot in self._slots)

    def _start(self, node: Node, number: int) -> _RaySlot:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        threads = self._threads or (max(1, int(node.cpus * self._gpus / node.gpus)) if self._gpus else 1)
        actor = self._class.options(
            num_gpus=self._gpus, num_cpus=0 if self._gpus else threads, max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote()  # fmt: skip
        paths = [os.path.abspath(path or os.getcwd()) for path in sys.path]
        opening = actor.open.remote(
            paths, str(self._token), str(self._logs), f"worker {number}", threads, self._imports
        )  # fmt: skip
        return _RaySlot(node, number, actor, opening)

    def _drop(self, slot: _RaySlot) -> None:
        if slot in self._slots:
            self._slots.remove(slot)
            slot.end()

    def slots(self) -> Sequence[_RaySlot]:
        ready = [slot for slot in self._slots if slot.opening is None]
        return [slot for slot in ready if slot.messages is not None or slot.node.id not in self._left_out]

    def wait(self, timeout: float) -> list[tuple[Slot, Message]]:
        if time.monotonic() - self._looked >= _LOOK:
            self._look()
            self._check()
            self._tell()
        sources = {slot.opening or slot.messages: slot for slot in self._slots if slot.opening or slot.messages}
        if not sources:
            time.sleep(timeout)
            return []
        ready, _ = self._ray.wait(list(sources), num_returns=1, timeout=timeout)
        if ready:
            ready, _ = self._ray.wait(list(sources), num_returns=len(sources), timeout=0)
        heard: list[tuple[Slot, Message]] = []
        for source in ready:
            slot = sources[source]
            if slot not in self._slots:  # dropped with its machine just now
                continue
            if slot.opening is not None:
                self._opened(slot)
            else:
                heard.append((slot, self._hear(slot)))
        return heard

    def _opened(self, slot: _RaySlot) -> None:
        node = slot.node
        try:
            slot.where, problem = self._ray.get(slot.opening)
        except self._ray.exceptions.RayError as error:
            self._drop(slot)
            count, last = self._misses.get(node.id, (0, -_LOOK))
            if time.monotonic() - last >= _LOOK:  # what strikes a machine strikes all its slots: that is once
                count, last = count + 1, time.monotonic()
            self._misses[node.id] = count, last
            if count < _STARTS or all(other.id != node.id for other in nodes()):
                return
            problem = f"starts no process ({_first_line(error)})"
        else:
            slot.opening = None
            self._misses.pop(node.id, None)
            if sum(other.opening is None for other in self._slots) > self._most:  # it was long in coming
                self._drop(slot)
                return
        if problem and node.id not in self._left_out:
            self._leave_out(node, problem)

    def _leave_out(self, node: Node, problem: str) -> None:
        """Do without a machine that is not set up, and say so once."""
        self._left_out[node.id] = problem
        for slot in list(self._slots):
            if slot.node.id == node.id and slot.messages is None:
                self._drop(slot)
        self._check()
        print(f"warning: The machine {node.host} {problem}: it is left out.", file=sys.stderr)

    def _tell(self) -> None:
        """Say it, once in a while, if no machine takes cells."""
        now = time.monotonic()
        if self.slots():
            self._served = now
        elif now - self._served >= _SILENT:
            self._served = now
            print("waiting: no machine of the Ray cluster has room for a cell just now.", file=sys.stderr)

    def _check(self) -> None:
        """Raise EngineError where no machine that is there will do: then none that comes is likely to."""
        roomy = self._roomy()
        if roomy and not self._slots and all(node.id in self._left_out for node in roomy):
            problems = "; ".join(dict.fromkeys(f"{node.host} {self._left_out[node.id]}" for node in roomy))
            raise EngineError(
                f"No machine of the Ray cluster can take cells: {problems}. Results, data and this checkout must be on a file "
                "system that all machines share, at the same path."
            )

    def _hear(self, slot: _RaySlot) -> Message:
        """The next message of a slot at a cell. One whose actor is gone has lost its cell."""
        assert slot.messages is not None
        try:
            message: Message = self._ray.get(next(slot.messages))
        except (StopIteration, self._ray.exceptions.RayError) as error:
            self._drop(slot)
            return Failed("died", f"its process on {slot.where} died ({_reason(error)})")
        if not isinstance(message, Progress):
            slot.messages = None
        return message

    def close(self) -> None:
        try:
            # Ray kills what a killed actor has started, which then removes no files.
            idle = [slot.leave() for slot in self.slots() if slot.messages is None]
            if idle:
                self._ray.wait(idle, num_returns=len(idle), timeout=_LEAVE)
            for slot in self._slots:
                slot.end()
            self._slots.clear()
        finally:
            self._token.unlink(missing_ok=True)
            self._ray.shutdown()


def _reason(error: BaseException) -> str:
    """Why a slot says nothing more, for people: Ray's own words fill a screen."""
    from ray.exceptions import ActorUnavailableError, RayActorError

    if "low on memory" in str(error):
        return "ended by Ray, since the machine ran low on memory: try fewer jobs"
    if isinstance(error, ActorUnavailableError):
        return "the machine does not answer"
    return "Ray lost the worker that started it" if isinstance(error, RayActorError) else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
