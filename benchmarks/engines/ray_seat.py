"""The actor of a slot on a machine of a Ray cluster."""

from typing import Any


def seat_class() -> type[Any]:
    """Return the class of the actor.

    Made in a function, so that Ray sends its code: on the other machine nothing of this package can be imported before the actor
    knows where it is.
    """

    class Seat:
        """Owns a host on its machine and tells what its cells say."""

        def open(
            self, paths: list[str], token: str, logs: str, name: str, threads: int | None, imports: list[str]
        ) -> tuple[str, str]:
            """Get ready; return where this is, and what is wrong here (empty for nothing).

            Args:
                paths: where Python finds modules.
                token: a file that is there if this machine sees the results.
                logs: folder for what cells print.
                name: of the slot, where it has no GPU.
                threads: CPU threads of a cell.
                imports: modules that the first cell will need.
            """
            import importlib
            import os
            import platform
            import sys
            from pathlib import Path

            import ray

            gpus = ray.get_gpu_ids()
            where = f"{platform.node()} gpu {','.join(map(str, gpus))}" if gpus else f"{platform.node()} {name}"
            if not os.path.isfile(token):
                return where, f"does not see the results folder {os.path.dirname(token)}"
            sys.path[:0] = [path for path in paths if path not in sys.path]
            importlib.invalidate_caches()
            try:
                from benchmarks.engines.owner import Owner
            except ImportError as error:
                return where, f"cannot import the code ({error}); it must be at the same path as here"
            self._owner = Owner(threads, Path(logs) / f"{where.replace(' ', '-')}-{name.replace(' ', '-')}.log", imports)
            return where, ""

        def close(self) -> None:
            """End the host."""
            self._owner.stop()

        def measure(self, job: Any) -> Any:
            """Measure a cell and yield its messages (see :mod:`benchmarks.engines.base`), the last Finished or Failed."""
            from multiprocessing.connection import wait

            from benchmarks.engines.base import Failed
            from fimaq_core.progress import Progress

            try:
                self._owner.assign(job)
            except OSError as error:
                yield Failed("error", f"no process can be started: {error}")
                return
            while True:
                wait([self._owner.connection])
                message = self._owner.receive()
                if message is not None:
                    yield message
                    if not isinstance(message, Progress):
                        return

    return Seat
