"""Executor of cells on the machines of a Ray cluster; see `benchmarks.run.cluster`."""

import importlib
import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.run import cluster
from benchmarks.run.cluster import nodes, reason_of
from benchmarks.run.executor import Executor, Failed, Finished, Message, Started
from fimaq_core.errors import EngineError
from fimaq_core.files import replaced_whole

#: Seconds between two counts of the machines.
_COUNT_EVERY = 3.0


def _task() -> Any:
    """Return the function of the Ray task that measures a cell.

    Ray sends the code of a nested function. The other machine can import `benchmarks` only after
    the function has set `sys.path`, so the function does not use other names of this package.
    """

    def cell(label: str, work: bytes, slot: str, setup: dict[str, Any]) -> Any:
        """Yield the messages of a cell, or (node id, problem) if this machine is not set up."""
        import ray

        host, token, gpus = platform.node(), setup["token"], ray.get_gpu_ids()
        node = ray.get_runtime_context().get_node_id()
        if not os.path.isfile(token):
            yield node, f"{host} does not see the results folder {os.path.dirname(token)}"
            return
        tempfile.tempdir = setup["temporary"]
        sys.path[:0] = [path for path in setup["path"] if path not in sys.path]
        importlib.invalidate_caches()
        try:
            os.chdir(setup["cwd"])
            from benchmarks.run.executor import Failed, Finished
            from benchmarks.run.local import LocalExecutor
        except (ImportError, OSError) as error:
            yield node, f"{host} cannot import the code ({error})"
            return
        where = f"{host} gpu {','.join(map(str, gpus))}" if gpus else f"{host} {slot}"
        log = Path(setup["logs"]) / f"{host}-{slot}.log".replace(" ", "-")
        executor = LocalExecutor({where: log}, setup["threads"], fork=False)
        executor.start(where, label, work)
        message = None
        while not isinstance(message, Finished | Failed):
            for _, message in executor.wait(60.0):
                yield message

    return cell


class RayExecutor(Executor):
    """Runs each cell as a task of the joined Ray cluster. Machines may come and go."""

    def __init__(
        self, runs: Path, logs: Path, threads: int | None, gpus: float, most: int
    ) -> None:  # fmt: skip
        """Make an executor for at most `most` cells at a time.

        Args:
            runs: folder of records; all machines share it, at the same path.
            logs: folder for the output of cells, also shared.
            threads: CPU threads of a cell; None: one, or on GPUs the cores per GPU.
            gpus: GPUs of a cell, which may be a fraction; 0 on CPU.

        Raises:
            EngineError: a cell fits on no machine of the cluster.
            CheckpointError: the results folder is not writable.
        """
        import ray

        self._ray, self._most = ray, most
        self._gpus, self._cores = gpus, 0 if gpus else threads or 1
        self._left_out: dict[str, str] = {}  # problems of machines that are not set up, by id
        self._count_room()
        if not self._room:
            need, advice = f"{threads or 1} CPU cores", "Give a cell fewer --threads."
            if gpus:
                need = f"{gpus:g} GPU"
                advice = "Use --device cpu, or start Ray on machines with GPUs."
            raise EngineError(
                f"No machine of the Ray cluster has the {need} that a cell asks for. {advice}"
            )
        if gpus and not threads:
            threads = int(gpus * min(node.cpus / node.gpus for node in nodes() if node.gpus))
        self._token = runs / f".ray-{secrets.token_hex(8)}"
        with replaced_whole(self._token) as temporary:
            temporary.write_text("A run looks for this file from its other machines.\n", "utf-8")
        self._setup = {
            "token": str(self._token.absolute()), "logs": str(logs), "cwd": os.getcwd(),
            "temporary": cluster.private,
            "path": sys.path, "threads": max(threads or 1, 1),
        }  # fmt: skip
        remote = ray.remote(
            max_retries=0, num_returns="streaming", num_gpus=gpus, num_cpus=self._cores
        )
        self._task: Any = remote(_task())
        self._work: dict[str, tuple[str, bytes]] = {}  # label and work of each busy slot
        self._streams: dict[str, Any] = {}  # generator of messages of each busy slot
        self._where: dict[str, str] = {}  # machine of each cell that has started

    def slots(self) -> Sequence[str]:
        names = [f"worker {number}" for number in range(1, self._most + 1)]
        return [name for i, name in enumerate(names) if i < self._room or name in self._streams]

    def start(self, slot: str, label: str, work: bytes) -> None:
        options = {}
        if self._left_out:
            options = {"label_selector": {"ray.io/node-id": f"!in({','.join(self._left_out)})"}}
        self._work[slot] = label, work
        self._streams[slot] = self._task.options(**options).remote(label, work, slot, self._setup)

    def wait(self, timeout: float) -> list[tuple[str, Message]]:
        if time.monotonic() - self._counted >= _COUNT_EVERY:
            self._count_room()
        slots = {stream: slot for slot, stream in self._streams.items()}
        if not slots:
            time.sleep(timeout)
            return []
        ready, _ = self._ray.wait(list(slots), num_returns=1, timeout=timeout)
        if ready:
            ready, _ = self._ray.wait(list(slots), num_returns=len(slots), timeout=0)
        messages = [(slots[stream], self._next(slots[stream])) for stream in ready]
        return [(slot, message) for slot, message in messages if message is not None]

    def _next(self, slot: str) -> Message | None:
        """Return the next message of a cell; None if the cell moves to another machine."""
        try:
            message = self._ray.get(next(self._streams[slot]))
        except (StopIteration, self._ray.exceptions.RayError) as error:
            where = f" on {self._where[slot]}" if slot in self._where else ""
            message = Failed("died", f"its process{where} died ({reason_of(error)})")
        if isinstance(message, tuple):
            node, problem = message
            if node not in self._left_out:
                self._left_out[node] = problem
                print(f"warning: The machine {problem}: it is left out.", file=sys.stderr)
            self._count_room()
            self.start(slot, *self._work[slot])
            return None
        if isinstance(message, Started):
            self._where[slot] = message.where
        elif isinstance(message, Finished | Failed):
            del self._streams[slot]
            self._where.pop(slot, None)
        return message

    def _count_room(self) -> None:
        """Count the cells that fit on the machines now.

        Raises:
            EngineError: all machines with room for a cell are left out.
        """
        self._counted, rooms = time.monotonic(), {}
        for node in nodes():
            share = node.gpus / self._gpus if self._gpus else node.cpus / self._cores
            rooms[node.id] = int(share + 1e-6)
        self._room = sum(room for node, room in rooms.items() if node not in self._left_out)
        if any(rooms.values()) and not self._room:
            problems = "; ".join(dict.fromkeys(self._left_out.values()))
            raise EngineError(
                f"No machine of the Ray cluster can take cells: {problems}. Results, data and this "
                "checkout must be on a file system that all machines share, at the same path."
            )

    def close(self) -> None:
        self._token.unlink(missing_ok=True)
        cluster.leave()  # ends the tasks, which end the processes of their cells
