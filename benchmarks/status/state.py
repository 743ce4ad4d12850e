"""What a state file holds. It may come from another machine or another version, so everything is checked when it is read."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.common.strict import Strict

SCHEMA_VERSION = 1

#: Bounds keep what is read printable; they are far beyond any grid.
Seconds = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**9)]


class RunnerFacts(Strict):
    """Who runs.

    Attributes:
        process_started: Unix time at which the process with this ``pid`` was created: a later process may have its number.
        started, heartbeat: Unix times: when the grid began, when the file was written.
        finished: it ended by itself; False: it runs, or was killed.
    """

    host: str
    pid: int = Field(ge=1, lt=2**31)
    process_started: Seconds
    started: Seconds
    heartbeat: Seconds
    engine: str = ""
    finished: bool = False


class Counts(Strict):
    """Cells. ``done`` are those with a record, ``total`` all of the grid."""

    done: Count
    running: Count
    failed: Count
    total: Count


class CellKey(Strict):
    """What tells a cell from the others of its grid."""

    section: str
    model: str
    scope: str
    method: str
    bits: str
    seed: int | None
    point: str


class RunningCell(Strict):
    """A cell at work.

    Attributes:
        where: it runs, for people.
        done, total: units of its stage; ``total`` 0: not known yet.
        loss: of its last optimisation step.
        seconds: since it was started; ``left``: until it ends, None where nothing is known.
        attempts: how often it was started.
    """

    label: str
    key: CellKey
    where: str = ""
    stage: str = ""
    block: str = ""
    done: Count = 0
    total: Count = 0
    loss: float | None = Field(None, allow_inf_nan=False)
    seconds: Seconds = 0.0
    left: Seconds | None = None
    attempts: Count = 1


class FailedCell(Strict):
    """A cell that could not be measured, and the file with the details."""

    label: str
    message: str
    log: str | None = None


class EndedCell(Strict):
    """A cell that is over, and what is said of it."""

    label: str
    kind: Literal["finished", "failed", "elsewhere"]
    text: str


class State(Strict):
    """A runner and its cells.

    Attributes:
        left: seconds until the grid is done, None where nothing is known.
        failed, ended: the latest of them, oldest first.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    runner: RunnerFacts
    counts: Counts
    left: Seconds | None = None
    running: list[RunningCell] = []
    failed: list[FailedCell] = []
    ended: list[EndedCell] = []
