"""Executor of cells on the machines of a Ray cluster. It needs the packages of ``fimaq[cluster]``.

Two commands serve ``scripts/slurm.sh``. ``python -m benchmarks.run.ray`` checks the folder for
Ray's files. With the arguments ``HOST:PORT MACHINES SECONDS`` it waits at most this number of
seconds until this number of machines has joined the cluster.
"""

import importlib
import logging
import os
import platform
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.run.executor import Executor, Failed, Finished, Message, Started
from fimaq_core.errors import EngineError
from fimaq_core.files import replaced_whole

#: Seconds until a cluster must answer, and seconds between two counts of its machines.
_PATIENCE, _COUNT_EVERY = 5.0, 3.0
#: Bytes of Ray's object store, which holds only messages here.
_STORE = 100 * 2**20
#: Longest name of a socket in Ray's folder, and the largest number of bytes in a socket's path.
_SOCKET = "/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_LONGEST = 103 if sys.platform == "darwin" else 107


class Node(NamedTuple):
    """Machine of the cluster: its id, its name, and the numbers of its cores and GPUs."""

    id: str
    host: str
    cpus: float
    gpus: float


def nodes() -> list[Node]:
    """Return the machines that are alive now."""
    import ray

    found = []
    for node in ray.nodes():
        if node["Alive"]:
            cpus, gpus = (node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU"))
            found.append(Node(node["NodeID"], node["NodeManagerHostname"], cpus, gpus))
    return found


def connect(address: str, cpus: int | None, gpus: int | None = None) -> None:
    """Join the cluster at `address`, or start one that ends with this process.

    Args:
        address: ``host:port``, or ``auto``; empty to start a cluster on this machine.
        cpus, gpus: cores and GPUs of the started cluster; None: all that Ray finds.

    Raises:
        EngineError: Ray is not installed, cannot start, or does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings: dict[str, Any] = {"address": address}
    if not address:
        check_folder()
        # Without a token in the environment, Ray would write one to the home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        settings = {"address": "local", "num_cpus": cpus, "num_gpus": gpus}
        settings |= {"include_dashboard": False, "object_store_memory": _STORE}
    try:
        import ray
    except ImportError as error:
        raise EngineError(
            "The Ray engine needs Ray, which is not installed here: run make setup, or pip install "
            "'fimaq[cluster]'. Without it, use --engine local."
        ) from error
    if ray.is_initialized():
        return
    action, advice = "start on this machine", "See the logs in ray/session_latest of its folder."
    if address:
        _check_address(address)
        action = f"join the cluster at {address}"
        advice = (
            "A run must start on a machine of the cluster (ray start "
            f"--address={address}), with the same versions of Python and Ray."
        )
    elif os.environ.get("RAY_ADDRESS"):
        print(
            f"RAY_ADDRESS ({os.environ['RAY_ADDRESS']}) in the environment is not used: Ray starts "
            "on this machine. To join that cluster, give --ray-address (make: RAY_ADDRESS=...).",
            file=sys.stderr,
        )
    settings |= {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        ray.init(**settings, configure_logging=False)
    except Exception as error:  # Ray also raises bare exceptions
        raise EngineError(f"Ray cannot {action}: {_reason(error)}. {advice}") from error


def check_folder() -> None:
    """Raise EngineError if Ray cannot write its sockets and logs on this machine."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    name = next((name for name in names if name in os.environ), "the default")
    folder = os.environ.get(name, "/tmp")
    length, most = len(os.fsencode(folder)), _LONGEST - len(_SOCKET)
    problem = ""
    if not os.path.isabs(folder):
        problem = "is not an absolute path"
    elif length > most:
        problem = f"has {length} bytes; at most {most} leave room for the names of sockets"
    else:
        try:
            os.makedirs(f"{folder}/ray", exist_ok=True)
            tempfile.TemporaryFile(dir=f"{folder}/ray").close()
        except OSError as error:
            problem = f"is not writable ({error.strerror})"
    if problem:
        raise EngineError(
            f"Ray cannot start: its folder {name}={folder} {problem}. Set RAY_TMPDIR to the short "
            "absolute path of a writable folder, such as RAY_TMPDIR=/tmp."
        )


def _check_address(address: str) -> None:
    """Raise EngineError at once if no cluster answers; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    try:
        if "://" in address or not host or not port.isdecimal():
            raise OSError("which is not host:port")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"No Ray cluster answers at {address} ({error}). Give its address as host:port, as "
            "`ray start --head` prints it (port 6379 unless you chose another), and start the run "
            "on a machine of the cluster. Leave the address out to use this machine alone."
        ) from error


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
            message = Failed("died", f"its process{where} died ({_reason(error)})")
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
        self._ray.shutdown()  # ends the tasks, which end the processes of their cells


def _reason(error: BaseException) -> str:
    """Return the first line of an error of Ray, whose text is long."""
    if "low on memory" in str(error):
        return "ended by Ray, since the machine ran low on memory: try fewer jobs"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def wait_for(address: str, count: int, seconds: float) -> None:
    """Wait until `count` machines have joined the cluster at `address`, and print them.

    Raises:
        EngineError: fewer machines have joined after `seconds`.
    """
    deadline = time.monotonic() + seconds
    found: list[str] = []
    while len(found) < count:
        problem = ""
        try:
            connect(address, None)
            found = [f"{node.host} ({node.cpus:g} CPU, {node.gpus:g} GPU)" for node in nodes()]
        except EngineError as error:
            problem = f" {error}"
        if len(found) < count and time.monotonic() >= deadline:
            raise EngineError(
                f"Only {len(found)} of {count} machines joined the Ray cluster at {address} in "
                f"{seconds:g} s: {', '.join(found) or 'none'}.{problem} Read Ray's output above, "
                "and check that the machines reach each other."
            )
        time.sleep(0.5)
    print(f"Ray at {address}: {', '.join(found)}")


if __name__ == "__main__":
    try:
        if arguments := sys.argv[1:]:
            wait_for(arguments[0], int(arguments[1]), float(arguments[2]))
        else:
            check_folder()
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
