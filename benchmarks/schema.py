"""What a grid's file may hold."""

from typing import Any, Literal

from pydantic import Field

from benchmarks.axes import Axes
from benchmarks.cells import CellName
from tasks.common import registry
from tasks.common.strict import Strict


class TaskGrid(Strict):
    """One section of a grid: a task on a data set.

    Attributes:
        task: the task's name; None if the section's label is it. A task may have several sections.
        dataset: name of the data set, as its records will state it.
        data: ``own`` if the models bring their data along, else which folder must be given.
        evaluation: what is measured, where the task has a choice; None: its usual one.
        models: run by default.
        available: run when a filter asks for them.
        methods, bits, seeds: instead of the grid's.
        overrides: recipe fields changed for every method alike, beside the grid's; the same field counts here.
        scopes: what of a model is quantized, each in cells of its own; empty leaves it to the task.
        placement: where block inputs and Fisher information of its cells are cached; no part of what they measure.
    """

    task: str | None = None
    dataset: str
    data: Literal["own", "imagenet", "coco", "flickr"] = "own"
    evaluation: str | None = None
    models: tuple[str, ...] = Field(min_length=1)
    available: tuple[str, ...] = ()
    methods: tuple[str, ...] | None = Field(None, min_length=1)
    bits: tuple[str, ...] | None = Field(None, min_length=1)
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    overrides: dict[str, Any] = {}
    scopes: tuple[str, ...] = ()
    placement: Literal["device", "host", "disk"] = "device"


class Extra(Strict):
    """Further cells beside the product of the grid's lists: a small product of their own, in the scopes of its section.

    Attributes:
        task: label of the section.
    """

    task: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    bits: tuple[str, ...]
    seeds: tuple[int, ...]


class Grid(Strict):
    """A profile.

    Attributes:
        name: names the table files.
        tasks: the sections by their labels.
        methods, bits, seeds: the cells of a section are the product of these, with its models and scopes; ``fp`` has neither
            bits nor seed nor scope, and methods that quantize nothing (see :func:`benchmarks.grid.changes_model_only`) have
            no bits.
        overrides: recipe fields changed for every method alike.
        axes: axis to point to recipe fields, for ablations: one axis at a time varies around the settings above.
        variant: name of these settings in tables; None leaves it to the record (released settings).
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        threads: CPU threads of a process; None leaves PyTorch's choice.
        jobs: processes at a time; None derives it from cores and threads.
        extra: further cells; they take no part in the axes.
        next: lines that a run prints at its end: commands that a user may want next.
        only: the cells of the grid, where they are not a product of its lists; None: all cells of the product.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    description: str = ""
    tasks: dict[str, TaskGrid] = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1)
    bits: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    overrides: dict[str, Any] = {}
    variant: str | None = None
    device: str = "cpu"
    threads: int | None = Field(None, ge=1)
    jobs: int | None = Field(None, ge=1)
    extra: tuple[Extra, ...] = ()
    axes: Axes = {}
    next: tuple[str, ...] = ()
    only: frozenset[CellName] | None = None

    def task_of(self, section: str) -> str:
        """Name of a section's task."""
        return self.tasks[section].task or section

    def methods_of(self, section: str) -> tuple[str, ...]:
        """Methods of a section, without those of its extra cells."""
        return self.tasks[section].methods or self.methods

    def overrides_of(self, section: str) -> dict[str, Any]:
        """Recipe fields changed in a section: what its task sets, the grid, and the section itself."""
        return {**registry.defaults(self.task_of(section)), **self.overrides, **self.tasks[section].overrides}
