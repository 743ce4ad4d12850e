"""Waits until machines have joined a Ray cluster: ``python -m benchmarks.engines.ray_wait HOST:PORT MACHINES SECONDS``."""

import sys
import time

from benchmarks.engines.ray_cluster import Node, connect, nodes
from fimaq_core.errors import EngineError


def wait_for(address: str, count: int, seconds: float) -> list[Node]:
    """Return the machines of the cluster at ``address`` as soon as there are ``count``.

    Raises:
        EngineError: there are fewer after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    joined: list[Node] = []
    problem = ""
    while True:
        try:
            connect(address, None)
            joined, problem = nodes(), ""
        except EngineError as error:
            problem = f" {error}"
        if len(joined) >= count:
            return joined
        if time.monotonic() >= deadline:
            names = ", ".join(node.host for node in joined) or "none"
            raise EngineError(
                f"Only {len(joined)} of {count} machines joined the Ray cluster at {address} within {seconds:g} s: {names}."
                f"{problem} See what Ray says above, and whether the machines reach each other."
            )
        time.sleep(1.0)


if __name__ == "__main__":
    try:
        found = wait_for(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"Ray at {sys.argv[1]}: {', '.join(f'{node.host} ({node.cpus:g} CPU, {node.gpus:g} GPU)' for node in found)}")
