"""Cells on the machines of a Ray cluster. Needs the ``cluster`` packages.

``python -m benchmarks.run.ray`` checks the folder of Ray's files, for ``scripts/slurm.sh``; with
``HOST:PORT MACHINES SECONDS`` it waits until so many machines have joined.
"""

import logging
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.run.executor import Executor, Failed, Finished, Message, Started
from fimaq_core.errors import EngineError
from fimaq_core.files import replaced_whole

#: Seconds in which a cluster must answer.
_PATIENCE = 5.0

#: Seconds between two looks at the machines, and without a running cell until that is said.
_LOOK, _SILENT = 3.0, 30.0

#: Bytes of Ray's store for objects, which carries nothing but messages here.
_STORE = 100 * 2**20

#: The longest path that Ray makes in its folder, and the longest one of a socket.
_SOCKET = "/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_LONGEST = 103 if sys.platform == "darwin" else 107


class Node(NamedTuple):
    """A machine of the cluster: Ray's name for it, its name for people, and all that it has."""

    id: str
    host: str
    cpus: float
    gpus: float

    def room(self, gpus: float, threads: int | None) -> int:
        """Return how many cells it can take at a time; ``gpus`` of a cell is 0 on CPU."""
        if 0 < gpus < 1:  # a share lies on one GPU
            return int(self.gpus) * int(1 / gpus + 1e-6)
        return int((self.gpus / gpus if gpus else self.cpus / (threads or 1)) + 1e-6)


def nodes() -> list[Node]:
    """Return the machines that are alive now."""
    import ray

    found = []
    for node in ray.nodes():
        if node["Alive"]:
            cpus, gpus = (node["Resources"].get(name, 0.0) for name in ("CPU", "GPU"))
            found.append(Node(node["NodeID"], node["NodeManagerHostname"], cpus, gpus))
    return found


def connect(address: str, cpus: int | None, gpus: int | None = None) -> None:
    """Join the cluster at ``address`` (``host:port``), or start one that ends with this process.

    A cluster that ``RAY_ADDRESS`` or a file of Ray names is not joined.

    Args:
        address: empty for a cluster on this machine.
        cpus, gpus: cores and GPUs that it is told to have; None: those that Ray finds.

    Raises:
        EngineError: Ray is not installed, or nothing answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        check_folder()
        # A cluster on this machine asks for a token in any case. Given here, it leaves no file in
        # the home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError as error:
        raise EngineError(
            "The Ray engine needs Ray, which is not installed here: run make setup, or pip install "
            "'fimaq[cluster]'. Without it, use --engine local."
        ) from error
    if ray.is_initialized():
        return
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    settings["configure_logging"] = False
    if address:
        _check(address)
        settings["address"] = address
    else:
        if os.environ.get("RAY_ADDRESS"):
            print(
                f"RAY_ADDRESS ({os.environ['RAY_ADDRESS']}) in the environment is not used: Ray "
                "starts on this machine. To join that cluster, give --ray-address "
                "(RAY_ADDRESS=host:port behind make).",
                file=sys.stderr,
            )
        settings |= {"address": "local", "num_cpus": cpus, "num_gpus": gpus}
        settings |= {"include_dashboard": False, "object_store_memory": _STORE}
    try:
        ray.init(**settings)
    except Exception as error:  # Ray raises bare ones too, as of a start that takes too long
        what, advice = "start on this machine", f"See {_folder()[1]}/ray/session_latest/logs."
        if address:
            what = f"join the cluster at {address}"
            advice = (
                "A run must start on a machine of the cluster (ray start "
                f"--address={address}), with the same versions of Python and Ray."
            )
        raise EngineError(f"Ray cannot {what}: {_reason(error)}. {advice}") from error


def check_folder() -> None:
    """Raise EngineError where Ray cannot keep the sockets and logs of this machine."""
    name, folder = _folder()
    length, most = len(os.fsencode(folder)), _LONGEST - len(_SOCKET)
    problem = ""
    if not os.path.isabs(folder):
        problem = "is not an absolute path"
    elif length > most:
        problem = f"has {length} bytes, and {most} is the most for sockets in it"
    else:
        try:
            os.makedirs(f"{folder}/ray", exist_ok=True)
            tempfile.TemporaryFile(dir=f"{folder}/ray").close()
        except OSError as error:
            problem = f"cannot be written in ({error.strerror})"
    if problem:
        raise EngineError(
            f"Ray cannot start: its folder {name}={folder} {problem}. Set RAY_TMPDIR to the short "
            "absolute path of a folder that can be written in, such as RAY_TMPDIR=/tmp."
        )


def _folder() -> tuple[str, str]:
    """Return what says where Ray keeps its folder ``ray`` on this machine, and that place."""
    # As Ray does.
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    name = next((name for name in names if name in os.environ), "the default")
    return name, os.environ.get(name, "/tmp")


def _check(address: str) -> None:
    """Raise EngineError at once where Ray would wait for long."""
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

    It is nested, so that Ray sends its code: the other machine can import nothing of this package
    before the function says where it is.
    """

    def cell(
        label: str, work: bytes, slot: str, token: str, logs: str, cwd: str, paths: list[str],
        threads: int, gpus: float,
    ) -> Any:  # fmt: skip
        """Yield the messages of a cell, or a tuple if this machine is not set up."""
        import importlib
        import os
        import platform
        import sys
        from pathlib import Path

        import ray

        node, given = ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()
        host, where = platform.node(), f"gpu {','.join(map(str, given))}" if given else slot
        if not os.path.isfile(token):
            yield node, f"{host} does not see the results folder {os.path.dirname(token)}"
            return
        sys.path[:0] = [path for path in paths if path not in sys.path]
        importlib.invalidate_caches()
        try:
            os.chdir(cwd)
            from benchmarks.run.executor import Failed, Finished
            from benchmarks.run.local import LocalExecutor
        except (ImportError, OSError) as error:
            problem = f"cannot import the code ({error}); it must be at the same path as here"
            yield node, f"{host} {problem}"
            return
        if not threads and gpus:  # its share of the machine's cores
            has = next(n["Resources"] for n in ray.nodes() if n["NodeID"] == node)
            threads = int(has.get("CPU", 1) * gpus / has["GPU"])
        name, message = f"{host} {where}", None
        log = Path(logs) / f"{host}-{slot}.log".replace(" ", "-")
        executor = LocalExecutor({name: log}, max(1, threads), fork=False)
        executor.start(name, label, work)
        while not isinstance(message, Finished | Failed):
            for _, message in executor.wait(60.0):
                yield message

    return cell


@dataclass
class _Cell:
    """A cell in a slot: its Ray task's messages, and where it runs (empty while it waits)."""

    label: str
    work: bytes
    messages: Any
    where: str = ""


class RayExecutor(Executor):
    """Runs each cell as a task of the Ray cluster that `connect` connected to."""

    def __init__(
        self, runs: Path, logs: Path, threads: int | None, gpus: float, most: int
    ) -> None:  # fmt: skip
        """Make an executor.

        Args:
            runs: folder of records, which each machine must see at the same path.
            logs: folder for the output of cells, below it.
            threads: CPU threads of a cell; None: one, or the share of its GPU in the machine's.
            gpus: GPUs of a cell, or its share of one; 0 on CPU.
            most: cells at a time.

        Raises:
            EngineError: no machine of the cluster can take a cell.
            CheckpointError: the results folder cannot be written.
        """
        import ray

        self._ray, self._threads, self._gpus, self._most = ray, threads, gpus, most
        self._cells: dict[str, _Cell] = {}
        self._left_out: dict[str, str] = {}
        self._ran = time.monotonic()
        self._look()
        if not self._nodes:
            need = f"{gpus:g} GPU" if gpus else f"{threads or 1} CPU cores"
            on_gpu = "Use --device cpu, or start Ray on machines with GPUs."
            raise EngineError(
                f"No machine of the Ray cluster has the {need} that a cell asks for. "
                f"{on_gpu if gpus else 'Give a cell fewer --threads.'}"
            )
        self._token = runs / f".ray-{secrets.token_hex(8)}"
        with replaced_whole(self._token) as temporary:
            temporary.write_text("Written by a run, which its machines look for.\n", "utf-8")
        token, cwd = str(self._token.absolute()), os.getcwd()
        self._facts = token, str(logs), cwd, sys.path, threads or 0, gpus
        self._options: dict[str, Any] = {"max_retries": 0, "num_returns": "streaming"}
        self._options |= {"num_gpus": gpus, "num_cpus": 0 if gpus else threads or 1}
        self._task = ray.remote(_task())

    def slots(self) -> Sequence[str]:
        fit = [node for node in self._nodes if node.id not in self._left_out]
        room = min(self._most, sum(node.room(self._gpus, self._threads) for node in fit))
        names = [f"worker {number}" for number in range(1, self._most + 1)]
        return [name for index, name in enumerate(names) if index < room or name in self._cells]

    def start(self, slot: str, label: str, work: bytes) -> None:
        options = dict(self._options)
        if self._left_out:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self._left_out)})"}
        messages = self._task.options(**options).remote(label, work, slot, *self._facts)
        self._cells[slot] = _Cell(label, work, messages)

    def wait(self, timeout: float) -> list[tuple[str, Message]]:
        if time.monotonic() - self._looked >= _LOOK:
            self._look()
        slots = {cell.messages: slot for slot, cell in self._cells.items()}
        if not slots:
            time.sleep(timeout)
            return []
        ready, _ = self._ray.wait(list(slots), num_returns=1, timeout=timeout)
        if ready:
            ready, _ = self._ray.wait(list(slots), num_returns=len(slots), timeout=0)
        heard = [(slots[messages], self._next(slots[messages])) for messages in ready]
        return [(slot, message) for slot, message in heard if message is not None]

    def _next(self, slot: str) -> Message | None:
        """Return the next message of a cell; None if it is to run on another machine."""
        cell = self._cells[slot]
        try:
            message = self._ray.get(next(cell.messages))
        except (StopIteration, self._ray.exceptions.RayError) as error:
            del self._cells[slot]
            where = f" on {cell.where}" if cell.where else ""
            return Failed("died", f"its process{where} died ({_reason(error)})")
        if isinstance(message, tuple):
            self._leave_out(*message)
            self.start(slot, cell.label, cell.work)
            return None
        if isinstance(message, Started):
            cell.where = message.where
        if isinstance(message, Finished | Failed):
            del self._cells[slot]
        return message

    def _look(self) -> None:
        """See what machines there are; say it, once in a while, if none takes cells."""
        self._looked = time.monotonic()
        self._nodes = [node for node in nodes() if node.room(self._gpus, self._threads)]
        if any(cell.where for cell in self._cells.values()):
            self._ran = self._looked
        elif self._looked - self._ran >= _SILENT:
            self._ran = self._looked
            what = "no machine of the Ray cluster has room for a cell just now."
            print(f"waiting: {what}", file=sys.stderr)
        self._check_machines()

    def _leave_out(self, node: str, problem: str) -> None:
        """Do without a machine that is not set up. Raises EngineError if none is left."""
        if node not in self._left_out:
            self._left_out[node] = problem
            print(f"warning: The machine {problem}: it is left out.", file=sys.stderr)
        self._check_machines()

    def _check_machines(self) -> None:
        """Raise EngineError if all machines are left out; the last other one may just have gone."""
        if self._nodes and all(node.id in self._left_out for node in self._nodes):
            problems = "; ".join(dict.fromkeys(self._left_out.values()))
            raise EngineError(
                f"No machine of the Ray cluster can take cells: {problems}. Results, data and this "
                "checkout must be on a file system that all machines share, at the same path."
            )

    def close(self) -> None:
        self._token.unlink(missing_ok=True)
        self._ray.shutdown()  # ends the tasks, and these the processes of their cells


def _reason(error: BaseException) -> str:
    """Return the first of Ray's words, which fill a screen."""
    if "low on memory" in str(error):
        return "ended by Ray, since the machine ran low on memory: try fewer jobs"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def wait_for(address: str, count: int, seconds: float) -> None:
    """Return as soon as ``count`` machines have joined the cluster at ``address``; print them.

    Raises:
        EngineError: there are fewer after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        found, problem = [], ""
        try:
            connect(address, None)
            found = [f"{node.host} ({node.cpus:g} CPU, {node.gpus:g} GPU)" for node in nodes()]
        except EngineError as error:
            problem = f" {error}"
        if len(found) >= count:
            print(f"Ray at {address}: {', '.join(found)}")
            return
        if time.monotonic() >= deadline:
            raise EngineError(
                f"Only {len(found)} of {count} machines joined the Ray cluster at {address} in "
                f"{seconds:g} s: {', '.join(found) or 'none'}.{problem} See what Ray says above, "
                "and whether the machines reach each other."
            )
        time.sleep(1.0)


if __name__ == "__main__":
    try:
        if arguments := sys.argv[1:]:
            wait_for(arguments[0], int(arguments[1]), float(arguments[2]))
        else:
            check_folder()
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
