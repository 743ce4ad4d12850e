"""Published names and the ids used here: reads ``published/names.yaml``, the one file that maps them."""

from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

PUBLISHED = Path(__file__).parent / "published"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetName(_Strict):
    """What a record must state to have been measured on a published data set: the whole split, and nothing else."""

    task: str
    name: str
    split: str
    count: int


class ModelName(_Strict):
    """The model here, and the one checkpoint the published numbers were measured on."""

    id: str
    tag: str


class MethodName(_Strict):
    """The method here, and which published variants were run with the settings that are its defaults here.

    Attributes:
        id: the method's id.
        comparable: published variant to the id whose released settings it is; other variants are context only.
    """

    id: str
    comparable: dict[str, str] = {}


class Names(_Strict):
    """The whole mapping."""

    datasets: dict[str, DatasetName]
    metrics: dict[str, str]
    models: dict[str, ModelName]
    methods: dict[str, MethodName]
    unmapped_models: dict[str, str] = {}
    unmapped_methods: dict[str, str] = {}


@cache
def load_names() -> Names:
    """Return the mapping."""
    return Names.model_validate(yaml.safe_load((PUBLISHED / "names.yaml").read_text(encoding="utf-8")))
