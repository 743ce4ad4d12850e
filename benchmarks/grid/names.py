"""Published names and the ids used here: reads ``published/names.yaml``, the one file that maps them."""

from functools import cache
from pathlib import Path

import yaml
from pydantic import model_validator

from fimaq_core.documents import Strict
from tasks.common import registry

PUBLISHED = Path(__file__).parents[1] / "published"
#: Stands in published rows and tables where the source does not say.
UNSTATED = "unstated"


class DatasetName(Strict):
    """Facts that a record must state to count as measured on a published data set: its whole split.

    ``metrics`` maps published metrics to the record's; others are never compared. ``notes`` are by
    published method, said with every verdict.
    """

    task: str
    name: str
    split: str
    count: int
    metrics: dict[str, str]
    notes: dict[str, str] = {}


class ModelName(Strict):
    """The model here, and the one checkpoint of the published numbers.

    ``scope`` is what of it the source quantized, as recipes say it; None where that is always the
    whole model; ``unstated`` where the source leaves it open.
    """

    id: str
    tag: str
    scope: str | None = None


class MethodName(Strict):
    """The method here.

    ``comparable`` maps published variants that were run with the settings that are defaults here to
    the id of the method; other variants are context only.
    """

    id: str
    comparable: dict[str, str] = {}


class StudyName(Strict):
    """One study of run times: ``device`` that it ran on, and ``images`` it calibrated on, where its name says so."""

    device: str = f"{UNSTATED} GPU"
    images: int | None = None


class Names(Strict):
    """The whole mapping: data sets by published task and name, the rest by published names.

    ``unmapped_models`` and ``unmapped_methods`` say why a published name means nothing here.
    """

    datasets: dict[str, dict[str, DatasetName]]
    models: dict[str, ModelName]
    methods: dict[str, MethodName]
    studies: dict[str, StudyName] = {}
    unmapped_models: dict[str, str] = {}
    unmapped_methods: dict[str, str] = {}

    @model_validator(mode="after")
    def _scopes(self) -> "Names":
        tasks = {entry.task for sets in self.datasets.values() for entry in sets.values()}
        known = {UNSTATED, None, *(scope for task in tasks for scope in registry.scopes(task))}
        unknown = {
            name: entry.scope for name, entry in self.models.items() if entry.scope not in known
        }
        if unknown:
            raise ValueError(f"scopes that no task has: {unknown}")
        return self

    def published_on(self, task: str, dataset: str) -> list[tuple[str, str, DatasetName]]:
        """Return published task, published data set and their meaning for those that are ``dataset`` of ``task`` here."""
        return [
            (theirs, name, entry)
            for theirs, sets in self.datasets.items()
            for name, entry in sets.items()
            if (entry.task, entry.name) == (task, dataset)
        ]

    def models_for(self, model: str) -> list[ModelName]:
        """Return the published models that an id or tag here stands for; several where they differ in scope."""
        return [entry for entry in self.models.values() if model in (entry.id, entry.tag)]


@cache
def load_names() -> Names:
    """Return the mapping."""
    return Names.model_validate(
        yaml.safe_load((PUBLISHED / "names.yaml").read_text(encoding="utf-8"))
    )
