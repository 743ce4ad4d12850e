"""Names in publications and the ids used here, which `published/names.yaml` maps."""

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import model_validator

from fimaq_core.documents import Strict, read_yaml, validate
from fimaq_core.errors import FimaqError
from tasks.common import registry

PUBLISHED = Path(__file__).parents[1] / "published"
#: Value in published rows and tables that the source does not state.
UNSTATED = "unstated"


class PartName(Strict):
    """Part of a data set, as records name it."""

    name: str
    split: str


class DatasetName(Strict):
    """Data set of records that are compared with numbers of a published data set."""

    task: str  #: task of the record
    name: str  #: name in the record
    split: str
    count: int | None = None  #: samples of the whole split; None: the source does not state it
    calibration: PartName  #: part that calibrates the models
    metrics: dict[str, str]  #: published metric to the metric of records; others are not compared
    notes: dict[str, str] = {}  #: remarks by published method, printed with every verdict


class ModelName(Strict):
    """Model here, and the checkpoint of the published numbers: others are not compared."""

    id: str
    tag: str
    #: Scope of the recipe in the source. None: always the whole model; ``unstated``: the source
    #: does not state it.
    scope: str | None = None
    #: Name in :attr:`Names.preprocessing`. None: the task has a preprocessing of its own.
    preprocessing: str | None = None


class MethodName(Strict):
    """Method here that has a name in publications."""

    id: str
    #: Published variant to the method here with the same settings; other variants are context only.
    comparable: dict[str, str] = {}
    #: Recipe fields that the published method changes in the method here (ablations).
    changes: dict[str, Any] = {}


class Names(Strict):
    """Content of `names.yaml`, by published names; data sets by published task and name.

    Example:
        >>> load_names().models["vit_small"].tag
        'vit_small_patch16_224.augreg_in21k_ft_in1k'
    """

    datasets: dict[str, dict[str, DatasetName]]
    preprocessing: dict[str, str]  #: of checkpoints, as text of ``Preprocessing``
    models: dict[str, ModelName]
    methods: dict[str, MethodName]
    studies: dict[str, str] = {}  #: GPU of each study of run times
    #: Published task and data set of each study of ``ablation.csv`` that is compared with records.
    ablations: dict[str, tuple[str, str]] = {}
    unmapped_models: dict[str, str] = {}  #: reason why a published name has no id here
    unmapped_methods: dict[str, str] = {}

    @model_validator(mode="after")
    def _check_references(self) -> "Names":
        tasks = {entry.task for sets in self.datasets.values() for entry in sets.values()}
        known = {UNSTATED, None, *(scope for task in tasks for scope in registry.scopes(task))}
        unknown = {name: m.scope for name, m in self.models.items() if m.scope not in known}
        if unknown:
            raise ValueError(f"scopes that no task has: {unknown}")
        wanted = {m.preprocessing for m in self.models.values() if m.preprocessing is not None}
        if missing := sorted(wanted - self.preprocessing.keys()):
            raise ValueError(f"preprocessing without a text: {missing}")
        return self

    def published_on(self, task: str, dataset: str) -> list[tuple[str, str, DatasetName]]:
        """Return published task, published name and entry of each entry of a data set here."""
        return [
            (theirs, name, entry)
            for theirs, sets in self.datasets.items()
            for name, entry in sets.items()
            if (entry.task, entry.name) == (task, dataset)
        ]

    def models_for(self, model: str) -> list[ModelName]:
        """Return the entries of a model's id or tag, one per published scope."""
        return [entry for entry in self.models.values() if model in (entry.id, entry.tag)]


@cache
def load_names() -> Names:
    """Return the content of `names.yaml`."""
    path = PUBLISHED / "names.yaml"
    return validate(Names, read_yaml(path, "mapping", FimaqError), str(path), FimaqError)
