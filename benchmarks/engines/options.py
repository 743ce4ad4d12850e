"""What the command line says about where cells run."""

from dataclasses import dataclass
from typing import Literal

#: Attempts in a row that may end with a dead process and get no further.
RETRIES = 3


@dataclass(frozen=True)
class EngineOptions:
    """What the command line says about where cells run.

    Attributes:
        name: of the engine.
        jobs: cells at a time; None: what the profile says, else what the machine allows. With Ray: at most so many; None: what
            the cluster allows.
        ray_address: ``host:port`` of a running Ray cluster; empty for one of this machine's own, while the run lasts.
        gpus_per_cell: share of a GPU that a cell gets from Ray.
        retries: see :class:`~benchmarks.attempts.Attempts`.
    """

    name: Literal["local", "ray"] = "local"
    jobs: int | None = None
    ray_address: str = ""
    gpus_per_cell: float = 1.0
    retries: int = RETRIES

    @property
    def flags(self) -> list[tuple[str, object]]:
        """The options that differ from the usual, as a command line gives them."""
        given = [("--engine", self.name, "local"), ("--ray-address", self.ray_address, ""), ("--jobs", self.jobs, None)]
        given += [("--gpus-per-cell", f"{self.gpus_per_cell:g}", "1"), ("--retries", self.retries, RETRIES)]
        return [(flag, value) for flag, value, usual in given if value != usual]
