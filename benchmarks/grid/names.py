"""Published names and the ids used here: reads ``published/names.yaml``, which maps them."""

from functools import cache
from pathlib import Path

from pydantic import model_validator

from fimaq_core.documents import Strict, read_yaml, validate
from fimaq_core.errors import FimaqError
from tasks.common import registry

PUBLISHED = Path(__file__).parents[1] / "published"
#: Stands in published rows and tables where the source does not say.
UNSTATED = "unstated"


class DatasetName(Strict):
    """Facts that a record must state to be compared with numbers of a published data set.

    Attributes:
        task, name, split, count: of the data set as records state it: the whole split.
        metrics: published metric to the record's metric; others are never compared.
        notes: remarks by published method, printed with every verdict.
    """

    task: str
    name: str
    split: str
    count: int
    metrics: dict[str, str]
    notes: dict[str, str] = {}


class ModelName(Strict):
    """Model here, and the only checkpoint that published numbers are compared with."""

    id: str
    tag: str
    #: Quantized part of the model in the source, as recipes name it. None: always the whole model;
    #: ``unstated``: the source leaves it open.
    scope: str | None = None


class MethodName(Strict):
    """Method here, by the name in publications.

    ``comparable`` maps published variants to the id of the method here that has their settings. All
    other variants are context only.
    """

    id: str
    comparable: dict[str, str] = {}


class Names(Strict):
    """Whole mapping by published names; data sets by published task and name.

    Example:
        >>> load_names().models["vit_small"].tag
        'vit_small_patch16_224.augreg_in21k_ft_in1k'
    """

    datasets: dict[str, dict[str, DatasetName]]
    models: dict[str, ModelName]
    methods: dict[str, MethodName]
    studies: dict[str, str] = {}  #: GPU of each study of run times
    unmapped_models: dict[str, str] = {}  #: why a published name is not used here
    unmapped_methods: dict[str, str] = {}

    @model_validator(mode="after")
    def _scopes(self) -> "Names":
        tasks = {entry.task for sets in self.datasets.values() for entry in sets.values()}
        known = {UNSTATED, None, *(scope for task in tasks for scope in registry.scopes(task))}
        unknown = {name: m.scope for name, m in self.models.items() if m.scope not in known}
        if unknown:
            raise ValueError(f"scopes that no task has: {unknown}")
        return self

    def published_on(self, task: str, dataset: str) -> list[tuple[str, str, DatasetName]]:
        """Return (published task, published data set, meaning) of ``dataset`` of ``task`` here."""
        return [
            (theirs, name, entry)
            for theirs, sets in self.datasets.items()
            for name, entry in sets.items()
            if (entry.task, entry.name) == (task, dataset)
        ]

    def models_for(self, model: str) -> list[ModelName]:
        """Return the published models of an id or tag here; several differ in their scope."""
        return [entry for entry in self.models.values() if model in (entry.id, entry.tag)]


@cache
def load_names() -> Names:
    """Return the mapping."""
    path = PUBLISHED / "names.yaml"
    return validate(Names, read_yaml(path, "mapping", FimaqError), str(path), FimaqError)
