"""Base of the records and settings that are read from files."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Frozen model without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
