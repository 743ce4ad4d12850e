"""A cluster of Ray (``fimaq[cluster]``), which a run starts on this machine or joins.

Two commands serve ``scripts/slurm.sh``. ``python -m benchmarks.run.cluster`` checks the folder for
Ray's files. With the arguments ``HOST:PORT MACHINES SECONDS`` it waits at most this number of
seconds until this number of machines has joined the cluster.
"""

import atexit
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

import click

from fimaq_core.errors import EngineError
from tasks.common.cli import numbers, process

#: Seconds until a cluster must answer.
_PATIENCE = 5.0
#: Bytes of Ray's object store, which holds only messages here.
_STORE = 100 * 2**20
#: Longest name of a socket in Ray's folder, and the largest number of bytes in a socket's path.
_SOCKET = "/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_LONGEST = 103 if sys.platform == "darwin" else 107


#: Environment of a cluster on this machine alone: loopback device, a token. The first variable, of
#: which Ray's documentation says this for Windows and macOS, has the same effect on Linux.
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


#: Private folder of the cluster that this process has started.
private: str | None = None


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

    Only this user's processes on this machine can reach a started cluster: it listens on the
    loopback device, wants a random token, and keeps its files in a private folder, which is removed
    at the end.

    Args:
        address: ``host:port``, or ``auto``; empty to start a cluster on this machine.
        cpus, gpus: cores and GPUs of the started cluster; None: all that Ray finds.

    Raises:
        EngineError: Ray is not installed, cannot start, or does not answer.
    """
    global private
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings: dict[str, Any] = {"address": address}
    if not address:
        place = _folder(f"ray-{secrets.token_hex(4)}/r")
        os.environ.update(_ALONE, RAY_AUTH_TOKEN=secrets.token_hex(32))
        settings = {"address": "local", "num_cpus": cpus, "num_gpus": gpus, "_temp_dir": place}
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
    action, advice = "start on this machine", "Check its free memory, disk and processes."
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
    handler = signal.getsignal(signal.SIGTERM)
    if not address:
        private = os.path.dirname(place)
        os.mkdir(private, 0o700)  # Ray lets all users write to its own folder `r`
        atexit.register(leave)
    try:
        ray.init(**settings, configure_logging=False)
        hosts = {node["NodeManagerAddress"] for node in ray.nodes()}
    except SystemExit:  # Ray's own reaction to SIGTERM
        raise KeyboardInterrupt from None
    except Exception as error:  # Ray also raises bare exceptions
        raise EngineError(f"Ray cannot {action}: {reason_of(error)}. {advice}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    if not address and hosts != {"127.0.0.1"}:
        raise EngineError(f"Ray listens on {', '.join(hosts)}, not on this machine alone.")


def leave() -> None:
    """Leave the cluster. If this process started it, end it and remove its files."""
    import ray

    ray.shutdown()
    for _ in range(50):  # the processes may still be writing
        if private is None or not os.path.exists(private):
            break
        shutil.rmtree(private, ignore_errors=True)
        time.sleep(0.1)


def check_folder() -> None:
    """Raise EngineError if Ray cannot write its sockets and logs on this machine."""
    _folder("ray")


def _folder(name: str) -> str:
    """Return the path of a folder of Ray; raise EngineError if Ray cannot use it."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    variable = next((one for one in names if one in os.environ), "the default")
    folder = os.environ.get(variable, "/tmp")
    length, most = len(os.fsencode(folder)), _LONGEST - len(f"/{name}{_SOCKET}")
    problem = ""
    if not os.path.isabs(folder):
        problem = "is not an absolute path"
    elif length > most:
        problem = f"has {length} bytes; at most {most} leave room for the names of sockets"
    else:
        try:
            parent = (
                f"{folder}/ray" if name == "ray" else folder
            )  # the folder of clusters is shared
            if not os.path.exists(parent):
                os.makedirs(parent)
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            problem = f"is not writable ({error.strerror})"
    if problem:
        raise EngineError(
            f"Ray cannot start: its folder {variable}={folder} {problem}. Set RAY_TMPDIR to "
            "the short absolute path of a writable folder, such as RAY_TMPDIR=/tmp."
        )
    return f"{folder}/{name}"


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


def reason_of(error: BaseException) -> str:
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


@click.command(cls=process.Command)
@click.argument("address", metavar="[HOST:PORT", default="")
@click.argument("machines", type=numbers.COUNT, default=1)
@click.argument("seconds", type=numbers.SECONDS, metavar="SECONDS]", default=300.0)
def main(address: str, machines: int, seconds: float) -> None:
    """Check Ray's folder, or wait until machines have joined a cluster."""
    if address:
        wait_for(address, machines, seconds)
    else:
        check_folder()


if __name__ == "__main__":
    process.start("benchmarks.run.cluster:main")
