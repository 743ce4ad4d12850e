"""Facts about a reconstruction in checkpoints. Their content is not trusted."""

from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fimaq_core.errors import CheckpointError, first_problem
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.reconstruct import ReconstructionLog


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Block(_Facts):
    """Of one block; ``stage`` and ``index`` are for people. Old checkpoints have no figures."""

    stage: str = "block"
    index: int = 0
    last_loss: FiniteFloat
    fisher_passes: int = Field(ge=0)
    engine: Engine
    notes: list[str]
    error: FiniteFloat | None = None
    fisher: FiniteFloat | None = None
    near_floor: int = Field(0, ge=0)


class _Log(_Facts):
    """Of all blocks, as in :class:`~fimaq_core.reconstruction.reconstruct.ReconstructionLog`."""

    last_loss: dict[str, FiniteFloat]
    fisher_passes: dict[str, int]
    notes: list[str]
    engine: Engine
    error: dict[str, FiniteFloat] = {}
    fisher: dict[str, FiniteFloat] = {}
    near_floor: dict[str, int] = {}


_Kind = TypeVar("_Kind", bound=_Facts)


def block_facts(log: ReconstructionLog, label: str) -> dict[str, Any]:
    """What the checkpoint of the block ``label`` keeps of ``log``."""
    return {
        "last_loss": log.last_loss[label],
        "fisher_passes": log.fisher_passes[label],
        "engine": log.engine,
        "notes": [note for note in log.notes if note.startswith(f"{label}:")],
        "error": log.error.get(label),
        "fisher": log.fisher.get(label),
        "near_floor": log.near_floor.get(label, 0),
    }


def add_block(log: ReconstructionLog, label: str, facts: object, where: str) -> Engine:
    """Add to ``log`` what a checkpoint (``where``, for people) kept of a block; return its engine.

    Raises:
        CheckpointError: they are not the facts of a block.
    """
    block = _checked(_Block, facts, where)
    log.last_loss[label], log.fisher_passes[label] = block.last_loss, block.fisher_passes
    log.notes += [note for note in block.notes if note not in log.notes]
    if block.error is not None:
        log.error[label] = block.error
    if block.fisher is not None:
        log.fisher[label] = block.fisher
    if block.near_floor:
        log.near_floor[label] = block.near_floor
    return block.engine


def log_facts(log: ReconstructionLog) -> dict[str, Any]:
    """What the checkpoint of a whole chain keeps of ``log``."""
    return asdict(log)


def read_log(facts: object, where: str) -> ReconstructionLog:
    """What :func:`log_facts` made; arguments and error as of :func:`add_block`."""
    return ReconstructionLog(**_checked(_Log, facts, where).model_dump())


def _checked(kind: type[_Kind], facts: object, where: str) -> _Kind:
    try:
        return kind.model_validate(facts)
    except ValidationError as error:
        raise CheckpointError(
            f"The checkpoint {where} does not say what was reconstructed ({first_problem(error)}): delete it and run again."
        ) from error
