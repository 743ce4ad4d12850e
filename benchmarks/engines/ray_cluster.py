"""The Ray cluster: starting or joining it, and what machines it has. Needs the ``cluster`` packages."""

import logging
import os
import secrets
import socket
import sys
import tempfile
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fimaq_core.errors import EngineError

#: Seconds in which a cluster must answer.
_PATIENCE = 5.0

#: Bytes of Ray's store for objects, which carries nothing but messages here.
_STORE = 100 * 2**20

#: The longest path that Ray makes in its folder, and the longest one of a socket.
_SOCKET = "/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_LONGEST = 103 if sys.platform == "darwin" else 107


@dataclass(frozen=True)
class Node:
    """A machine of the cluster that is alive.

    Attributes:
        id: Ray's name for it.
        host: its name for people.
        cpus, gpus: what it has in all.
    """

    id: str
    host: str
    cpus: float
    gpus: float

    def slots(self, gpus_per_cell: float, threads: int | None) -> int:
        """How many cells it can take at a time. ``gpus_per_cell`` is 0 for cells on CPU."""
        if not gpus_per_cell:
            return int(self.cpus / (threads or 1) + 1e-6)
        if gpus_per_cell < 1:  # a share lies on one GPU
            return int(self.gpus) * int(1 / gpus_per_cell + 1e-6)
        return int(self.gpus / gpus_per_cell + 1e-6)


def load_ray() -> ModuleType:
    """Return the library. Raises EngineError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise EngineError(
            "The Ray engine needs Ray, which is not installed here: run make setup, or pip install 'fimaq[cluster]'. "
            "Without it, use --engine local."
        ) from error
    return ray


def connect(address: str, cpus: int | None, gpus: int | None = None) -> None:
    """Join the cluster at ``address`` (``host:port``), or start one on this machine that ends with this process.

    Clusters that run already, or that ``RAY_ADDRESS`` names, are joined by their address only.

    Args:
        address: empty for one of this machine's own.
        cpus, gpus: cores and GPUs that one is told it has; None: those that Ray finds.

    Raises:
        EngineError: Ray is not installed, or nothing answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        check_folder()
        # A cluster of one's own asks for a token in any case; said explicitly, Ray need not explain it.
        # A token that lasts as long as this process leaves no file in the home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = load_ray()
    if ray.is_initialized():
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if address:
        _check(address)
        settings["address"] = address
    else:
        if os.environ.get("RAY_ADDRESS"):
            print(
                f"RAY_ADDRESS ({os.environ['RAY_ADDRESS']}) in the environment is not used: Ray starts "
                "on this machine. To join that cluster, give --ray-address (RAY_ADDRESS=host:port "
                "behind make).",
                file=sys.stderr,
            )
        # Without "local", Ray looks for a cluster in the environment and in a file of earlier ones.
        settings |= {"address": "local", "num_cpus": cpus, "num_gpus": gpus}
        settings |= {"include_dashboard": False, "object_store_memory": _STORE}
    # It prints a paragraph about every worker that dies, in the midst of the progress display; the runner says it in a line.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        ray.init(**settings)
    except Exception as error:  # Ray raises bare ones too, as of a start that takes too long
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not address:
            raise EngineError(
                f"Ray does not start on this machine: {first.rstrip('.')}. "
                f"Its logs are in {_folder()[1]}/ray/session_latest/logs."
            ) from error
        raise EngineError(
            f"Cannot join the Ray cluster at {address}: {first} A run must start on a machine of the cluster (ray start "
            f"--address={address}), with the same versions of Python and Ray."
        ) from error


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
    """Where Ray keeps its folder ``ray`` on this machine, and what says so."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)  # as Ray does
    name = next((name for name in names if name in os.environ), "the default")
    return name, os.environ.get(name, "/tmp")


def _check(address: str) -> None:
    """Raise EngineError at once where Ray would wait for long."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        if address == "auto":
            return
        raise EngineError(
            f"Not the address of a Ray cluster: '{address}'. Give it as host:port, as `ray start --head` prints it (port 6379 "
            "unless you chose another), and start the run on a machine of the cluster."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"No Ray cluster answers at {address} ({error}). Start one there with `ray start --head --port={port}`, or leave the "
            "address out to use this machine alone."
        ) from error


def nodes() -> list[Node]:
    """The machines that are alive now."""
    found = []
    for node in load_ray().nodes():
        if node["Alive"]:
            has = node["Resources"]
            found.append(Node(node["NodeID"], node["NodeManagerHostname"], has.get("CPU", 0.0), has.get("GPU", 0.0)))
    return found


def cuda_in_cluster() -> bool:
    """Whether any machine has a GPU now."""
    return any(node.gpus for node in nodes())


if __name__ == "__main__":  # before `ray start`, whose own words for it are a traceback
    try:
        check_folder()
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
