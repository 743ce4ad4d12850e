"""Facts about a reconstruction, and their checked form in checkpoints."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, ValidationError

from fimaq_core.documents import Strict
from fimaq_core.errors import CheckpointError, first_problem
from fimaq_core.reconstruction.state import NEAR_FLOOR, SCALE_FLOOR
from fimaq_core.resources import Engine


@dataclass
class ReconstructionLog:
    """Facts about a reconstruction, by label of the block."""

    #: last loss without the regulariser, over its start value (absolute for the head)
    last_loss: dict[str, float] = field(default_factory=dict)
    fisher_passes: dict[str, int] = field(default_factory=dict)  # number of Fisher passes
    #: sentences about deviations from the recipe
    notes: list[str] = field(default_factory=list)
    engine: Engine = "fused"  # the step engine
    #: ``||q - f||² / ||f||²`` over all samples; f is the block's full-precision output, q its
    #: output with this block and all earlier blocks quantized
    error: dict[str, float] = field(default_factory=dict)
    #: mean of the diagonal Fisher weight in the loss; no entry for losses without such a weight
    fisher: dict[str, float] = field(default_factory=dict)
    #: number of learned activation scales that ended at or near their lower bound, if not 0
    near_floor: dict[str, int] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """Return the notes, and a sentence about scales at or near their lower bound, if any."""
        if not self.near_floor:
            return self.notes
        blocks = ", ".join(f"{label} {count}" for label, count in self.near_floor.items())
        return [
            *self.notes,
            "Learned activation scales that ended at or near their lower bound (below "
            f"{NEAR_FLOOR:g} of the calibrated value; the bound is {SCALE_FLOOR:g}): "
            f"{sum(self.near_floor.values())} ({blocks}). A lower lr_scale moves them less.",
        ]

    def keep(self, label: str, error: float, fisher: float | None) -> None:
        """Keep a block's output error and Fisher weight; one not finite becomes a note."""
        figures = (("output error", error, self.error), ("Fisher weight", fisher, self.fisher))
        for name, value, place in figures:
            if value is not None and math.isfinite(value):
                place[label] = value
            elif value is not None:
                self.notes.append(f"{label}: its {name} is {value}")


_Count = Annotated[int, Field(ge=0, le=10**12)]
_Text = Annotated[str, Field(max_length=10_000)]


class _Block(Strict, strict=True):
    """Facts of one block; ``stage`` and ``index`` are for people.

    Old checkpoints lack the last three fields.
    """

    stage: str = "block"
    index: int = 0
    last_loss: FiniteFloat
    fisher_passes: _Count
    engine: Engine
    notes: list[_Text]
    error: FiniteFloat | None = None
    fisher: FiniteFloat | None = None
    near_floor: _Count = 0


class _Log(Strict, strict=True):
    """Fields of :class:`ReconstructionLog`, as a checkpoint holds them."""

    last_loss: dict[_Text, FiniteFloat]
    fisher_passes: dict[_Text, _Count]
    notes: list[_Text]
    engine: Engine
    error: dict[_Text, FiniteFloat] = {}
    fisher: dict[_Text, FiniteFloat] = {}
    near_floor: dict[_Text, _Count] = {}


def block_facts(log: ReconstructionLog, label: str) -> dict[str, Any]:
    """Return the facts about the block ``label`` for its checkpoint."""
    return {
        "last_loss": log.last_loss[label],
        "fisher_passes": log.fisher_passes[label],
        "engine": log.engine,
        "notes": [note for note in log.notes if note.startswith(f"{label}:")],
        "error": log.error.get(label),
        "fisher": log.fisher.get(label),
        "near_floor": log.near_floor.get(label, 0),
    }


def add_block(
    log: ReconstructionLog, label: str, facts: object, where: Path
) -> tuple[list[str], Engine]:
    """Add the facts in a block's checkpoint ``where`` to ``log``; return its notes and step engine.

    Raises:
        CheckpointError: ``facts`` are not those of a block.
    """
    with _refusing(where):
        block = _Block.model_validate(facts)
    log.last_loss[label], log.fisher_passes[label] = block.last_loss, block.fisher_passes
    for value, place in ((block.error, log.error), (block.fisher, log.fisher)):
        if value is not None:
            place[label] = value
    if block.near_floor:
        log.near_floor[label] = block.near_floor
    return block.notes, block.engine


def read_log(facts: object, where: Path) -> ReconstructionLog:
    """Return the log whose ``asdict`` a checkpoint holds. Raises CheckpointError."""
    with _refusing(where):
        return ReconstructionLog(**_Log.model_validate(facts).model_dump())


@contextmanager
def _refusing(where: Path) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise CheckpointError(
            f"The checkpoint {where} does not say what was reconstructed ({first_problem(error)}): "
            "delete it and run again."
        ) from error
